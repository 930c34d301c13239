"""Chooses layer, penalty and stopping by cross-validation inside the given examples.

What is tried is told in `tl_laai.rounds`, how it is compared in `tl_laai.crossvalidation`.

Distillation (`tl_laai.distillation`) is taken unless the best fit on labels answers clearly more
held-out examples than the teacher itself (of ten, two more), asked the examples of each fold after
the others (a teacher that is not fitted is asked each example after all others). One more is no
reason: the distilled fit learns the labels too. Distilled fits on folds would say less: their
teachers read few examples, and they are tried on few inputs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat, SupportsIndex

from tl_laai.backends import backend_of
from tl_laai.batches import Fit, NonFiniteError
from tl_laai.candidates import Candidate, Trial, best_first, best_of_rounds
from tl_laai.crossvalidation import CrossValidation
from tl_laai.distillation import Distillation
from tl_laai.distributions import NothingTaughtError
from tl_laai.evaluation import Evaluation
from tl_laai.hooking import Position
from tl_laai.interventions import json_provenance
from tl_laai.made_up_inputs import check_can_make_up
from tl_laai.objectives import ObjectiveName
from tl_laai.opinions import OptionExample
from tl_laai.problems import FitExample
from tl_laai.prompts import DEFAULT_TEMPLATE, PromptTemplate, TooLongError
from tl_laai.relaxation import LEARNING_RATE
from tl_laai.rounds import (
    CHOOSING_EVALUATIONS,
    DISTILLED_INPUTS,
    DROP_BELOW,
    OPINION_ALPHAS,
    OPINION_EVALUATIONS,
    OPINION_TOLERANCE,
    PENALISED_EVALUATIONS,
    SCREENING_EVALUATIONS,
    SCREENING_FOLDS,
    Rounds,
    check_choice,
    mixed_folds,
    opinion_layers,
)
from tl_laai.splits import cross_validation_folds, integer
from tl_laai.tasks import Example, check_examples, same_input_key

_LOG = logging.getLogger("tl_laai")

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "objectives": ("answers",),
        "position": "prompt_end",
        "l1_ratio": 0.02,
        "relax_steps": (),
    },
    "relaxed": {"objectives": ("answers",), "position": "prompt_end"},
    "distill": {"objectives": ("answers", "distill"), "position": "prompt_end"},
}
"""Settings of `fit_auto` by name.

