"""Fits interventions: one or many, on labelled answers or on what a teacher says.

Which solver, learning rate, step count and penalty weights the paper used is not published; the
defaults here are ours. `fit_many` runs any number of fits as one batch (`tl_laai.batches`) and is
what `fit` calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, SupportsFloat, SupportsIndex

from tl_laai.batches import Fit, FitBatch, FitProblem, Solver
from tl_laai.distillation import Distillation, Lesson, prepare
from tl_laai.hooking import Position
from tl_laai.objectives import ObjectiveName
from tl_laai.penalties import SparseGroupLasso
from tl_laai.problems import FitExample
from tl_laai.prompts import DEFAULT_TEMPLATE, PromptTemplate
from tl_laai.relaxation import LEARNING_RATE
from tl_laai.splits import integer
from tl_laai.tasks import Example


def fit(
    model: Any,
    examples: Sequence[FitExample],
    *,
    layer: SupportsIndex,
    penalty: SparseGroupLasso | None = None,
    alpha: float | None = None,
    l1_ratio: float = 0.0,
    objective: ObjectiveName = "answers",
    distillation: Distillation | None = None,
    position: Position = "prompt_end",
    template: PromptTemplate = DEFAULT_TEMPLATE,
    solver: Solver = "proximal",
    tolerance: SupportsFloat = 1e-3,
    max_evaluations: SupportsIndex = 150,
    learning_rate: SupportsFloat = LEARNING_RATE,
    relax_steps: SupportsIndex = 0,
    provenance: Mapping[str, Any] | None = None,
    callback: Callable[[Any], None] | None = None,
) -> Fit:
    """Fit one intervention at one layer.

    Example:
        >>> split = Task.load("country-capital").split(train=10, seed=0)  # doctest: +SKIP
        >>> result = fit(model, split.train, layer=9, alpha=0.9)  # doctest: +SKIP
        >>> result.intervention.save_pretrained("capital")  # doctest: +SKIP

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        examples: about ten input-output pairs, or what else `FitProblem` takes.
        layer: the edited layer, from 0.
        penalty: `SparseGroupLasso(l1, group)` with absolute weights; None for no penalty.
        alpha: instead of `penalty`: the group weight as a share of `lambda_max`.
        l1_ratio: with `alpha`: the l1 weight as a multiple of the group weight.
        objective: `answers` (their cross-entropy, the paper's), or `distill` (the model's own
            few-shot distributions, once fitted, ours: `tl_laai.distillation`).
        distillation: settings of `distill`; None for its defaults.
        position: `prompt_end` (the last prompt token) or `every_step` (each decoding step).
        template: how inputs become prompts.
        solver: `proximal` (proximal gradient, exact zeros) or `adam` (plain Adam on the
            penalised loss, the reference that papers use).
        tolerance: stop when stationarity is at most `tolerance * max(1, ||delta||)`.
        max_evaluations: loss-and-gradient evaluations; for `adam` the number of steps.
        learning_rate: of `adam`, and of relaxing.
        relax_steps: steps of Adam without a penalty on the entries that the penalised fit left
            non-zero, all from zero again (`tl_laai.relaxation`, ours); 0 keeps the penalised fit.
        provenance: what the caller knows about the examples; kept with the intervention.
        callback: called after each evaluation with the solver's progress.

    Returns:
        The fit; its `solution.status` says whether it converged.

    Raises:
        ValueError: an empty task, a layer out of range, a prompt too long, a non-finite loss.
    """
    number = integer("layer", layer)
    problem = FitProblem(examples, number, penalty, alpha, l1_ratio, None, provenance or {})
    if objective == "distill":
        labelled = [example for example in examples if isinstance(example, Example)]
        if len(labelled) < len(examples):
            raise TypeError("examples of objective='distill' are Examples: the teacher reads them.")
        problem = taught_problem(problem, prepare(model, labelled, distillation, template=template))
    elif objective != "answers":
        raise ValueError(f"objective is {objective!r}; use 'answers' or 'distill'.")
    elif distillation is not None:
        raise ValueError("distillation is given without objective='distill'; give both.")
    return fit_many(
        model,
        [problem],
        position=position,
        template=template,
        solver=solver,
        tolerance=tolerance,
        max_evaluations=max_evaluations,
        learning_rate=learning_rate,
        relax_steps=relax_steps,
        callback=callback,
    )[0]


def taught_problem(problem: FitProblem, lesson: Lesson) -> FitProblem:
    """The same problem, to be fitted to a teacher (see `distillation.prepare`) instead of labels.

    Example:
        >>> taught_problem(FitProblem(split.train, 9, alpha=0.5), lesson)  # doctest: +SKIP
    """
    origin = {
        "n_train": len(problem.examples),
        **problem.provenance,
        "objective": lesson.provenance,
    }
    return replace(problem, examples=lesson.examples, weights=lesson.weights, provenance=origin)


def fit_many(
    model: Any,
    problems: Iterable[FitProblem],
    *,
    position: Position = "prompt_end",
    template: PromptTemplate = DEFAULT_TEMPLATE,
    solver: Solver = "proximal",
    tolerance: SupportsFloat = 1e-3,
    max_evaluations: SupportsIndex = 150,
    learning_rate: SupportsFloat = LEARNING_RATE,
    relax_steps: SupportsIndex = 0,
    max_memory: float = 1.0,
    callback: Callable[[Any], None] | None = None,
) -> tuple[Fit, ...]:
    """Fit many interventions as one batch; each result is that of its fit alone, to rounding.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        problems: the fits; examples that several share are run once as prompts.
        position: as in `fit`, like the rest but for `max_memory`.
        template: how inputs become prompts.
        solver: `proximal` or `adam`.
        tolerance: of stationarity.
        max_evaluations: for each problem.
        learning_rate: of `adam`, and of relaxing.
        relax_steps: steps of Adam after the penalised fits; 0 for none.
        max_memory: GiB that one chunk of rows may take above the model.
        callback: called after each evaluation with the solver's progress.

    Returns:
        One fit a problem, in order.
    """
    relax_steps = integer("relax_steps", relax_steps)
    max_evaluations = integer("max_evaluations", max_evaluations)
    if relax_steps and solver != "proximal":
        raise ValueError(
            f"relax_steps is {relax_steps} with solver={solver!r}, which leaves nothing at zero: "
            "use solver='proximal', or relax_steps=0."
        )
    batch = FitBatch(model, problems, position=position, template=template, max_memory=max_memory)
    if relax_steps:
        relaxed = batch.relaxed(
            steps=relax_steps,
            tolerance=tolerance,
            max_evaluations=max_evaluations,
            learning_rate=learning_rate,
            callback=callback,
        )
        return batch.fits(relaxed.solutions)
    return batch.fits(
        batch.solve(
            solver=solver,
            tolerance=tolerance,
            max_evaluations=max_evaluations,
            learning_rate=learning_rate,
            callback=callback,
        )
    )
