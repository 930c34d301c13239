"""Minimise a smooth loss plus a sparse group lasso, for many problems at once.

`proximal_gradient` is a proximal quasi-Newton method (Lee, Sun & Saunders, SIAM J. Optim. 2014):

    trial = argmin_z  g . (z - x) + (z - x) . (B + sigma I) (z - x) / 2 + P(z)

with `B` a sum of limited-memory BFGS matrices, one for each term of the loss (`curvature.py`). The
inner problem is solved by accelerated proximal gradient steps, which cost no evaluation of the
loss. `sigma` follows how well the model foretold the last decrease (Levenberg-Marquardt); a
refused trial still teaches `B` its curvature. `adam` is the
optimiser that papers use, kept as a reference.

Evaluations are what costs, so every problem runs its own state machine, each call evaluates one
trial of every problem that still runs, and a problem that has stopped is never passed again. The
loss need not be convex: a solution is a stationary point below its start, not a global optimum.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_laai.curvature import Curvature, model_minimiser
from tl_laai.penalties import SparseGroupLasso

Gradients: TypeAlias = Tensor | Sequence[Tensor]
ValueAndGrad = Callable[
    [Float[Tensor, "n_active n_heads d_head"], Int[Tensor, " n_active"]],
    tuple[Float[Tensor, " n_active"], Gradients],
]
"""Losses and gradients at `deltas` of the listed problems: `(deltas, problems)`.

A gradient is `[n_heads, d_head]`, so that all of them may be one tensor, or it is the gradients of
the terms that the loss is the sum of, `[n_terms, n_heads, d_head]`: curvature is then learnt term
by term.
"""

# Chosen by the number of evaluations to 1e-3 on quadratics, random networks and a language model.
_LOOK_BACK = 5  # a trial is compared with the largest of so many last objectives
_ACCEPT, _DISTRUST, _TRUST = 0.1, 0.25, 0.75  # shares of the foretold decrease
_DAMPING, _LEAST_DAMPING, _MOST_DAMPING = 4.0, 0.25, 1e8  # factor and range of sigma / scale
_NOISE = 30.0  # rounding of a loss, in units of its last digit
_ZERO = 1e-5  # zero is stationary up to rounding alone: this share of the gradient
_STEP_GROWTH = 3.0  # a trial goes at most so many times as far as the longest step so far


class Status(enum.Enum):
    """Why a problem stopped."""

    CONVERGED = "converged"
    MAX_EVALUATIONS = "max_evaluations"
    STALLED = "stalled"  # no step makes progress in floating point
    EARLY_STOPPED = "early_stopped"  # on purpose, after as many steps as were wanted
    NON_FINITE = "non_finite"  # NaN or infinity where there is nothing to fall back to


@dataclass(frozen=True)
class Record:
    """One evaluation of one problem: the trial's objective and stationarity."""

    evaluation: int
    objective: float
    stationarity: float


@dataclass(frozen=True)
class Solution:
    """Where one problem stopped, and why; `n_evaluations` counts its gradients."""

    delta: Float[Tensor, "n_heads d_head"] = field(repr=False)
    status: Status
    objective: float
    loss: float
    stationarity: float
    n_evaluations: int
    history: tuple[Record, ...] = field(repr=False)


@dataclass(frozen=True)
class Progress:
    """What a callback is told after each evaluation; `objectives` are the lowest so far."""

    evaluation: int
    n_active: int
    n_problems: int
    objectives: tuple[float, ...]


@dataclass(frozen=True)
class _Point:
    """A delta of one problem, evaluated."""

    delta: Tensor
    loss: float
    gradient: Tensor
    terms: Tensor  # gradients that sum to it, `[n_terms, n_heads, d_head]`
    objective: float
    stationarity: float
    noise: float  # differences of objectives below this are rounding

    @property
    def finite(self) -> bool:
        return math.isfinite(self.objective) and math.isfinite(self.stationarity)

    def solves(self, tolerance: float) -> bool:
        size = _norm(self.delta)
        if size == 0:  # would pass wherever gradients are small, whether heads come in or not
            return self.stationarity <= min(tolerance, _ZERO * _norm(self.gradient))
        return self.stationarity <= tolerance * max(1.0, size)


