"""The relaxed lasso: what a penalty left non-zero is fitted again, briefly and without penalty.

A penalty does two things at once, it chooses and it shrinks. Here the penalised fit only chooses
(Meinshausen, Comput. Stat. Data Anal. 2007): entries that it left at zero stay there, and the
others start again from zero by Adam, stopped after few steps, before they have learnt the examples
by heart. The second stage is ours, not the paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_laai.penalties import SparseGroupLasso
from tl_laai.solvers import Gradients, Progress, Solution, Status, ValueAndGrad, adam

LEARNING_RATE = 0.1


@dataclass(frozen=True)
class Relaxed:
    """What a relaxed fit went through.

    Attributes:
        solutions: one a problem, at the last step, or where it was not followed further:
            `Status.EARLY_STOPPED`; or `NON_FINITE` where Adam diverged, at the last finite step.
        iterates: number of steps -> deltas of all problems then, `[n_problems, n_heads, d_head]`;
            NaN of one that had ended before.
    """

    solutions: tuple[Solution, ...]
    iterates: Mapping[int, Tensor]


def relax(
    value_and_grad: ValueAndGrad,
    support: Bool[Tensor, "n_problems n_heads d_head"],
    *,
    dtype: torch.dtype,
    steps: int,
    at: Collection[int] = (),
    learning_rate: float = LEARNING_RATE,
    follow: Callable[[int, Tensor], Tensor] | None = None,
    callback: Callable[[Progress], None] | None = None,
) -> Relaxed:
    """Adam from zero on the entries of a support; all others stay exactly zero.

    Example:
        >>> def parabola(deltas, problems):
        ...     return (deltas - 3).square().sum(dim=(1, 2)) / 2, deltas - 3
        >>> support = torch.tensor([[[True, False]]])
        >>> relax(parabola, support, dtype=torch.float32, steps=2).solutions[0].delta
        tensor([[0.1999, 0.0000]])

    Args:
        value_and_grad: as for `solvers.proximal_gradient`.
        support: entries that may change.
        dtype: of the deltas.
        steps: of Adam.
        at: numbers of steps whose deltas are wanted too, 1 to `steps`.
        learning_rate: of Adam, in units of delta.
        follow: asked at each of `at` below `steps`, with that number and the deltas of all problems
            then, which of them go on, `[n_problems]`; the others end there.
        callback: as for `solvers.adam`.
    """
    out = [k for k in at if not 1 <= k <= steps]
    if out:
        raise ValueError(f"at holds {out}; give numbers of steps from 1 to steps={steps}.")
    # What stays of a problem that has ended before: without a finite loss, or not followed.
    lost = torch.full(support.shape, torch.nan, dtype=dtype, device=support.device)
    iterates = dict.fromkeys(sorted(at), lost)
    done = -1  # the start is evaluated first, after no step
    dropped: set[int] = set()

    def masked(
        deltas: Float[Tensor, "n_active n_heads d_head"], problems: Int[Tensor, " n_active"]
    ) -> tuple[Tensor, Gradients]:
        nonlocal done
        done += 1
        if done in at:
            iterates[done] = lost.index_copy(0, problems, deltas)
            if follow is not None and done < steps:
                dropped.update((~follow(done, iterates[done])).nonzero().flatten().tolist())
        losses, gradients = value_and_grad(deltas, problems)
        return losses, [own * support[p] for own, p in zip(gradients, problems, strict=True)]

    start = torch.zeros(support.shape, dtype=dtype, device=support.device)
    none = SparseGroupLasso(0.0, 0.0)
    solutions = adam(
        masked, start, none, learning_rate=learning_rate, steps=steps,
        ended=dropped.__contains__, callback=callback,
    )  # fmt: skip
    stopped = (
        solution
        if solution.status is Status.NON_FINITE
        else replace(solution, status=Status.EARLY_STOPPED)
        for solution in solutions
    )
    return Relaxed(tuple(stopped), iterates)
