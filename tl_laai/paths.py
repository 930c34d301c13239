"""Regularisation paths: fits from `lambda_max` down and back up, with warm starts.

The loss is not convex, so the path walked down from zero and the one walked up from the weak
end can differ; at each point the one with the better objective is kept. All paths of a call
(several layers, seeds or tasks) move as one batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_laai.batches import Fit, FitBatch, FitProblem
from tl_laai.hooking import Position
from tl_laai.prompts import DEFAULT_TEMPLATE, PromptTemplate
from tl_laai.solvers import Solution
from tl_laai.tasks import Example


@dataclass(frozen=True)
class PathPoint:
    """One penalty weight of a path.

    Attributes:
        alpha: the group weight as a share of `lambda_max`.
        fit: the better of the two directions.
        direction: which one it is.
        objectives: final objective by direction, `{"down": ..., "up": ...}`.
    """

    alpha: float
    fit: Fit
    direction: Literal["down", "up"]
    objectives: dict[str, float]


@dataclass(frozen=True)
class Path:
    """Fits at one layer along decreasing penalties.

    Attributes:
        points: from the strongest penalty to the weakest.
        lambda_max: smallest group weight at which Delta = 0 is stationary.
        entry_order: heads in the order in which they become non-zero, strongest penalty first;
            heads that enter at the same point are ordered by norm. Heads that never enter are
            left out.
    """

    points: tuple[PathPoint, ...]
    lambda_max: float
    entry_order: tuple[int, ...]

    @property
    def norms(self) -> Float[Tensor, "n_points n_heads"]:
        """Each head's norm at each point."""
        deltas = [next(iter(p.fit.intervention.deltas.values())) for p in self.points]
        return torch.stack([delta.norm(dim=-1) for delta in deltas])


def fit_path(
    model: Any,
    examples: Sequence[Example],
    *,
    layer: int,
    alphas: Sequence[float] | None = None,
    n_lambdas: int = 10,
    ratio: float = 0.05,
    l1_ratio: float = 0.0,
    position: Position = "prompt_end",
    template: PromptTemplate = DEFAULT_TEMPLATE,
    tolerance: float = 1e-3,
    max_evaluations: int = 150,
    callback: Callable[[Any], None] | None = None,
) -> Path:
    """Fit one layer along a path of penalties.

    Example:
        >>> path = fit_path(model, split.train, layer=9, n_lambdas=8)  # doctest: +SKIP
        >>> path.entry_order  # doctest: +SKIP
        (1, 3, 0, 2)

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        examples: about ten input-output pairs.
        layer: the edited layer.
        alphas: group weights as shares of `lambda_max`; None for `n_lambdas` of them, evenly
            spaced on a log scale from 1 down to `ratio`.
        n_lambdas: number of points where `alphas` is None.
        ratio: the weakest share where `alphas` is None.
        l1_ratio: the l1 weight as a multiple of the group weight.
        position: where Delta is added.
        template: how inputs become prompts.
        tolerance: of stationarity, at each point.
        max_evaluations: at each point and direction.
        callback: called after each evaluation with the solver's progress.

    Returns:
        The path.

    Raises:
        ValueError: a bad grid of penalties, or what `fit` raises.
    """
    return fit_paths(
        model,
        [FitProblem(examples, layer)],
        alphas=alphas,
        n_lambdas=n_lambdas,
        ratio=ratio,
        l1_ratio=l1_ratio,
        position=position,
        template=template,
        tolerance=tolerance,
        max_evaluations=max_evaluations,
        callback=callback,
    )[0]


def fit_paths(
    model: Any,
    problems: Sequence[FitProblem],
    *,
    alphas: Sequence[float] | None = None,
    n_lambdas: int = 10,
    ratio: float = 0.05,
    l1_ratio: float = 0.0,
    position: Position = "prompt_end",
    template: PromptTemplate = DEFAULT_TEMPLATE,
    tolerance: float = 1e-3,
    max_evaluations: int = 150,
    max_memory: float = 1.0,
    callback: Callable[[Any], None] | None = None,
) -> tuple[Path, ...]:
    """Walk the paths of many problems together; one path a problem, in order.

    The problems' examples, their weights, layers and provenance are used, their penalties and
    starts are not: a path starts from zero. `max_memory` is how many GiB one chunk of rows may
    take above the model; all else is as in `fit_path`.
    """
    shares = _shares(alphas, n_lambdas, ratio)
    bases = [replace(p, penalty=None, alpha=1.0, l1_ratio=l1_ratio, start=None) for p in problems]
    batch = FitBatch(model, bases, position=position, template=template, max_memory=max_memory)

    def walk(order: Sequence[float], start: Tensor) -> dict[float, tuple[Solution, ...]]:
        found = {}
        for share in order:
            found[share] = batch.solve(
                start=start,
                penalty=batch.penalty.scaled(share),
                tolerance=tolerance,
                max_evaluations=max_evaluations,
                callback=callback,
            )
            start = torch.stack([s.delta for s in found[share]])
        return found

    down = walk(shares, batch.zero)
    weakest = torch.stack([s.delta for s in down[shares[-1]]])
    up = walk(shares[::-1], weakest)

    points: list[list[PathPoint]] = [[] for _ in problems]
    for share in shares:
        pairs = list(zip(down[share], up[share], strict=True))
        best = [b if b.objective < a.objective else a for a, b in pairs]
        fits = batch.fits(best, batch.penalty.scaled(share))
        for own, (a, b), chosen, fit in zip(points, pairs, best, fits, strict=True):
            direction: Literal["down", "up"] = "down" if chosen is a else "up"
            own.append(PathPoint(share, fit, direction, {"down": a.objective, "up": b.objective}))
    return tuple(
        Path(tuple(own), batch.lambda_max[i], _entry_order(own)) for i, own in enumerate(points)
    )


def _shares(alphas: Sequence[float] | None, n_lambdas: int, ratio: float) -> list[float]:
    if alphas is None:
        if not isinstance(n_lambdas, int) or n_lambdas < 2:
            raise ValueError(f"n_lambdas is {n_lambdas!r}; a path needs at least 2 points.")
        if not 0 < ratio < 1:
            raise ValueError(f"ratio is {ratio!r}; give the weakest share, between 0 and 1.")
        return [ratio ** (i / (n_lambdas - 1)) for i in range(n_lambdas)]
    shares = sorted(set(map(float, alphas)), reverse=True)
    if not shares or not all(math.isfinite(share) and share >= 0 for share in shares):
        raise ValueError(f"alphas is {alphas!r}; give at least one share of lambda_max, 0 or more.")
    return shares


def _entry_order(points: Sequence[PathPoint]) -> tuple[int, ...]:
    order: list[int] = []
    for point in points:
        order += [h.head for h in point.fit.intervention.heads() if h.head not in order]
    return tuple(order)