# Yields the delta to evaluate, is sent the point, and returns where it stopped and why.
_Method = Generator[Tensor, _Point, tuple[Status, _Point]]


def proximal_gradient(
    value_and_grad: ValueAndGrad,
    delta0: Float[Tensor, "n_problems n_heads d_head"],
    penalty: SparseGroupLasso,
    *,
    tolerance: float = 1e-3,
    max_evaluations: int = 150,
    callback: Callable[[Progress], None] | None = None,
) -> tuple[Solution, ...]:
    """Find stationary points of loss plus penalty, with exact zeros, from few evaluations.

    Example:
        >>> def halfway(deltas, problems):
        ...     return (deltas - 3).square().sum(dim=(1, 2)) / 2, deltas - 3
        >>> penalty = SparseGroupLasso(l1=1.0, group=0.0)
        >>> proximal_gradient(halfway, torch.zeros(1, 1, 2), penalty)[0].delta
        tensor([[2., 2.]])

    Args:
        value_and_grad: The smooth loss, bounded below, and its gradient: `(deltas, problems)` ->
            `(losses, gradients)` for the problems that still run.
        delta0: Starts, `[n_problems, n_heads, d_head]`; their dtype and device are kept.
        penalty: Weights shared by all problems, or one a problem.
        tolerance: A problem stops once `stationarity <= tolerance * max(1, ||delta||)`, at zero
            only where zero is stationary up to rounding.
        max_evaluations: Gradients that one problem may use, the start's included.
        callback: Told the `Progress` after each call of `value_and_grad`.

    Returns:
        One `Solution` a problem: the stationary point reached, otherwise the point of the lowest
        objective seen. Its objective is never above the start's. `Status.NON_FINITE` says that the
        start itself has no finite loss and gradient; later ones are stepped back from.

    Raises:
        TypeError, ValueError: An argument is of a wrong type, shape or range, or `value_and_grad`
            returns wrong shapes.
    """
    check_positive("tolerance", tolerance)
    check_positive("max_evaluations", max_evaluations)

    def method(start: Tensor, own: SparseGroupLasso) -> _Method:
        return _quasi_newton(start, own, tolerance, max_evaluations)

    return _solve(value_and_grad, delta0, penalty, method, callback)


def adam(
    value_and_grad: ValueAndGrad,
    delta0: Float[Tensor, "n_problems n_heads d_head"],
    penalty: SparseGroupLasso,
    *,
    learning_rate: float = 0.1,
    steps: int = 60,
    tolerance: float = 1e-3,
    ended: Callable[[int], bool] | None = None,
    callback: Callable[[Progress], None] | None = None,
) -> tuple[Solution, ...]:
    """Plain Adam on loss plus penalty by subgradients (Kingma & Ba 2015): no exact zeros.

    Example:
        >>> def parabola(deltas, problems):
        ...     return (deltas - 3).square().sum(dim=(1, 2)) / 2, deltas - 3
        >>> adam(parabola, torch.zeros(1, 1, 2), SparseGroupLasso(0, 0), steps=1)[0].delta
        tensor([[0.1000, 0.1000]])

    Args:
        value_and_grad: As for `proximal_gradient`.
        delta0: As for `proximal_gradient`.
        penalty: As for `proximal_gradient`.
        learning_rate: Size of a step in each entry, in units of `delta`.
        steps: Updates; one more gradient is taken at the end, to report the last iterate.
        tolerance: As for `proximal_gradient`; it only decides the status.
        ended: Asked of each problem after its evaluation whether to end it there.
        callback: As for `proximal_gradient`.

    Returns:
        One `Solution` a problem, at the last iterate: `Status.CONVERGED` if it is stationary, else
        `Status.MAX_EVALUATIONS`, or `Status.EARLY_STOPPED` where it was `ended`; or at the last
        finite iterate with `Status.NON_FINITE`.

    Raises:
        TypeError, ValueError: As for `proximal_gradient`.
    """
    check_positive("learning_rate", learning_rate)
    check_positive("steps", steps)
    check_positive("tolerance", tolerance)

    def method(start: Tensor, own: SparseGroupLasso) -> _Method:
        return _adam(start, own, learning_rate, steps, tolerance)

    return _solve(value_and_grad, delta0, penalty, method, callback, ended)


