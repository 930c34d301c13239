"""Curvature against dense matrices, one a term; its model's minimiser against plain steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tl_laai.curvature import Curvature, model_minimiser
from tl_laai.penalties import SparseGroupLasso

N_TERMS, SHAPE, SIZE = 3, (2, 5), 10


def dense(curvature: Curvature) -> Tensor:
    """The whole matrix."""
    columns = [curvature.times(e.view(SHAPE)).flatten() for e in torch.eye(SIZE).double()]
    return torch.stack(columns, dim=1)


def learnt(n_pairs: int) -> tuple[Curvature, Tensor, Tensor]:
    """A curvature after some pairs of a random convex quadratic; the last step and its turns."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(N_TERMS, SIZE, SIZE, generator=generator, dtype=torch.float64)
    hessians = draw @ draw.mT + torch.eye(SIZE, dtype=torch.float64)
    curvature = Curvature(1.0, N_TERMS, SIZE)
    for _ in range(n_pairs):
        step = torch.randn(SIZE, generator=generator, dtype=torch.float64)
        curvature.learn(step.view(SHAPE), (hessians @ step).view(N_TERMS, *SHAPE))
    return curvature, step, hessians @ step


def test_the_matrix_is_positive_and_symmetric_and_its_largest_eigenvalue_is_found() -> None:
    for n_pairs in (1, 3, 8):
        curvature = learnt(n_pairs)[0]
        matrix = dense(curvature)
        torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-10)
        values = torch.linalg.eigvalsh(matrix)
        assert values[0] > 0
        assert 0.95 * values[-1] <= curvature.largest <= 1.11 * values[-1]  # a little below: 1.3 %


def test_the_last_turn_is_reproduced_and_is_the_sum_of_its_terms() -> None:
    curvature, step, turns = learnt(4)
    image = curvature.times(step.view(SHAPE)).flatten()
    torch.testing.assert_close(image, turns.sum(dim=0), rtol=1e-9, atol=1e-9)


def test_terms_that_bend_downwards_keep_a_fifth_of_their_curvature() -> None:
    curvature, _, _ = learnt(4)
    step = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
    before = step @ dense(curvature) @ step
    curvature.learn(step.view(SHAPE), -step.expand(N_TERMS, -1).view(N_TERMS, *SHAPE))
    torch.testing.assert_close(step @ dense(curvature) @ step, before / 5, rtol=1e-9, atol=0)


def test_a_loss_that_never_bends_is_learnt_without_an_end() -> None:
    curvature = Curvature(1.0, N_TERMS, SIZE)
    step = torch.ones(SHAPE, dtype=torch.float64)
    for _ in range(500):
        curvature.learn(step, torch.zeros(N_TERMS, *SHAPE, dtype=torch.float64))
    assert curvature.times(step).isfinite().all()


def test_steps_to_and_fro_do_not_hide_the_largest_eigenvalue() -> None:
    values = torch.linspace(1, 10, SIZE, dtype=torch.float64)
    curvature = Curvature(1.0, 1, SIZE)
    first = torch.eye(SIZE, dtype=torch.float64)
    for step in (first[0], -first[0], first[-1], first[0]):
        curvature.learn(step.view(SHAPE), (values * step).view(1, *SHAPE))
    assert abs(curvature.largest - 1.1 * 10) < 0.1


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


def ill_conditioned() -> tuple[Curvature, Tensor, SparseGroupLasso]:
    """Eigenvalues from 0.1 to 20, all learnt, and a gradient that hardly meets the largest."""
    values = torch.logspace(-1, 1.3, SIZE, dtype=torch.float64)
    curvature = Curvature(1.0, 1, SIZE)
    for step in torch.eye(SIZE, dtype=torch.float64):
        curvature.learn(step.view(SHAPE), (values * step).view(1, *SHAPE))
    return curvature, (0.5 / values).view(SHAPE), SparseGroupLasso(0.01, 0.05)


def dense_and_sparse() -> tuple[Curvature, Tensor, SparseGroupLasso]:
    gradient = torch.linspace(-2, 2, SIZE, dtype=torch.float64).view(SHAPE)
    return learnt(6)[0], gradient, SparseGroupLasso(0.05, 0.5)


@pytest.mark.parametrize("model", [ill_conditioned, dense_and_sparse])
@pytest.mark.parametrize(("share", "ridge"), [(1.0, 0.0), (0.005, 0.0), (1.0, 3.0)])
def test_the_models_minimiser_is_that_of_many_plain_steps(
    model: Callable[[], tuple[Curvature, Tensor, SparseGroupLasso]], share: float, ridge: float
) -> None:
    curvature, gradient, penalty = model()
    curvature.largest *= share  # too small an eigenvalue is found out on the way
    origin = torch.full(SHAPE, 0.3, dtype=torch.float64)
    got = model_minimiser(origin, gradient, curvature, ridge, penalty)
    whole = dense(curvature) + ridge * torch.eye(SIZE, dtype=torch.float64)
    size, slow = 1 / float(torch.linalg.eigvalsh(whole)[-1]), origin
    for _ in range(5_000):
        slope = gradient + (whole @ (slow - origin).flatten()).view(SHAPE)
        slow = penalty.prox(slow - size * slope, size)

    def value(z: Tensor) -> float:
        away = (z - origin).flatten()
        return float(gradient.flatten() @ away + away @ whole @ away / 2 + penalty.value(z))

    # It stops at a hundredth of its first step: near the optimum, and never above the start.
    assert value(slow) <= value(got) + 1e-12
    gap = (value(got) - value(slow)) / (value(origin) - value(slow))
    assert gap < 3e-4, gap  # at most 1e-4 was seen
