"""What a fit was made of: kept in an intervention's provenance, and made again from there.

    model, backend                  what to load
    task   name, source, digest     which data; a digest that differs is refused
    split  train, test, seed        the examples fitted on, and those held out

So a saved intervention can be evaluated on its own held-out examples with nothing else said, and
compared with the same model zero-shot and prompted with the same examples. Of an intervention
made of others by algebra, that is known in which all its parts agree.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_laai.tasks import Example, Task, load_task, same_input_key

if TYPE_CHECKING:
    from tl_laai.evaluation import Evaluation
    from tl_laai.interventions import Intervention
    from tl_laai.prompts import PromptTemplate

DEFAULT_TRAIN, DEFAULT_TEST = 10, 100

_LOG = logging.getLogger("tl_laai")


@dataclass(frozen=True)
class TaskData:
    """A task's examples to fit on (or to show as demonstrations), and those held out.

    Attributes:
        task: where they are from.
        train: fitted on, in their order.
        test: held out; shares no input with `train`.
        seed: of the split.
        origin_known: whether it is certain that `test` has no example that was fitted on.
        n_seen_unlabelled: inputs of `test` that a distilled fit has seen, without their answers.
    """

    task: Task
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    seed: int
    origin_known: bool = True
    n_seen_unlabelled: int = 0


def draw(
    task: Task,
    *,
    train: int = DEFAULT_TRAIN,
    test: int = DEFAULT_TEST,
    seed: int = 0,
    without: Sequence[Example] = (),
) -> TaskData:
    """Draw `train` examples, and hold out `test` of the others, or all there are.

    Example:
        >>> data = draw(Task.load("country-capital"), train=10, seed=0)
        >>> len(data.train), len(data.test)
        (10, 100)

    Args:
        task: where to draw from.
        train: exactly so many.
        test: at most so many; a smaller number holds out the first of a larger one's.
        seed: which.
        without: never held out; not counted.

    Returns:
        The drawn examples; nothing may be left for `test`.

    Raises:
        TypeError, ValueError: a number is no count, or there are fewer than `train` examples.
    """
    split = task.split(train=train, seed=seed)
    left_out = {same_input_key(example.input) for example in without}
    held_out = [e for e in split.test if same_input_key(e.input) not in left_out]
    return TaskData(task, split.train, tuple(held_out[:test]), seed)


def record(model: str, backend: str, data: TaskData) -> dict[str, Any]:
    """What a fit should keep as provenance: see the head of this file.

    Example:
        >>> fit(model, data.train, provenance=record("gpt2", "auto", data))  # doctest: +SKIP

    Args:
        model: the name it was loaded by; a path is kept absolute.
        backend: as given to `load_model`.
        data: its train examples are those fitted on.
    """
    task = data.task
    built_in = task.source == "built-in"
    return {
        "model": model_name(model),
        "backend": backend,
        "task": {
            "name": task.name,
            "source": task.source if built_in else _absolute(task.source),
            "version": task.version,
            "digest": task.digest,
        },
        "split": {"train": len(data.train), "test": len(data.test), "seed": data.seed},
    }


def model_name(name: str) -> str:
    """The same model from any working directory: paths made absolute, names left alone."""
    from tl_laai.checkpoints import BUILT_IN  # it imports torch

    path = Path(name).expanduser()
    return str(path.resolve()) if name not in BUILT_IN and path.exists() else name


def recorded_model(
    provenance: Mapping[str, Any], *, model: str | None = None, backend: str | None = None
) -> tuple[str, str]:
    """The model and backend of a fit, or those given instead.

    Example:
        >>> recorded_model({"model": "gemma-3-270m"}, backend="bridge")
        ('gemma-3-270m', 'bridge')

    Raises:
        ValueError: the provenance names no one model, and none is given.
    """
    name = model or agreed(provenance, "model")
    if not isinstance(name, str):
        raise ValueError(
            "the intervention does not record its model's name, or its parts do not agree on it; "
            "give --model"
        )
    return name, backend or agreed(provenance, "backend") or "auto"


def recorded_data(
    provenance: Mapping[str, Any],
    *,
    task: str | None = None,
    test: int | None = None,
    seed: int | None = None,
    few_shot: bool = True,
) -> TaskData:
    """The train and held-out examples of a fit, or of another task, size or seed.

    Whatever is changed, no input of an example that the fit is known to have seen is held out.

    Example:
        >>> recorded_data({}, task="antonym", test=5).origin_known
        False

    Args:
        provenance: an intervention's.
        task: built-in name or file, instead of the recorded one.
        test: at most so many held-out examples, instead of the recorded number.
        seed: of another split of the same size.
        few_shot: False draws no train examples where none would be left to hold out.

    Raises:
        FileNotFoundError: the fit's task was in a file that is gone.
        ValueError: no one task is recorded and none given; its data has changed since the fit;
            no example is left to hold out.
    """
    recorded = {"task": agreed(provenance, "task")}
    name = task or _source(recorded)
    if name is None and on_opinions(provenance):
        raise ValueError(
            "the intervention was fitted on opinions, which have no right answers: laai evaluate "
            "compares it with the group's, or give --task for a task with some"
        )
    if name is None:
        raise ValueError(
            "the intervention does not record its task, or its parts do not agree on it; "
            "give --task"
        )
    if task is None and name == _lookup(recorded, "task", "source") and not Path(name).exists():
        raise FileNotFoundError(
            f"the task of the fit, {name}, is not there any more: put it back, or say where it is "
            "with --task"
        )
    loaded = load_task(name)
    digest = _lookup(recorded, "task", "digest")
    if task is None and digest != loaded.digest:
        raise ValueError(
            f"task {name!r} has changed since the fit (digest {digest}, now {loaded.digest}), so "
            "its split cannot be made again; restore it, or give --task"
        )
    seen = [_fitted_on(fit, loaded) for fit in _fits(provenance)]
    drawn = partial(
        draw,
        loaded,
        test=test or agreed(provenance, "split", "test") or DEFAULT_TEST,
        seed=(agreed(provenance, "split", "seed") or 0) if seed is None else seed,
        without=[example for examples in seen for example in examples or ()],
    )
    n_train = agreed(provenance, "split", "train") or DEFAULT_TRAIN
    data = drawn(train=min(n_train, len(loaded.distinct)))
    if not data.test and not few_shot:  # only then: else both hold out the same
        data = drawn(train=0)
    if not data.test:
        instead = "leave few-shot out (--no-few-shot)" if few_shot and task else "fit on fewer"
        raise ValueError(
            f"task {loaded.name!r} has {len(loaded.distinct)} distinct inputs, and none is left "
            f"to hold out; {instead}, or give another --task"
        )
    unlabelled = {key for fit in _fits(provenance) for key in _unlabelled(fit)}
    n_unlabelled = sum(same_input_key(example.input) in unlabelled for example in data.test)
    return replace(data, origin_known=None not in seen, n_seen_unlabelled=n_unlabelled)


def agreed(provenance: Any, *names: str) -> Any:
    """A value deep in the provenance of every fit that an intervention was made of.

    Example:
        >>> agreed({"operation": "negate", "parts": [{"split": {"seed": 3}}]}, "split", "seed")
        3

    Returns:
        None where it is not recorded, or the fits do not agree on it.
    """
    first, *others = [_lookup(fit, *names) for fit in _fits(provenance)]
    return first if all(other == first for other in others) else None


def on_opinions(provenance: Mapping[str, Any]) -> bool:
    """Whether an intervention, or a part of it, was fitted on opinions."""
    return any(_lookup(fit, "opinions") is not None for fit in _fits(provenance))


def recorded_template(provenance: Mapping[str, Any]) -> PromptTemplate:
    """The prompt template of a fit; the default one where none is recorded.

    Where the parts of an intervention do not agree on it, that is said, and the default one taken.

    Raises:
        TypeError, ValueError: what is recorded is no template.
    """
    from tl_laai.prompts import DEFAULT_TEMPLATE, PromptTemplate  # imports torch

    names = [field.name for field in fields(PromptTemplate)]
    found = []
    for fit in _fits(provenance):
        recorded = _lookup(fit, "template")
        known = recorded if isinstance(recorded, Mapping) else {}
        known = {name: known[name] for name in names if name in known}
        found.append(replace(DEFAULT_TEMPLATE, **known))
    if len(set(found)) > 1:
        _LOG.warning(
            "The parts of the intervention were fitted with different prompt templates (%s): "
            "prompts are made with the default one, %r.",
            ", ".join(dict.fromkeys(repr(template.text) for template in found)),
            DEFAULT_TEMPLATE.text,
        )
        return DEFAULT_TEMPLATE
    return found[0]


def compare(
    model: Any,
    intervention: Intervention,
    data: TaskData,
    *,
    template: PromptTemplate | None = None,
    few_shot: bool = True,
    controls: bool = False,
) -> dict[str, Evaluation]:
    """Answer the held-out examples zero-shot, after demonstrations, and intervened.

    Example:
        >>> compare(model, capital, data)["intervened"].exact_match  # doctest: +SKIP

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        intervention: fitted on `data.train`, which are the demonstrations.
        data: what is held out.
        template: that of the fit; None for the default one.
        few_shot: False leaves the demonstrations out, and with them the longest prompts.
        controls: also intervened with the same norms in random directions, and with heads
            permuted where a layer has several.

    Returns:
        Evaluations called `zero_shot`, `few_shot` and `intervened`, `random_direction` and
        `permuted_heads`.

    Raises:
        ValueError: another model than that of the fit.
        TooLongError: a prompt is longer than its context.
    """
    from tl_laai.controls import permuted_heads, random_direction
    from tl_laai.edits import Edit  # these import torch, which drawing examples can do without
    from tl_laai.evaluation import as_edit, evaluate, evaluate_edits
    from tl_laai.prompts import DEFAULT_TEMPLATE, TooLongError

    template = template or DEFAULT_TEMPLATE
    edits = {"zero_shot": Edit(), "intervened": as_edit(model, intervention)}
    if controls:
        edits["random_direction"] = random_direction(edits["intervened"], seed=0)
        if all(len(delta) > 1 for delta in intervention.deltas.values()):
            edits["permuted_heads"] = permuted_heads(edits["intervened"], seed=0)
    prompted = {}
    if few_shot:  # first: the longest prompts are those that may not fit
        try:
            prompted["few_shot"] = evaluate(
                model, data.test, demonstrations=data.train, template=template
            )
        except TooLongError as error:
            raise TooLongError(f"{error}, or leave few-shot out (--no-few-shot)") from error
    return evaluate_edits(model, data.test, edits, template=template) | prompted


def _lookup(provenance: Any, *names: str) -> Any:
    """A value deep in a provenance; None where it does not go so deep, since anyone wrote it."""
    for name in names:
        provenance = provenance.get(name) if isinstance(provenance, Mapping) else None
    return provenance


def _fits(provenance: Any) -> Iterator[Any]:
    """The provenances of all fits that an intervention was made of: itself, or its parts'."""
    parts = _lookup(provenance, "parts")
    if isinstance(parts, list) and parts:
        for part in parts:
            yield from _fits(part)
    else:
        yield provenance


