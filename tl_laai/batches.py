"""Many fits on one engine: what a fit is given, what it gives, and the batch that makes it.

A fit minimises, over Delta of one layer,

    mean loss of the examples(Delta) + l1 * ||Delta||_1 + group * sum_h ||Delta_h||_2

from Delta = 0 (task-driven layerwise additive activation intervention, NAACL 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, SupportsFloat, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from tl_laai.artifacts import library_versions
from tl_laai.backends import own_modes
from tl_laai.engine import Engine
from tl_laai.fingerprints import fingerprint
from tl_laai.hooking import Position
from tl_laai.interventions import Intervention, json_provenance
from tl_laai.penalties import SparseGroupLasso
from tl_laai.problems import FitExample, engine_for
from tl_laai.prompts import DEFAULT_TEMPLATE, PromptTemplate
from tl_laai.relaxation import LEARNING_RATE, Relaxed, relax
from tl_laai.solvers import Progress, Solution, Status, adam, proximal_gradient
from tl_laai.splits import integer, number
from tl_laai.tasks import check_examples

Solver = Literal["proximal", "adam"]

_NON_FINITE = (
    "layer={}: the loss or its gradient is not finite at the start of the fit. Use a wider dtype "
    "(float32), or examples that the model can score."
)


class NonFiniteError(ValueError, ArithmeticError):
    """A loss or gradient is NaN or infinite where a fit starts."""


@dataclass(frozen=True)
class FitProblem:
    """One fit of a batch.

    Attributes:
        examples: what Delta is fitted on: input-output pairs, inputs with a teacher's
            distributions (`tl_laai.distillation`), or opinion questions.
        layer: the edited layer.
        penalty: absolute weights; None for no penalty.
        alpha: instead of `penalty`: the group weight as a share of `lambda_max`, the smallest
            weight at which Delta = 0 is stationary.
        l1_ratio: with `alpha`: the l1 weight as a multiple of the group weight.
        start: Delta to start from, `[n_heads, d_head]`; None for zero.
        provenance: what the caller knows (task, split, seed), kept with the intervention.
        weights: of the examples in the loss, divided by their sum; None for all alike.

    Raises:
        TypeError: a layer that is no integer (NumPy's will do), provenance that is no JSON, a
            whole task, or what else is not of its type.
    """

    examples: Sequence[FitExample]
    layer: int
    penalty: SparseGroupLasso | None = None
    alpha: float | None = None
    l1_ratio: float = 0.0
    start: Float[Tensor, "n_heads d_head"] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        # The intervention would refuse both, but only once the fit is done.
        check_examples("examples", self.examples)
        object.__setattr__(self, "layer", integer("layer", self.layer))
        json_provenance(self.provenance)
        if self.penalty is not None and not isinstance(self.penalty, SparseGroupLasso):
            raise TypeError(
                f"penalty is {self.penalty!r}; give SparseGroupLasso(l1=..., group=...), or a "
                "share of lambda_max as alpha"
            )
        for name in ("alpha", "l1_ratio"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, number(name, value))


@dataclass(frozen=True)
class Fit:
    """A fitted intervention and how its fit went.

    Attributes:
        intervention: the result, ready to apply or save.
        solution: the solver's solution, with its status.
        penalty: the absolute weights used.
        lambda_max: smallest group weight (in the penalty's own l1 ratio; smallest l1 weight for
            a pure l1 penalty) at which Delta = 0 is stationary.
        layer: the edited layer.
    """

    intervention: Intervention
    solution: Solution
    penalty: SparseGroupLasso
    lambda_max: float
    layer: int


class FitBatch:
    """Many fits on one engine: prompts frozen once, solved as often as one likes.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        problems: the fits.
        position: where Delta is added.
        template: how inputs become prompts.
        max_memory: as in `engine_for`.
    """

    @own_modes()
    def __init__(
        self,
        model: Any,
        problems: Iterable[FitProblem],
        *,
        position: Position = "prompt_end",
        template: PromptTemplate = DEFAULT_TEMPLATE,
        max_memory: float = 1.0,
    ) -> None:
        problems = tuple(problems)
        if not problems:
            raise ValueError("problems is empty: give at least one FitProblem.")
        for problem in problems:
            _check_problem(problem)
        self.model, self.problems = model, problems
        self.position, self.template = position, template
        self.engine = engine_for(
            model,
            [problem.examples for problem in problems],
            layers=[problem.layer for problem in problems],
            weights=[[1.0] * len(p.examples) if p.weights is None else p.weights for p in problems],
            position=position,
            template=template,
            max_memory=max_memory,
        )
        backend = self.engine.prompts.backend
        shape = (len(problems), backend.n_heads, backend.d_head)
        # What solvers do between evaluations is small, and reads numbers back all the time: it
        # stays on the CPU wherever the model stands.
        self.zero = torch.zeros(shape, dtype=_state_dtype(backend.dtype))
        self.everyone = torch.arange(len(problems))
        self.penalty, self.lambda_max = _penalties(self.engine, problems, self.zero, self.everyone)
        self._settings: dict[str, Any] = {}

    @own_modes()
    def solve(
        self,
        *,
        start: Float[Tensor, "n_problems n_heads d_head"] | None = None,
        penalty: SparseGroupLasso | None = None,
        solver: Solver = "proximal",
        tolerance: SupportsFloat = 1e-3,
        max_evaluations: SupportsIndex = 150,
        learning_rate: SupportsFloat = LEARNING_RATE,
        callback: Callable[[Any], None] | None = None,
    ) -> tuple[Solution, ...]:
        """Solve all problems, from each problem's own start and penalty unless others are given.

        Raises:
            ValueError: an unknown solver, or a loss that is not finite at the start.
        """
        # Settings are kept as JSON.
        tolerance, learning_rate = float(tolerance), float(learning_rate)
        max_evaluations = integer("max_evaluations", max_evaluations)
        if solver not in ("proximal", "adam"):
            raise ValueError(f"solver is {solver!r}; use 'proximal' or 'adam'.")
        if start is None:
            start = self.zero.clone()
            for i, problem in enumerate(self.problems):
                if problem.start is not None:
                    if problem.start.shape != start.shape[1:]:
                        raise ValueError(
                            f"start has shape {list(problem.start.shape)}; this model needs "
                            f"{list(start.shape[1:])}, [n_heads, d_head]."
                        )
                    start[i] = problem.start.to(start)
        own = self.penalty if penalty is None else penalty
        self._settings = {
            "solver": solver,
            "tolerance": tolerance,
            "max_evaluations": max_evaluations,
        }
        if solver == "adam":
            self._settings["learning_rate"] = learning_rate
            solutions = adam(
                self.engine.value_and_grad,
                start,
                own,
                learning_rate=learning_rate,
                steps=max_evaluations,
                tolerance=tolerance,
                callback=callback,
            )
        else:
            solutions = proximal_gradient(
                self.engine.value_and_terms,
                start,
                own,
                tolerance=tolerance,
                max_evaluations=max_evaluations,
                callback=callback,
            )
        self._check_finite(solutions)
        return solutions

    @own_modes()
    def relaxed(
        self,
        *,
        steps: SupportsIndex,
        at: Collection[int] = (),
        tolerance: SupportsFloat = 1e-3,
        max_evaluations: SupportsIndex = 150,
        learning_rate: SupportsFloat = LEARNING_RATE,
        follow: Callable[[int, Tensor], Tensor] | None = None,
        callback: Callable[[Any], None] | None = None,
    ) -> Relaxed:
        """Let each problem's penalty choose entries, then fit those by Adam without it.

        Args:
            steps: of Adam.
            at: numbers of steps whose deltas are wanted too.
            tolerance: of the penalised fits, which only problems with a penalty need.
            max_evaluations: of the penalised fits.
            learning_rate: of Adam.
            follow: which problems go on, as for `relax`.
            callback: called after each evaluation of either stage.

        Raises:
            ValueError: a problem has a start of its own: a relaxed fit starts from zero.
        """
        # Settings are kept as JSON.
        tolerance, learning_rate = float(tolerance), float(learning_rate)
        steps = integer("relax_steps", steps)
        max_evaluations = integer("max_evaluations", max_evaluations)
        if any(problem.start is not None for problem in self.problems):
            raise ValueError("start is given: a relaxed fit starts from zero, so leave it out.")
        weights = torch.as_tensor(self.penalty.l1 + self.penalty.group)
        penalised = weights.nonzero().flatten().to(self.everyone)
        support = torch.ones_like(self.zero, dtype=torch.bool)
        chosen: tuple[Solution, ...] = ()
        if len(penalised):
            chosen = proximal_gradient(
                lambda deltas, problems: self.engine.value_and_terms(deltas, penalised[problems]),
                self.zero[penalised],
                self.penalty.at(penalised.cpu()),
                tolerance=tolerance,
                max_evaluations=max_evaluations,
                callback=callback,
            )
            support[penalised] = torch.stack([solution.delta for solution in chosen]) != 0
        found = relax(
            self.engine.value_and_grad,
            support,
            dtype=self.zero.dtype,
            steps=steps,
            at=at,
            learning_rate=learning_rate,
            follow=follow,
            callback=None if callback is None else _later(callback, chosen),
        )
        self._settings = {
            "solver": "proximal",
            "tolerance": tolerance,
            "max_evaluations": max_evaluations,
            "relax_steps": steps,
            "learning_rate": learning_rate,
        }
        solutions = list(found.solutions)
        for i, first in zip(penalised.tolist(), chosen, strict=True):
            solutions[i] = _after(first, solutions[i])
        self._check_finite(solutions)
        return replace(found, solutions=tuple(solutions))

    def _check_finite(self, solutions: Sequence[Solution]) -> None:
        """Refuse what is not finite at its start; where Adam diverged later, its status says so."""
        for problem, solution in zip(self.problems, solutions, strict=True):
            if solution.status is Status.NON_FINITE and solution.n_evaluations == 1:
                raise NonFiniteError(_NON_FINITE.format(problem.layer))

    @own_modes()
    def fits(
        self, solutions: Sequence[Solution], penalty: SparseGroupLasso | None = None
    ) -> tuple[Fit, ...]:
        """Solutions as fits: interventions with fingerprint and provenance."""
        used = self.penalty if penalty is None else penalty
        mark = fingerprint(self.model)
        versions = library_versions()
        fits = []
        for i, (problem, solution) in enumerate(zip(self.problems, solutions, strict=True)):
            own = SparseGroupLasso(*(float(_at(w, i)) for w in (used.l1, used.group)))
            provenance = {
                "n_train": len(problem.examples),
                **problem.provenance,
                **_said(problem),
                "layer": problem.layer,
                "template": asdict(self.template),
                "penalty": {
                    "l1": own.l1,
                    "group": own.group,
                    "lambda_max": self.lambda_max[i],
                },
                "solver": self._settings,
                "solution": {
                    "status": solution.status.value,
                    "objective": solution.objective,
                    "loss": solution.loss,
                    "stationarity": solution.stationarity,
                    "n_evaluations": solution.n_evaluations,
                },
                "versions": versions,
            }
            intervention = Intervention(
                {problem.layer: solution.delta.cpu()}, self.position, mark, provenance
            )
            fits.append(Fit(intervention, solution, own, self.lambda_max[i], problem.layer))
        return tuple(fits)


def _check_problem(problem: FitProblem) -> None:
    if not problem.examples:
        raise ValueError("examples is empty: a fit needs at least one input-output pair.")
    if problem.alpha is not None:
        if problem.penalty is not None:
            raise ValueError("penalty and alpha are both given: use one of them.")
        if not 0 <= problem.alpha < float("inf"):
            raise ValueError(f"alpha is {problem.alpha}; give a share of lambda_max, 0 or more.")
    elif problem.l1_ratio:
        raise ValueError(
            f"l1_ratio is {problem.l1_ratio} without alpha; give alpha too, or absolute weights "
            "as penalty=SparseGroupLasso(l1=..., group=...)."
        )


def _said(problem: FitProblem) -> dict[str, Any]:
    """What a problem says beyond its examples, for whoever would repeat the fit."""
    said: dict[str, Any] = {}
    # Those of distilled fits follow from what is told of the distillation.
    if problem.weights is not None and "objective" not in problem.provenance:
        said["weights"] = [float(weight) for weight in problem.weights]
    if problem.start is not None and bool(problem.start.any()):
        said["start"] = {"norm": float(problem.start.norm())}
    return said


def _penalties(
    engine: Engine, problems: Sequence[FitProblem], zero: Tensor, everyone: Tensor
) -> tuple[SparseGroupLasso, list[float]]:
    """Absolute weights of all problems as one penalty, and each problem's lambda_max."""
    losses, gradient = engine.value_and_grad(zero, everyone)
    finite = losses.isfinite() & gradient.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        raise NonFiniteError(_NON_FINITE.format(problems[int((~finite).nonzero()[0])].layer))
    gradient = gradient.cpu().double()
    l1, group, lambda_max = [], [], []
    for problem, own in zip(problems, gradient, strict=True):
        if problem.alpha is not None:
            ratio = SparseGroupLasso.from_ratio(1.0, problem.l1_ratio)
            lambda_max.append(float(ratio.lambda_max(own)))
            group.append(problem.alpha * lambda_max[-1])
            l1.append(problem.l1_ratio * group[-1])
        else:
            penalty = problem.penalty or SparseGroupLasso(0.0, 0.0)
            is_free = float(penalty.l1) == 0 and float(penalty.group) == 0
            shape = SparseGroupLasso(0.0, 1.0) if is_free else penalty
            lambda_max.append(float(shape.lambda_max(own)))
            l1.append(float(penalty.l1))
            group.append(float(penalty.group))
    # In float64: a weight is recorded as it was given, and lambda_max is not rounded down.
    weights = [torch.tensor(w, dtype=torch.float64) for w in (l1, group)]
    return SparseGroupLasso(*weights), lambda_max


def _later(
    callback: Callable[[Progress], None], before: Sequence[Solution]
) -> Callable[[Progress], None]:
    """The callback of a second stage, whose evaluations go on from those of the first."""
    first = max((solution.n_evaluations for solution in before), default=0)
    return lambda state: callback(replace(state, evaluation=state.evaluation + first))


def _after(first: Solution, second: Solution) -> Solution:
    """The second stage's solution, with the evaluations of both."""
    later = (replace(r, evaluation=r.evaluation + first.n_evaluations) for r in second.history)
    return replace(
        second,
        n_evaluations=first.n_evaluations + second.n_evaluations,
        history=(*first.history, *later),
    )


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Deltas, losses and stopping tests are float32 even where weights are bfloat16."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _at(weight: float | Tensor, i: int) -> float | Tensor:
    return weight[i] if isinstance(weight, Tensor) else weight