def _solve(
    value_and_grad: ValueAndGrad,
    delta0: Tensor,
    penalty: SparseGroupLasso,
    method: Callable[[Tensor, SparseGroupLasso], _Method],
    callback: Callable[[Progress], None] | None,
    ended: Callable[[int], bool] | None = None,
) -> tuple[Solution, ...]:
    """Run one `method` a problem, evaluating the trials of those that still run together."""
    _check_start(delta0)
    penalty.value(delta0)  # weights for another number of problems are refused here
    n_problems = len(delta0)
    penalties = [penalty.at(torch.tensor(i)) for i in range(n_problems)]
    methods = [method(delta0[i].detach().clone(), penalties[i]) for i in range(n_problems)]
    trials = {i: next(methods[i]) for i in range(n_problems)}
    histories: list[list[Record]] = [[] for _ in range(n_problems)]
    solutions: dict[int, Solution] = {}
    lowest = [math.inf] * n_problems
    evaluation = 0
    while trials:
        active = list(trials)
        evaluation += 1
        deltas = torch.stack([trials[i] for i in active])
        problems = torch.tensor(active, device=delta0.device)
        losses, gradients = value_and_grad(deltas.clone(), problems)
        _check_evaluation(losses, gradients, deltas)
        noise = _NOISE * max(torch.finfo(t.dtype).eps for t in (losses, gradients[0], deltas))
        for row, i in enumerate(active):
            point = _evaluated(trials[i], losses[row], gradients[row], penalties[i], noise)
            histories[i].append(Record(evaluation, point.objective, point.stationarity))
            if point.objective < lowest[i]:
                lowest[i] = point.objective
            try:
                if ended is not None and point.finite and ended(i):
                    status, end = Status.EARLY_STOPPED, point
                else:
                    trials[i] = methods[i].send(point)
                    continue
            except StopIteration as stop:
                status, end = stop.value
            del trials[i]
            solutions[i] = Solution(
                delta=end.delta,
                status=status,
                objective=end.objective,
                loss=end.loss,
                stationarity=end.stationarity,
                n_evaluations=len(histories[i]),
                history=tuple(histories[i]),
            )
        if callback is not None:
            callback(Progress(evaluation, len(trials), n_problems, tuple(lowest)))
    return tuple(solutions[i] for i in range(n_problems))


def _evaluated(
    delta: Tensor, loss: Tensor, terms: Tensor, penalty: SparseGroupLasso, noise: float
) -> _Point:
    terms = terms.detach().to(delta).reshape(-1, *delta.shape)
    gradient = terms.sum(dim=0)
    value = loss.item()
    objective = value + penalty.value(delta).item()
    stationarity = penalty.stationarity(delta, gradient).item()
    noise *= max(1.0, abs(objective))
    return _Point(delta, value, gradient, terms, objective, stationarity, noise)