def _source(provenance: Any) -> str | None:
    """What `load_task` takes for the task of a fit; None where it came from no file."""
    source = _lookup(provenance, "task", "source")
    name = _lookup(provenance, "task", "name") if source == "built-in" else source
    return name if isinstance(name, str) else None


def _fitted_on(fit: Any, loaded: Task) -> tuple[Example, ...] | None:
    """The examples that a fit has seen; None where they cannot be drawn again.

    The digest alone tells: another file's name says nothing of what is in it.
    """
    if on_opinions(fit):
        return ()
    digest, source = _lookup(fit, "task", "digest"), _source(fit)
    if digest != loaded.digest and source is not None:
        try:
            loaded = load_task(source)
        except (OSError, ValueError):
            return None
    n_train = _lookup(fit, "split", "train")
    if digest != loaded.digest or n_train is None:
        return None
    return draw(loaded, train=n_train, seed=_lookup(fit, "split", "seed") or 0).train


def _unlabelled(fit: Any) -> list[str]:
    """The inputs that a fit was distilled on, given or made up, as they are compared."""
    inputs = _lookup(fit, "objective", "inputs")
    return [same_input_key(text) for text in inputs] if isinstance(inputs, list) else []


def _absolute(source: str) -> str | None:
    """A file's path from any working directory; None for a task that came from no file."""
    path = Path(source)
    return str(path.resolve()) if path.is_file() else None
