"""Curvature against dense matrices, one a term; its model's minimiser against plain steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tl_laai.curvature import Curvature, model_minimiser
from tl_laai.penalties import SparseGroupLasso

N_TERMS, SHAPE, SIZE = 3, (2, 5), 10


def learnt(n_pairs: int) -> tuple[Curvature, Tensor]:
    """A curvature after some pairs of a random convex quadratic, and its whole matrix."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(N_TERMS, SIZE, SIZE, generator=generator, dtype=torch.float64)
    hessians = draw @ draw.mT + torch.eye(SIZE, dtype=torch.float64)
    curvature = Curvature(1.0, N_TERMS, SIZE)
    for _ in range(n_pairs):
        step = torch.randn(SIZE, generator=generator, dtype=torch.float64)
        curvature.learn(step.view(SHAPE), (hessians @ step).view(N_TERMS, *SHAPE))
        curvature.last = step, hessians @ step  # type: ignore[attr-defined]  # for the test alone
    columns = [curvature.times(e.view(SHAPE)).flatten() for e in torch.eye(SIZE).double()]
    return curvature, torch.stack(columns, dim=1)


def test_the_matrix_is_positive_and_symmetric_and_its_largest_eigenvalue_is_found() -> None:
    for n_pairs in (1, 3, 8):
        curvature, matrix = learnt(n_pairs)
        torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-10)
        values = torch.linalg.eigvalsh(matrix)
        assert values[0] > 0
        assert 0.95 * values[-1] <= curvature.largest <= 1.11 * values[-1]  # a little below: 1.3 %


def test_the_last_turn_is_reproduced_and_is_the_sum_of_its_terms() -> None:
    curvature, matrix = learnt(4)
    step, turns = curvature.last  # type: ignore[attr-defined]  # set above
    torch.testing.assert_close(matrix @ step, turns.sum(dim=0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n_pairs", [4, 75])
def test_one_term_is_the_bfgs_matrix_of_the_textbook(n_pairs: int) -> None:
    generator = torch.Generator().manual_seed(1)
    draw = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    hessian = draw @ draw.T + torch.eye(SIZE, dtype=torch.float64)
    steps = torch.randn(n_pairs, SIZE, generator=generator, dtype=torch.float64)
    curvature = Curvature(1.0, 1, SIZE)
    for s in steps:
        curvature.learn(s.view(SHAPE), (hessian @ s).view(1, *SHAPE))
    steps = steps[-30:]  # all that is remembered, here thrice as many as there are dimensions
    last = steps[-1]
    expected = (last @ hessian @ last) / (last @ last) * torch.eye(SIZE, dtype=torch.float64)
    for s in steps:
        y, image = hessian @ s, expected @ s
        expected = expected - torch.outer(image, image) / (s @ image) + torch.outer(y, y) / (s @ y)
    for e in torch.eye(SIZE).double():
        got = curvature.times(e.view(SHAPE)).flatten()
        torch.testing.assert_close(got, expected @ e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("share", [1.0, 0.05])
def test_the_models_minimiser_is_that_of_many_plain_steps(share: float) -> None:
    curvature, matrix = learnt(6)
    curvature.largest *= share  # too small an eigenvalue is found out on the way
    penalty = SparseGroupLasso(0.05, 0.5)
    gradient = torch.linspace(-2, 2, SIZE, dtype=torch.float64).view(SHAPE)
    origin = torch.full(SHAPE, 0.3, dtype=torch.float64)
    got = model_minimiser(origin, gradient, curvature, 0.1, penalty)
    whole = matrix + 0.1 * torch.eye(SIZE, dtype=torch.float64)
    size, slow = 1 / float(torch.linalg.eigvalsh(whole)[-1]), origin
    for _ in range(20_000):
        slope = gradient + (whole @ (slow - origin).flatten()).view(SHAPE)
        slow = penalty.prox(slow - size * slope, size)

    def value(z: Tensor) -> float:
        away = (z - origin).flatten()
        quadratic = gradient.flatten() @ away + away @ whole @ away / 2
        return float(quadratic + penalty.value(z))

    # It stops at a hundredth of its first step: near the optimum, and never above the start.
    assert value(slow) <= value(got) + 1e-12
    assert value(got) - value(slow) < 0.05 * (value(origin) - value(slow))