def _quasi_newton(
    start: Tensor, penalty: SparseGroupLasso, tolerance: float, max_evaluations: int
) -> _Method:
    """One problem of `proximal_gradient`."""
    first = here = best = yield start
    if not first.finite:
        return Status.NON_FINITE, first
    # A loss that is zero at its lowest is brought there by a step loss / ||gradient||^2 (Polyak):
    # half of it is the first guess at the scale, about which nothing else is known.
    squared = _dot(first.gradient, first.gradient)
    scale = max(2 * squared / (abs(first.loss) or 1.0), 1e-6)
    with start.device:
        curvature = Curvature(scale, len(first.terms), start.numel())
    recent = deque([first.objective], maxlen=_LOOK_BACK)
    damping, longest = 0.0, math.inf
    evaluations = 1
    while True:
        if here.solves(tolerance) and here.objective <= first.objective:
            return Status.CONVERGED, here
        if evaluations >= max_evaluations:
            return Status.MAX_EVALUATIONS, best
        ridge = damping * curvature.scale
        delta = model_minimiser(here.delta, here.gradient, curvature, ridge, penalty).to(here.delta)
        excess = _norm(delta - here.delta) / (_STEP_GROWTH * longest)
        if excess > 1:
            delta = here.delta + (delta - here.delta) / excess
        step = delta.double() - here.delta.double()
        shed = penalty.value(here.delta).item() - penalty.value(delta).item()
        bend = _dot(step, curvature.times(step)) + ridge * _dot(step, step)
        # At its exact minimiser the model is lower by bend / 2 at least, which survives rounding.
        foretold = max(shed - _dot(here.gradient, step) - bend / 2, bend / 2)
        if not (foretold > 0 and damping < _MOST_DAMPING):
            return Status.STALLED, best
        trial = yield delta
        evaluations += 1
        decrease = allowance = -math.inf
        if trial.finite:
            best = min(best, trial, key=lambda point: point.objective)
            turn = trial.gradient.double() - here.gradient.double()
            curvature.learn(step, trial.terms.double() - here.terms.double())
            decrease, allowance = here.objective - trial.objective, max(recent) - here.objective
            if foretold <= here.noise and abs(decrease) <= 10 * here.noise:
                # The objectives differ by rounding alone: integrate the gradient along the step.
                decrease, allowance = foretold + (bend - _dot(turn, step)) / 2, 0.0
        if decrease + allowance >= _ACCEPT * foretold:
            here, longest = trial, _norm(step) if math.isinf(longest) else max(longest, _norm(step))
            recent.append(here.objective)
        if decrease > _TRUST * foretold:
            damping = damping / _DAMPING if damping > 1e-2 else 0.0
        elif decrease < _DISTRUST * foretold:
            damping = max(_DAMPING * damping, _LEAST_DAMPING)


def _adam(
    start: Tensor, penalty: SparseGroupLasso, learning_rate: float, steps: int, tolerance: float
) -> _Method:
    """One problem of `adam`, with the constants of the paper."""
    first, second = torch.zeros_like(start), torch.zeros_like(start)
    here = previous = yield start
    for k in range(1, steps + 1):
        if not here.finite:
            return Status.NON_FINITE, previous
        with torch.enable_grad():
            delta = here.delta.clone().requires_grad_()
            (subgradient,) = torch.autograd.grad(penalty.value(delta), delta)
        gradient = here.gradient + subgradient
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        scale = (second / (1 - 0.999**k)).sqrt() + 1e-8
        previous = here
        here = yield here.delta - learning_rate * (first / (1 - 0.9**k)) / scale
    if not here.finite:
        return Status.NON_FINITE, previous
    return (Status.CONVERGED if here.solves(tolerance) else Status.MAX_EVALUATIONS), here


def _dot(first: Tensor, second: Tensor) -> float:
    return torch.dot(first.double().flatten(), second.double().flatten()).item()


def _norm(values: Tensor) -> float:
    return math.sqrt(_dot(values, values))


def check_positive(name: str, value: float | int) -> None:
    """Refuse what is no finite number above zero, in the words of `name`."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}; give a finite number above 0.")


def _check_start(delta0: Tensor) -> None:
    if not delta0.is_floating_point():
        raise TypeError(f"delta0 has dtype {delta0.dtype}; give floating-point numbers.")
    if delta0.dim() != 3:
        raise ValueError(
            f"delta0 has shape {list(delta0.shape)}; give [n_problems, n_heads, d_head]: a single "
            "problem is delta0[None]."
        )
    if not bool(delta0.isfinite().all()):
        raise ValueError("delta0 holds NaN or infinity; start from finite numbers, such as zeros.")


def _check_evaluation(losses: Tensor, gradients: Gradients, deltas: Tensor) -> None:
    shapes = [list(gradient.shape[-2:]) for gradient in gradients]
    wanted = [list(deltas.shape[1:])] * len(deltas)
    if losses.shape != deltas.shape[:1] or shapes != wanted:
        given = list(gradients.shape) if isinstance(gradients, Tensor) else shapes[:3]
        raise ValueError(
            f"value_and_grad returned losses of shape {list(losses.shape)} and gradients of shape "
            f"{given} for deltas of shape {list(deltas.shape)}; it must return one loss a delta, "
            "and gradients shaped like the deltas, or each like the terms of one delta."
        )
