"""Baselines under one protocol: every method's settings chosen by the same cross-validation.

For each fold a method makes the edits of its whole grid from the fold's training part, and all of
them are scored on the held-out part as one batch, by the probability of the answers (the whole
answer's, mean over examples and folds), which is also how `tl_laai.selection` chooses for a fit.
The best setting is made again from all examples.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tl_laai.edits import Edit
from tl_laai.evaluation import Evaluation, answer_scores, evaluate, evaluate_edits
from tl_laai.head_vectors import InferenceTimeIntervention, LearntHeads
from tl_laai.methods import Augment, Method, Setting, as_they_are
from tl_laai.prompts import DEFAULT_TEMPLATE, PromptTemplate
from tl_laai.splits import cross_validation_folds
from tl_laai.tasks import Example, same_input_key
from tl_laai.vectors import FunctionVector, InContextVector, MeanDifference, TaskVector

_LOG = logging.getLogger("tl_laai")

# Default grids were widened until what cross-validation chose from ten examples of eight rule tasks
# (Gemma 3 270M, one seed) lay inside most of them: methods get that much help from us there. Over
# five seeds some still take an end often: learnt heads the most heads in 32 of 40 fits, function
# vectors in 21, the probes of inference-time intervention in 17; in-context vectors the least
# strength in 14.
METHODS: Mapping[str, Method] = {
    "function-vector": FunctionVector(),
    "task-vector": TaskVector(),
    "in-context-vector": InContextVector(),
    "mean-difference": MeanDifference(),
    "inference-time-intervention": InferenceTimeIntervention(),
    "learnt-heads": LearntHeads(),
}


@dataclass(frozen=True)
class Trial:
    """One setting of the validation table.

    Attributes:
        setting: what was tried.
        validation_loss: held-out answer cross-entropy in nats, mean over folds.
        standard_error: of that mean over folds.
        validation_probability: of the held-out answers, mean over folds: what is chosen by.
    """

    setting: Setting
    validation_loss: float
    standard_error: float
    validation_probability: float


@dataclass(frozen=True)
class Tuned:
    """What cross-validation chose.

    Attributes:
        edit: made from all examples with the chosen setting.
        setting: the choice.
        table: every setting of the grid, in its order.
    """

    edit: Edit
    setting: Setting
    table: tuple[Trial, ...]


def tune(
    model: Any,
    examples: Sequence[Example],
    method: Method,
    *,
    n_folds: int = 2,
    seed: int = 0,
    template: PromptTemplate = DEFAULT_TEMPLATE,
    augment: Augment = as_they_are,
    progress: Callable[[int, int], None] | None = None,
) -> Tuned:
    """Choose a method's setting by k-fold cross-validation, and make its edit from all examples.

    Example:
        >>> tuned = tune(model, split.train, METHODS["function-vector"])  # doctest: +SKIP
        >>> str(tuned.setting)  # doctest: +SKIP
        'layer 7, n heads 16, strength 1'

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        examples: at least four; nothing else is looked at.
        method: what to tune; `METHODS` has them all with their default grids.
        n_folds: folds; the same examples and seed give the same folds for every method.
        seed: of the assignment to folds.
        template: how inputs become prompts.
        augment: from a fold's training part, and in the end from all examples, to what the method
            learns from; must not look at other labels.
        progress: called with `(steps done, steps in all)`: a step is a fold or the last refit.

    Returns:
        The edit, its setting and the whole validation table.

    Raises:
        ValueError: too few examples or folds, or a grid without settings.
    """
    if len(examples) < 4:
        raise ValueError(
            f"examples holds {len(examples)}: choosing by cross-validation needs at least 4. Give "
            "more, or call method.candidates with a setting of your own."
        )
    grid = method.grid(model)
    if not grid:
        raise ValueError(f"method {method} has an empty grid: give it at least one setting.")
    inputs = [same_input_key(example.input) for example in examples]
    distinct = len(set(inputs))
    if n_folds > distinct:
        raise ValueError(f"n_folds is {n_folds}, more than the {distinct} inputs: use fewer")
    parts = cross_validation_folds(inputs, n_folds, seed)
    losses, probabilities = [], []
    for i, held_out in enumerate(parts):
        known = [e for j, e in enumerate(examples) if j not in held_out]
        asked = [examples[j] for j in held_out]
        try:
            edits = method.candidates(model, augment(known), grid, template=template)
        except ValueError as reason:
            raise ValueError(
                f"{type(method).__name__}, on all but fold {i + 1} of n_folds={n_folds}: {reason}"
            ) from reason
        loss, probability = answer_scores(model, asked, [edits[s] for s in grid], template=template)
        losses.append(loss.mean(dim=1))
        probabilities.append(probability.mean(dim=1))
        if progress is not None:
            progress(i + 1, len(parts) + 1)
    loss = torch.stack(losses, dim=1)
    error = loss.std(dim=1, correction=1) / len(parts) ** 0.5
    mean = torch.stack(probabilities, dim=1).mean(dim=1)
    table = tuple(map(Trial, grid, loss.mean(dim=1).tolist(), error.tolist(), mean.tolist()))
    best = max(table, key=_score).setting
    edit = method.candidates(model, augment(examples), [best], template=template)[best]
    if progress is not None:
        progress(len(parts) + 1, len(parts) + 1)
    return Tuned(edit, best, table)


def _score(trial: Trial) -> float:
    """What settings are sorted by; a strong edit in half precision can give NaN."""
    probability = trial.validation_probability
    return -math.inf if math.isnan(probability) else probability


@dataclass(frozen=True)
class Compared:
    """One method on held-out examples.

    Attributes:
        method: its name in `METHODS`, `zero-shot` or `few-shot`.
        setting: what was chosen; empty for prompting alone.
        evaluation: its rows.
    """

    method: str
    setting: Setting
    evaluation: Evaluation


def compare_methods(
    model: Any,
    train: Sequence[Example],
    test: Sequence[Example],
    *,
    methods: Mapping[str, Method] = METHODS,
    n_folds: int = 2,
    seed: int = 0,
    template: PromptTemplate = DEFAULT_TEMPLATE,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Compared, ...]:
    """Tune methods on the same examples, and evaluate them beside zero-shot and few-shot.

    Example:
        >>> for row in compare_methods(model, split.train, split.test):  # doctest: +SKIP
        ...     print(row.method, row.setting, row.evaluation.exact_match)

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        train: what methods are tuned on and what is shown in few-shot prompts.
        test: held-out examples.
        methods: name -> method.
        n_folds: as for `tune`.
        seed: as for `tune`.
        template: how inputs become prompts.
        progress: called with `(steps done, steps in all)`.

    Returns:
        Zero-shot, few-shot, then the methods in their order; of several, those that these
        examples do not allow are left out with a warning.
    """
    per_method = n_folds + 1
    total = per_method * len(methods) + 2

    if own := [name for name in methods if name in ("zero-shot", "few-shot")]:
        raise ValueError(f"methods holds {own[0]!r}, which is a row already: name it otherwise.")

    def tell(done: int) -> None:
        if progress is not None:
            progress(done, total)

    tell(0)
    few_shot = evaluate(model, test, demonstrations=train, template=template)
    tell(1)
    tuned = {}
    for i, (name, method) in enumerate(methods.items()):
        before = 1 + i * per_method
        try:
            tuned[name] = tune(
                model,
                train,
                method,
                n_folds=n_folds,
                seed=seed,
                template=template,
                progress=lambda done, _, before=before: tell(before + done),  # type: ignore[misc]  # mypy cannot infer a lambda's default
            )
        except ValueError as error:
            if len(methods) == 1:
                raise
            _LOG.warning("%s is left out of the comparison: %s", name, error)
    edits = {"zero-shot": Edit(), **{name: t.edit for name, t in tuned.items()}}
    evaluated = evaluate_edits(model, test, edits, template=template)
    tell(total)
    return (
        Compared("zero-shot", Setting(), evaluated["zero-shot"]),
        Compared("few-shot", Setting(), few_shot),
        *(Compared(name, t.setting, evaluated[name]) for name, t in tuned.items()),
    )