`paper` is what the paper states: labelled answers, both penalties and their minimiser, the last
prompt token; it does not state how L1 and group-L2 are weighed, so 0.02 is ours. `relaxed` (the
default) lets a penalty choose heads, and fits those without it. `distill` lets the model's own
few-shot behaviour compete with the labels.
"""


@dataclass(frozen=True)
class Selection:
    """What cross-validation chose.

    Attributes:
        fit: refitted on all examples with the chosen setting.
        table: every candidate of all rounds.
        candidate: the row of the table that was chosen.
        held_out: how the best fits on labels (on few heads, if those were chosen) answered what
            was held out; None for opinions.
        teacher: how the teacher answers examples after others that it reads and may be fitted on,
            where distilling is a choice.
    """

    fit: Fit
    table: tuple[Candidate, ...]
    candidate: Candidate
    held_out: Evaluation | None = None
    teacher: Evaluation | None = None

    @property
    def layer(self) -> int:
        """The chosen layer."""
        return self.candidate.layer

    @property
    def alpha(self) -> float:
        """The chosen group weight, as a share of `lambda_max`."""
        return self.candidate.alpha

    @property
    def objective(self) -> ObjectiveName:
        """The chosen objective."""
        return self.candidate.objective


def fit_auto(
    model: Any,
    examples: Sequence[FitExample],
    *,
    layers: Iterable[SupportsIndex] | None = None,
    alphas: Iterable[SupportsFloat] | None = None,
    l1_ratio: float = 0.0,
    max_heads: SupportsIndex | None = None,
    relax_steps: Iterable[SupportsIndex] | None = None,
    objectives: Sequence[ObjectiveName] = ("answers",),
    distillation: Distillation | None = None,
    groups: Sequence[Hashable] | None = None,
    n_folds: SupportsIndex = 4,
    seed: SupportsIndex = 0,
    position: Position = "prompt_end",
    template: PromptTemplate = DEFAULT_TEMPLATE,
    max_evaluations: SupportsIndex | None = None,
    tolerance: SupportsFloat | None = None,
    learning_rate: float = LEARNING_RATE,
    drop_below: float = DROP_BELOW,
    max_memory: float = 1.0,
    provenance: dict[str, Any] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Selection:
    """Fit with layer, penalty and stopping chosen by k-fold cross-validation.

    Of opinion questions, unless told otherwise or heads are counted, one of three layers is
    chosen, without a penalty, by fits of 60 evaluations to a tolerance of 1e-6.

    Example:
        >>> chosen = fit_auto(model, split.train)  # doctest: +SKIP
        >>> chosen = fit_auto(model, split.train, **PRESETS["paper"])  # doctest: +SKIP
        >>> chosen.layer, chosen.alpha  # doctest: +SKIP
        (7, 0.5)

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        examples: at least four; nothing else is looked at.
        layers: candidate layers; None for all. No more than three skip the screening.
        alphas: candidate group weights, as shares of `lambda_max`; None for `ALPHAS`, for
            `PENALISED_ALPHAS` where nothing is relaxed and `DISTILLED_ALPHAS` where distilling.
            With `max_heads` those of its round, and None for `SPARSE_ALPHAS`.
        l1_ratio: the l1 weight as a multiple of the group weight.
        max_heads: choose all else on all heads, or at the default alphas where nothing is
            relaxed; then take that one of `alphas` which leaves the most heads up to this many of
            the chosen layer when fitted on all examples, and choose the steps again.
        relax_steps: candidate numbers of steps of the relaxed fit (`tl_laai.relaxation`), all of
            them scored along one run; None for `RELAX_STEPS`, and `DISTILLED_STEPS` where
            distilling; empty for the penalised fits themselves.
        objectives: `answers`, `distill`, or both: distilled unless the best fit on labels answers
            clearly more examples right, held out, than the teacher (`keeps_up`).
        distillation: of `distill`; its `label_share` is chosen too, by folds, unless it is above
            0. About a quarter of the inputs is held out while layer and steps are chosen, among
            layers that labels rank first where there are more than three.
        groups: a label an example: those with the same label are held out together. None holds
            out prompts that ask the same opinion question together, and examples of one input.
        n_folds: folds of the final round, at most the number of examples (or of labels); layers
            are screened on two halves.
        seed: of the assignment to folds.
        position: where Delta is added.
        template: how inputs become prompts.
        max_evaluations: of each penalised fit, on a fold as on all examples, and at most 12 while
            layers are screened; None for 40, and for 15 where it only chooses the entries of a
            relaxed one.
        tolerance: of the stationarity of penalised fits; None for 1e-3.
        learning_rate: of the relaxed fits.
        drop_below: of fits on labels, those whose held-out answers have lower odds than this share
            of the best ones' are not followed to more steps; 0 follows all, and takes longer.
        max_memory: GiB that one chunk of rows may take above the model.
        provenance: kept with the intervention.
        progress: called with `(what, work done, work in all)`; work is counted in
            loss-and-gradient evaluations of one example, or what takes as long, at most
            `in all` of them, which becomes fewer when the choice is known.

    Returns:
        The refitted choice and the whole validation table.

    Raises:
        ValueError: too few examples or folds, no such layers, no alphas, no alpha that leaves as
            few heads as `max_heads`, or what `fit` raises.
    """
    check_examples("examples", examples)
    n_layers = backend_of(model).n_layers
    labels = _labels(examples) if groups is None else list(groups)
    if max_heads is None and all(isinstance(example, OptionExample) for example in examples):
        layers = opinion_layers(n_layers) if layers is None else layers
        if relax_steps is None:
            relax_steps = ()
            alphas = OPINION_ALPHAS if alphas is None else alphas
            max_evaluations = OPINION_EVALUATIONS if max_evaluations is None else max_evaluations
            tolerance = OPINION_TOLERANCE if tolerance is None else tolerance
    # All of these come to stand in the provenance, which is JSON and is written last.
    numbers = range(n_layers) if layers is None else [integer("layers", n) for n in layers]
    candidates = list(dict.fromkeys(numbers))
    shares = None if alphas is None else [float(alpha) for alpha in alphas]
    steps = None if relax_steps is None else [integer("relax_steps", n) for n in relax_steps]
    max_heads = None if max_heads is None else integer("max_heads", max_heads)
    n_folds, seed = integer("n_folds", n_folds), integer("seed", seed)
    if not 0 <= drop_below <= 1:
        raise ValueError(f"drop_below is {drop_below}; give a share from 0 to 1.")
    json_provenance(provenance or {})
    if distillation is not None and "distill" not in objectives:
        raise ValueError(
            f"distillation is given, and objectives is {list(objectives)}: add 'distill' to them."
        )
    taught = (distillation or Distillation(seed=seed)).on(model)
    check_choice(model, examples, labels, candidates, shares, steps or (), objectives, max_heads)
    if "distill" in objectives and taught.inputs is None:
        check_can_make_up(template, ())
    few = max_heads if max_heads != backend_of(model).n_heads else None  # all is no limit
    tried = Rounds(
        tuple(candidates), n_layers, shares, steps, tuple(objectives), few,
        distillation.label_share if distillation else 0.0,
    )  # fmt: skip
    folds = cross_validation_folds(labels, min(n_folds, len(set(labels))), seed)
    if max_evaluations is None:
        max_evaluations = CHOOSING_EVALUATIONS if tried.steps else PENALISED_EVALUATIONS
    limit = integer("max_evaluations", max_evaluations)
    search = CrossValidation(
        model, examples, folds, l1_ratio, limit, 1e-3 if tolerance is None else float(tolerance),
        learning_rate, position, template, max_memory, progress, taught, DISTILLED_INPUTS,
        float(drop_below),
    )  # fmt: skip
    # Few folds that together hold out every example: the fewer fitted on, the faster.
    parts = cross_validation_folds(labels, SCREENING_FOLDS, seed)
    search.work.whole = search.work.of_choice(tried, folds, parts)
    table: list[Candidate] = []
    ranked: Sequence[int] = candidates
    if grid := tried.screening():
        fewer = min(limit, SCREENING_EVALUATIONS)
        table += search.score("screening", grid, parts, tried.brief, fewer)
        ranked = tried.apart([row.layer for row in best_first(table)])
    best: Candidate | None = None
    if grid := tried.labelled(ranked):
        rows = search.score("final", grid, folds, tried.steps)
        table += rows
        rows = best_first(rows)
        ranked, best = list(dict.fromkeys(row.layer for row in rows)), rows[0]
    held_out = teacher = None
    if best is not None and all(isinstance(example, Example) for example in examples):
        held_out = search.answers(best)
    grid = tried.taught(ranked)
    if held_out is not None and grid:
        try:
            teacher = search.teacher(labels)
        except (NothingTaughtError, TooLongError) as error:
            _LOG.warning("distillation is left out of the choice: %s", error)
            grid = []
    if grid and (teacher is None or held_out is None or keeps_up(teacher, held_out)):
        rows = _distilled(tried, search, grid, required=best is None)
        table += rows
        best = next(
            (row for row in reversed(best_of_rounds(rows)) if row.score() > -math.inf), best
        )
    best = _finite(best, learning_rate)
    if few is not None:
        rows = _sparse(tried, search, best, few)
        table += rows
        best = _finite(best_first(rows)[0], learning_rate)
        if held_out is not None and best.objective == "answers":
            held_out = search.answers(best)
    origin = {
        **(provenance or {}),
        "selection": {
            "folds": len(folds),
            "seed": seed,
            "max_heads": max_heads,
            "drop_below": float(drop_below),
            "table": [candidate.as_json() for candidate in table],
            "held_out": None if held_out is None else held_out.exact_match,
            "teacher": None if teacher is None else teacher.exact_match,
        },
    }
    fitted = search.refit(best, origin)
    n_heads = len(fitted.intervention.heads())
    if few is not None and n_heads > few:
        _LOG.warning("max_heads is %d, but the last fit rounded to %d heads", few, n_heads)
    return Selection(fitted, tuple(table), best, held_out, teacher)


def _finite(best: Candidate | None, learning_rate: float) -> Candidate:
    """A choice, if it has a finite score."""
    if best is None or best.score() == -math.inf:
        raise NonFiniteError(
            f"learning_rate is {learning_rate}: no candidate has a finite score on held-out "
            "examples. Use a smaller one, or a wider dtype (float32)."
        )
    return best


def keeps_up(teacher: Evaluation, labelled: Evaluation) -> bool:
    """Whether a teacher answered hardly fewer held-out examples right than fits on labels did.

    Hardly fewer is one of ten, two of forty, three of ninety: as chance grows. That it is one of
    ten was set on rule tasks.
    """
    n_right, n_labelled = (sum(row.correct for row in own.rows) for own in (teacher, labelled))
    return n_labelled - n_right <= max(1, math.isqrt(teacher.n // 10))


def _sparse(
    tried: Rounds, search: CrossValidation, best: Candidate, max_heads: int
) -> list[Candidate]:
    """The round that keeps a few heads of what was chosen, and chooses its steps again."""
    kept = [search.within("heads", tried.sparse(best), max_heads)]
    if best.objective == "distill":
        return search.score_by_teacher("heads", kept, tried.taught_steps)
    return search.score("heads", kept, search.folds, tried.steps)


def _distilled(
    tried: Rounds, search: CrossValidation, grid: list[Trial], *, required: bool
) -> list[Candidate]:
    """Both rounds of distilled fits; none of their rows where they fail and are not required."""
    try:
        rows = search.score_by_teacher("distilled", grid, tried.taught_steps)
    except (NothingTaughtError, TooLongError) as error:
        if required:
            raise
        _LOG.warning("distillation is left out of the choice: %s", error)
        return []
    best = best_first(rows)[0]
    shares = tried.mixed(best)
    if not shares or best.score() == -math.inf:
        return rows
    steps = (best.relax_steps,) if tried.taught_steps else ()
    try:
        return rows + search.score("mixed", shares, mixed_folds(search.folds), steps)
    except (NothingTaughtError, TooLongError) as error:
        _LOG.warning("label_share stays %g: %s", best.label_share, error)
        return rows


def _labels(examples: Sequence[FitExample]) -> list[Hashable]:
    """What is held out together: prompts of one question, examples of one input."""

    def label(i: int, example: FitExample) -> Hashable:
        if isinstance(example, OptionExample):
            return example.question or i
        return same_input_key(example.input) if isinstance(example, Example) else i

    return [label(i, example) for i, example in enumerate(examples)]
