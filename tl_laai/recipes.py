"""What a fit was made of: kept in an intervention's provenance, and made again from there.

    model, backend                  what to load
    task   name, source, digest     which data; a digest that differs is refused
    split  train, test, seed        the examples fitted on, and those held out
    opinions group, source, digest  instead of a task: whose answers to which questions

So a saved intervention can be evaluated on its own held-out examples with nothing else said, and
compared with the same model zero-shot and prompted with the same examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_laai.tasks import Example, Task, load_task, same_input_key

if TYPE_CHECKING:
    from tl_laai.evaluation import Evaluation
    from tl_laai.interventions import Intervention
    from tl_laai.opinions import OpinionTemplate
    from tl_laai.polls import OpinionSplit
    from tl_laai.prompts import PromptTemplate

DEFAULT_TRAIN, DEFAULT_TEST = 10, 100


@dataclass(frozen=True)
class TaskData:
    """A task's examples to fit on (or to show as demonstrations), and those held out.

    Attributes:
        task: where they are from.
        train: fitted on, in their order.
        test: held out; shares no input with `train`.
        seed: of the split.
        origin_known: whether it is certain that `test` has no example that was fitted on.
    """

    task: Task
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    seed: int
    origin_known: bool = True


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
        ValueError: the provenance names no model, and none is given.
    """
    name = model or _lookup(provenance, "model")
    if not isinstance(name, str):
        raise ValueError("the intervention does not record its model's name; give --model")
    return name, backend or _lookup(provenance, "backend") or "auto"


def recorded_data(
    provenance: Mapping[str, Any],
    *,
    task: str | None = None,
    test: int | None = None,
    seed: int | None = None,
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

    Raises:
        ValueError: no task is recorded and none given; its data has changed since the fit; no
            example is left to hold out.
    """
    name = task or _source(provenance)
    if name is None:
        raise ValueError("the intervention does not record its task; give --task")
    loaded = load_task(name)
    n_train = _lookup(provenance, "split", "train") or DEFAULT_TRAIN
    old_seed = _lookup(provenance, "split", "seed") or 0
    digest = _lookup(provenance, "task", "digest")
    if task is None and digest != loaded.digest:
        raise ValueError(
            f"task {name!r} has changed since the fit (digest {digest}, now {loaded.digest}), so "
            "its split cannot be made again; restore it, or give --task"
        )
    seen = _fitted_on(provenance, loaded)
    data = draw(
        loaded,
        train=n_train,
        test=test or _lookup(provenance, "split", "test") or DEFAULT_TEST,
        seed=old_seed if seed is None else seed,
        without=seen or (),
    )
    if not data.test:
        raise ValueError(
            f"task {loaded.name!r} has {len(loaded.distinct)} distinct inputs, and none is left "
            "to hold out; fit on fewer, or give --task"
        )
    return replace(data, origin_known=seen is not None)


@dataclass(frozen=True)
class PollData:
    """The questions of an opinion fit, and how they are asked.

    Attributes:
        group: whose answers.
        split: what was fitted on, and what is held out.
        n_orders: prompts a question.
        seed: of split and orders.
        shots: questions that few-shot prompts show; None for all that were fitted on.
        template: how questions become prompts.
    """

    group: str
    split: OpinionSplit
    n_orders: int
    seed: int
    shots: int | None
    template: OpinionTemplate


def recorded_poll(provenance: Mapping[str, Any]) -> PollData:
    """The questions that an opinion fit was made on, and those held out from it.

    Raises:
        FileNotFoundError, ValueError: the poll is not where it was, or has changed since the fit.
    """
    from tl_laai.opinions import OpinionTemplate
    from tl_laai.polls import OpinionTask

    group, source, digest = (
        _lookup(provenance, "opinions", name) for name in ("group", "source", "digest")
    )
    if source == "built-in":
        task = OpinionTask.load(group)
    else:
        task = OpinionTask.from_jsonl(str(source), group=group)
    if task.digest != digest:
        raise ValueError(
            f"the questions of {group!r} in {source} have changed since the fit (digest {digest}, "
            f"now {task.digest}), so its split cannot be made again; restore them"
        )
    n_train, n_orders, seed, shots = (
        _lookup(provenance, "split", name) for name in ("train", "orders", "seed", "shots")
    )
    template = OpinionTemplate(**_lookup(provenance, "opinions", "template"))
    split = task.split(train=n_train, seed=seed)
    return PollData(task.group, split, n_orders, seed, shots, template)


def recorded_template(provenance: Mapping[str, Any]) -> PromptTemplate:
    """The prompt template of a fit; the default one where none is recorded.

    Raises:
        TypeError, ValueError: what is recorded is no template.
    """
    from tl_laai.prompts import DEFAULT_TEMPLATE, PromptTemplate  # imports torch

    recorded = _lookup(provenance, "template")
    known = recorded if isinstance(recorded, Mapping) else {}
    names = [field.name for field in fields(PromptTemplate) if field.name in known]
    return replace(DEFAULT_TEMPLATE, **{name: known[name] for name in names})


def compare(
    model: Any,
    intervention: Intervention,
    data: TaskData,
    *,
    template: PromptTemplate | None = None,
    few_shot: bool = True,
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

    Returns:
        Evaluations called `zero_shot`, `few_shot` and `intervened`.

    Raises:
        ValueError: another model than that of the fit, or a prompt longer than its context.
    """
    from tl_laai.decoding import Edit  # these import torch, which drawing examples can do without
    from tl_laai.evaluation import as_edit, evaluate, evaluate_edits
    from tl_laai.prompts import DEFAULT_TEMPLATE

    template = template or DEFAULT_TEMPLATE
    edits = {"zero_shot": Edit(), "intervened": as_edit(model, intervention)}
    results = evaluate_edits(model, data.test, edits, template=template)
    if few_shot:
        results["few_shot"] = evaluate(
            model, data.test, demonstrations=data.train, template=template
        )
    return results


def _lookup(provenance: Any, *names: str) -> Any:
    """A value deep in a provenance; None where it does not go so deep, since anyone wrote it."""
    for name in names:
        provenance = provenance.get(name) if isinstance(provenance, Mapping) else None
    return provenance


def _source(provenance: Any) -> str | None:
    """What `load_task` takes for the task of a fit; None where it came from no file."""
    source = _lookup(provenance, "task", "source")
    name = _lookup(provenance, "task", "name") if source == "built-in" else source
    return name if isinstance(name, str) else None


def _fitted_on(fit: Any, loaded: Task) -> tuple[Example, ...] | None:
    """The examples that a fit has seen; None where they cannot be drawn again.

    The digest alone tells: another file's name says nothing of what is in it.
    """
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


def _absolute(source: str) -> str | None:
    """A file's path from any working directory; None for a task that came from no file."""
    path = Path(source)
    return str(path.resolve()) if path.is_file() else None
