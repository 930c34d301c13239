"""Solvers: known optima, batches against one problem at a time, safeguards, exact zeros."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tl_laai.penalties import SparseGroupLasso
from tl_laai.solvers import Progress, Solution, Status, ValueAndGrad, adam, proximal_gradient

HEADS, WIDTH = 4, 8


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> ValueAndGrad:
    def value_and_grad(deltas: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        deltas = deltas.detach().requires_grad_()
        losses = loss(deltas, problems)
        (gradients,) = torch.autograd.grad(losses.sum(), deltas)
        return losses.detach(), gradients

    return value_and_grad


def quadratics(
    n: int, condition: float, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[ValueAndGrad, Tensor]:
    """Convex, turned at random, with eigenvalues from 1 down to 1 / condition."""
    size = HEADS * WIDTH
    turn = torch.linalg.qr(
        torch.randn(n, size, size, generator=generator(seed), dtype=torch.float64)
    ).Q
    matrix = (turn * torch.logspace(0, -math.log10(condition), size, dtype=torch.float64)) @ turn.mT
    slope = torch.randn(n, size, generator=generator(seed + 1), dtype=torch.float64)

    def loss(deltas: Tensor, problems: Tensor) -> Tensor:
        flat = deltas.flatten(1)
        a, b = matrix[problems].to(flat), slope[problems].to(flat)
        return 0.5 * torch.einsum("ni,nij,nj->n", flat, a, flat) + (b * flat).sum(1)

    return with_gradient(loss), torch.zeros(n, HEADS, WIDTH, dtype=dtype)


def logistic(n: int, seed: int = 0) -> tuple[ValueAndGrad, Tensor]:
    features = torch.randn(n, 30, HEADS * WIDTH, generator=generator(seed), dtype=torch.float64)
    labels = torch.randint(0, 2, (n, 30), generator=generator(seed + 1)) * 2.0 - 1

    def loss(deltas: Tensor, problems: Tensor) -> Tensor:
        margins = torch.einsum("nsi,ni->ns", features[problems].to(deltas), deltas.flatten(1))
        ridge = 0.05 * deltas.square().sum(dim=(1, 2)) / 2
        return torch.nn.functional.softplus(-labels[problems].to(deltas) * margins).mean(1) + ridge

    return with_gradient(loss), torch.zeros(n, HEADS, WIDTH, dtype=torch.float64)


def networks(
    n: int, seed: int = 0, dtype: torch.dtype = torch.float32, d_head: int = WIDTH
) -> tuple[ValueAndGrad, Tensor]:
    """Cross-entropy of ten samples under a frozen network with a vector added: not convex."""
    draw = generator(seed)
    size, width, vocabulary, samples = HEADS * d_head, 48, 60, 10

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    entry = normal(size, width) / size**0.5
    layers = [normal(width, width) / width**0.5 for _ in range(3)]
    unembed = 4 * normal(width, vocabulary) / width**0.5
    inputs = normal(n, samples, width)
    targets = torch.randint(0, vocabulary, (n, samples), generator=draw)

    def loss(deltas: Tensor, problems: Tensor) -> Tensor:
        hidden = inputs[problems] + (deltas.flatten(1) @ entry)[:, None]
        for layer in layers:
            scale = (hidden.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            hidden = hidden + torch.tanh(hidden * scale @ layer)
        scale = (hidden.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        logs = torch.log_softmax(hidden * scale @ unembed, dim=-1)
        return -logs.gather(-1, targets[problems][..., None])[..., 0].mean(1)

    return with_gradient(loss), torch.zeros(n, HEADS, d_head, dtype=dtype)


def gradient_at(value_and_grad: ValueAndGrad, deltas: Tensor) -> tuple[Tensor, Tensor]:
    return value_and_grad(deltas, torch.arange(len(deltas)))


def slow_ista(
    value_and_grad: ValueAndGrad, start: Tensor, penalty: SparseGroupLasso, lipschitz: float
) -> Tensor:
    """Plain proximal gradient with the known step, run until it no longer moves."""
    deltas = start
    for _ in range(5_000):
        _, gradient = gradient_at(value_and_grad, deltas)
        moved = penalty.prox(deltas - gradient / lipschitz, 1 / lipschitz)
        if float((moved - deltas).abs().max()) < 1e-9:
            return moved
        deltas = moved
    raise RuntimeError("the reference did not converge")


def objectives(value_and_grad: ValueAndGrad, deltas: Tensor, penalty: SparseGroupLasso) -> Tensor:
    return gradient_at(value_and_grad, deltas)[0].double() + penalty.value(deltas)


def deltas_of(solutions: tuple[Solution, ...]) -> Tensor:
    return torch.stack([solution.delta for solution in solutions])


@pytest.mark.parametrize(
    "penalty",
    [
        SparseGroupLasso(0.0, 0.0),
        SparseGroupLasso(0.5, 0.0),
        SparseGroupLasso(0.0, 2.0),
        SparseGroupLasso(0.2, 1.5),
    ],
)
def test_convex_problems_reach_the_optimum_of_the_slow_method(penalty: SparseGroupLasso) -> None:
    value_and_grad, start = quadratics(2, condition=30.0)
    found = proximal_gradient(value_and_grad, start, penalty, tolerance=1e-9)
    assert {solution.status for solution in found} == {Status.CONVERGED}
    slow = slow_ista(value_and_grad, start, penalty, lipschitz=1.0)
    torch.testing.assert_close(deltas_of(found), slow, atol=1e-6, rtol=0)
    assert torch.equal(deltas_of(found) == 0, slow == 0)


def test_a_quadratic_without_penalty_reaches_the_solution_of_its_equations() -> None:
    value_and_grad, start = quadratics(2, condition=100.0)
    found = deltas_of(
        proximal_gradient(value_and_grad, start, SparseGroupLasso(0.0, 0.0), tolerance=1e-9)
    )
    _, slope = gradient_at(value_and_grad, start)
    units = torch.eye(start[0].numel(), dtype=start.dtype).reshape(-1, HEADS, WIDTH)
    for i in range(2):
        problem = torch.full((len(units),), i)
        matrix = (value_and_grad(units, problem)[1] - slope[i]).flatten(1)
        exact = torch.linalg.solve(matrix, -slope[i].flatten()).reshape(HEADS, WIDTH)
        torch.testing.assert_close(found[i], exact, atol=1e-5, rtol=1e-6)


def test_logistic_regression_reaches_the_optimum_of_the_slow_method() -> None:
    value_and_grad, start = logistic(2)
    _, gradient = gradient_at(value_and_grad, start)
    ratio = 0.2
    lambda_max = SparseGroupLasso(ratio, 1.0).lambda_max(gradient)
    penalty = SparseGroupLasso.from_ratio(0.3 * lambda_max, ratio)
    found = proximal_gradient(value_and_grad, start, penalty, tolerance=1e-8)
    slow = slow_ista(value_and_grad, start, penalty, lipschitz=2.0)
    torch.testing.assert_close(deltas_of(found), slow, atol=1e-5, rtol=0)


@pytest.mark.parametrize("condition", [1e3, 1e5])
def test_ill_conditioned_problems_converge_within_the_default_budget(condition: float) -> None:
    value_and_grad, start = quadratics(4, condition)
    _, gradient = gradient_at(value_and_grad, start)
    lambda_max = SparseGroupLasso(0.1, 1.0).lambda_max(gradient)
    penalty = SparseGroupLasso.from_ratio(
        lambda_max * torch.tensor([0.0, 0.01, 0.1, 0.5], dtype=torch.float64), 0.1
    )
    found = proximal_gradient(value_and_grad, start, penalty)
    assert [solution.status for solution in found] == [Status.CONVERGED] * 4


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.95])
def test_networks_in_float32_converge_within_the_default_budget(fraction: float) -> None:
    value_and_grad, start = networks(6)
    _, gradient = gradient_at(value_and_grad, start)
    lambda_max = SparseGroupLasso(0.0, 1.0).lambda_max(gradient)
    penalty = SparseGroupLasso(0.0, fraction * lambda_max)
    found = proximal_gradient(value_and_grad, start, penalty)
    assert sum(solution.status is Status.CONVERGED for solution in found) >= 5
    deltas = deltas_of(found)
    assert deltas.dtype == torch.float32
    losses, gradients = gradient_at(value_and_grad, deltas)
    for i, solution in enumerate(found):
        # What is reported is what an independent evaluation of the delta gives.
        assert solution.loss == pytest.approx(losses[i].item(), rel=1e-5)
        residual = penalty.at(torch.tensor(i)).stationarity(deltas[i], gradients[i]).item()
        assert solution.stationarity == pytest.approx(residual, rel=1e-2, abs=1e-5)
        if solution.status is Status.CONVERGED:
            assert residual <= 1.02e-3 * max(1.0, deltas[i].norm().item())


def test_a_lower_objective_is_found_than_by_as_many_plain_proximal_steps() -> None:
    value_and_grad, start = networks(4, dtype=torch.float64)
    _, gradient = gradient_at(value_and_grad, start)
    penalty = SparseGroupLasso(0.0, 0.3 * SparseGroupLasso(0.0, 1.0).lambda_max(gradient))
    found = proximal_gradient(value_and_grad, start, penalty)
    deltas = start
    for _ in range(max(solution.n_evaluations for solution in found)):
        deltas = penalty.prox(deltas - gradient_at(value_and_grad, deltas)[1], 1.0)
    plain = objectives(value_and_grad, deltas, penalty)
    assert all(s.objective <= p + 1e-3 for s, p in zip(found, plain.tolist(), strict=True))


def test_above_lambda_max_zero_is_returned_after_one_evaluation() -> None:
    value_and_grad, start = networks(3)
    _, gradient = gradient_at(value_and_grad, start)
    lambda_max = SparseGroupLasso(0.1, 1.0).lambda_max(gradient)
    for solution in proximal_gradient(
        value_and_grad, start, SparseGroupLasso.from_ratio(lambda_max, 0.1)
    ):
        assert solution.status is Status.CONVERGED
        assert solution.n_evaluations == 1
        assert not bool(solution.delta.any())


def test_whole_heads_are_exactly_zero_near_lambda_max() -> None:
    value_and_grad, start = networks(4)
    _, gradient = gradient_at(value_and_grad, start)
    penalty = SparseGroupLasso(0.0, 0.95 * SparseGroupLasso(0.0, 1.0).lambda_max(gradient))
    for solution in proximal_gradient(value_and_grad, start, penalty):
        living = solution.delta.ne(0).any(dim=-1)
        assert 1 <= int(living.sum()) < HEADS


@pytest.mark.parametrize("fraction", [0.0, 0.9, 0.99])
def test_small_gradients_do_not_pass_for_a_solution_at_zero(fraction: float) -> None:
    """As where a layer writes little: the same networks, moved a ten-thousandth as far."""
    value_and_grad, start = networks(3)

    def weak(deltas: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        losses, gradients = value_and_grad(1e-4 * deltas, problems)
        return losses, 1e-4 * gradients

    _, gradient = gradient_at(weak, start)
    largest = SparseGroupLasso(0.0, 1.0).lambda_max(gradient)
    assert float(largest.max()) < 1e-3  # so that zero is stationary to the tolerance
    found = proximal_gradient(weak, start, SparseGroupLasso(0.0, fraction * largest))
    for solution in found:
        assert solution.status is Status.CONVERGED
        assert solution.objective < solution.history[0].objective
        living = solution.delta.ne(0).any(dim=-1)
        assert 1 <= int(living.sum()) <= (HEADS if fraction == 0 else 2)


@pytest.mark.parametrize("solver", [proximal_gradient, adam])
def test_a_batch_is_its_problems_one_by_one(solver: Callable[..., tuple[Solution, ...]]) -> None:
    value_and_grad, start = networks(4, dtype=torch.float64)
    penalty = SparseGroupLasso(
        torch.tensor([0.0, 0.01, 0.0, 0.05]).double(), torch.tensor([0.3, 0.1, 0.0, 0.2]).double()
    )
    together = solver(value_and_grad, start, penalty)
    for i, solution in enumerate(together):
        one = torch.tensor([i])

        def alone(deltas: Tensor, problems: Tensor, one: Tensor = one) -> tuple[Tensor, Tensor]:
            return value_and_grad(deltas, one[problems])

        (single,) = solver(alone, start[i : i + 1], penalty.at(one))
        assert single.status is solution.status
        assert abs(single.n_evaluations - solution.n_evaluations) <= 2
        torch.testing.assert_close(single.delta, solution.delta, atol=1e-5, rtol=1e-5)


def test_a_problem_that_has_stopped_is_never_evaluated_again() -> None:
    value_and_grad, start = networks(5)
    penalty = SparseGroupLasso(0.0, torch.tensor([9.0, 0.5, 0.3, 0.1, 0.0]))
    calls: list[list[int]] = []

    def counting(deltas: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        assert len(deltas) == len(problems)
        calls.append(problems.tolist())
        return value_and_grad(deltas, problems)

    found = proximal_gradient(counting, start, penalty)
    for i, solution in enumerate(found):
        # Problem i is in the first n_evaluations calls and in no later one.
        expected = [number < solution.n_evaluations for number in range(len(calls))]
        assert [i in call for call in calls] == expected
        assert [record.evaluation for record in solution.history] == list(
            range(1, solution.n_evaluations + 1)
        )
    assert len({solution.n_evaluations for solution in found}) > 1


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    fraction=st.floats(0, 2),
    ratio=st.floats(0, 1),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    budget=st.integers(1, 25),
)
def test_the_objective_never_ends_above_its_start(
    seed: int, fraction: float, ratio: float, spread: float, scale: float, budget: int
) -> None:
    value_and_grad, zeros = networks(2, seed=seed, dtype=torch.float64)

    def scaled(deltas: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        losses, gradients = value_and_grad(deltas, problems)
        waves = (3 * deltas).sin().sum(dim=(1, 2)) / 3
        return scale * (losses + waves), scale * (gradients + (3 * deltas).cos())

    start = spread * torch.randn(zeros.shape, generator=generator(seed), dtype=zeros.dtype)
    _, gradient = gradient_at(scaled, zeros)
    lambda_ = fraction * SparseGroupLasso(ratio, 1.0).lambda_max(gradient)
    penalty = SparseGroupLasso.from_ratio(lambda_, ratio)
    found = proximal_gradient(scaled, start, penalty, max_evaluations=budget)
    before = objectives(scaled, start, penalty)
    after = objectives(scaled, deltas_of(found), penalty)
    for i, solution in enumerate(found):
        assert solution.n_evaluations <= budget
        assert solution.objective <= solution.history[0].objective
        assert solution.objective == pytest.approx(after[i].item(), rel=1e-9, abs=1e-9)
        assert after[i].item() <= before[i].item() * (1 + 1e-12) + 1e-9
        if solution.status is not Status.CONVERGED:
            lowest = min(record.objective for record in solution.history)
            assert solution.objective == lowest


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000))
def test_noise_of_float32_size_does_not_stop_the_descent(seed: int) -> None:
    """A loss rounded to 1e-6 of its size, as a large model's is."""
    value_and_grad, start = networks(2, seed=seed)
    noise = generator(seed)

    def noisy(deltas: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        losses, gradients = value_and_grad(deltas, problems)
        shake = 1 + 1e-6 * torch.randn(losses.shape, generator=noise)
        return losses * shake, gradients * (
            1 + 1e-6 * torch.randn(gradients.shape, generator=noise)
        )

    _, gradient = gradient_at(value_and_grad, start)
    penalty = SparseGroupLasso(0.0, 0.5 * SparseGroupLasso(0.0, 1.0).lambda_max(gradient))
    for solution in proximal_gradient(noisy, start, penalty, tolerance=1e-3):
        assert solution.status is Status.CONVERGED


def test_an_unreachable_tolerance_in_float32_ends_with_a_status() -> None:
    value_and_grad, start = networks(2)
    found = proximal_gradient(
        value_and_grad, start, SparseGroupLasso(0.0, 0.1), tolerance=1e-12, max_evaluations=200
    )
    for solution in found:
        assert solution.status in (Status.STALLED, Status.MAX_EVALUATIONS)
        assert solution.stationarity < 1e-2


def test_a_linear_loss_is_carried_to_where_the_penalty_holds_it() -> None:
    """No curvature to learn at all: the steps must grow until sharp walls are met."""

    def trough(deltas: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        over = (deltas.abs() - 50).clamp_min(0)
        losses = (-deltas + 10 * over.square()).sum(dim=(1, 2))
        return losses, -1 + 20 * over * deltas.sign()

    (solution,) = proximal_gradient(trough, torch.zeros(1, 2, 3), SparseGroupLasso(0.2, 0.0))
    assert solution.status is Status.CONVERGED
    assert solution.n_evaluations < 40
    torch.testing.assert_close(solution.delta, torch.full((2, 3), 50.04), atol=0.05, rtol=0)


def test_a_gradient_that_points_uphill_ends_as_stalled_at_the_start() -> None:
    def lying(deltas: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        return deltas.square().sum(dim=(1, 2)), -2 * deltas

    start = torch.ones(1, 2, 3)
    (solution,) = proximal_gradient(lying, start, SparseGroupLasso(0.0, 0.0))
    assert solution.status is Status.STALLED
    assert torch.equal(solution.delta, start[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_trials_that_are_not_finite_are_stepped_back_from(bad: float, where: str) -> None:
    """A loss that exists only inside a ball, with its minimiser just inside."""
    target = torch.full((1, 2, 3), 1.0)

    def fenced(deltas: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        losses, gradients = 50 * (deltas - target).square().sum(dim=(1, 2)), 100 * (deltas - target)
        outside = deltas.flatten(1).norm(dim=1) > 2.5
        if where == "loss":
            return torch.where(outside, bad, losses), gradients
        return losses, torch.where(outside[:, None, None], bad, gradients)

    # The first guess of a step is half of what would reach a loss of zero; a flat floor under the
    # loss makes it overshoot the ball.
    def raised(deltas: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        losses, gradients = fenced(deltas, problems)
        return losses + 5000.0, gradients

    (solution,) = proximal_gradient(raised, torch.zeros(1, 2, 3), SparseGroupLasso(0.0, 0.0))
    assert any(not math.isfinite(r.objective + r.stationarity) for r in solution.history)
    assert solution.status is Status.CONVERGED
    torch.testing.assert_close(solution.delta, target[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("solver", [proximal_gradient, adam])
def test_a_start_that_is_not_finite_stops_its_own_problem_only(
    solver: Callable[..., tuple[Solution, ...]],
) -> None:
    value_and_grad, start = networks(3)

    def broken(deltas: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        losses, gradients = value_and_grad(deltas, problems)
        return torch.where(problems == 1, math.nan, losses), gradients

    found = solver(broken, start, SparseGroupLasso(0.0, 0.1))
    assert found[1].status is Status.NON_FINITE
    assert found[1].n_evaluations == 1
    assert torch.equal(found[1].delta, start[1])
    assert all(found[i].status is not Status.NON_FINITE for i in (0, 2))


def test_starting_at_the_solution_costs_one_evaluation() -> None:
    value_and_grad, start = quadratics(2, condition=10.0)
    penalty = SparseGroupLasso(0.1, 0.3)
    found = proximal_gradient(value_and_grad, start, penalty, tolerance=1e-5)
    again = proximal_gradient(value_and_grad, deltas_of(found), penalty, tolerance=1e-5)
    assert [solution.n_evaluations for solution in again] == [1, 1]
    assert torch.equal(deltas_of(again), deltas_of(found))


def test_the_callers_tensors_are_left_as_they_were() -> None:
    value_and_grad, start = networks(2)
    start = start + 0.5
    kept = start.clone()

    def scribbling(deltas: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        losses, gradients = value_and_grad(deltas, problems)
        deltas.fill_(7.0)
        return losses, gradients

    clean = proximal_gradient(value_and_grad, start, SparseGroupLasso(0.0, 0.1))
    scribbled = proximal_gradient(scribbling, start, SparseGroupLasso(0.0, 0.1))
    assert torch.equal(start, kept)
    assert torch.equal(deltas_of(scribbled), deltas_of(clean))


def test_adam_is_torchs_adam_on_the_penalised_loss() -> None:
    value_and_grad, start = networks(2, dtype=torch.float64)
    start = start + torch.randn(start.shape, generator=generator(0), dtype=start.dtype)
    penalty = SparseGroupLasso(0.02, 0.1)
    deltas = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([deltas], lr=0.1)
    for _ in range(30):
        optimiser.zero_grad()
        penalty.value(deltas).sum().backward()
        assert deltas.grad is not None
        deltas.grad += gradient_at(value_and_grad, deltas.detach())[1]
        optimiser.step()
    found = adam(value_and_grad, start, penalty, learning_rate=0.1, steps=30)
    torch.testing.assert_close(deltas_of(found), deltas.detach(), atol=1e-9, rtol=1e-9)
    expected = objectives(value_and_grad, deltas.detach(), penalty).tolist()
    for solution, objective in zip(found, expected, strict=True):
        assert solution.n_evaluations == 31
        assert solution.status is Status.MAX_EVALUATIONS
        assert solution.objective == pytest.approx(objective)


def test_adam_says_converged_when_its_last_iterate_is_stationary() -> None:
    def parabola(deltas: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        return (deltas - 3).square().sum(dim=(1, 2)) / 2, deltas - 3

    none = SparseGroupLasso(0.0, 0.0)
    (solution,) = adam(parabola, torch.zeros(1, 2, 2), none, steps=2000)
    assert solution.status is Status.CONVERGED
    torch.testing.assert_close(solution.delta, torch.full((2, 2), 3.0), atol=1e-2, rtol=0)


def test_adam_returns_the_last_finite_iterate() -> None:
    def cliff(deltas: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        losses = torch.where(deltas[:, 0, 0] > 0.25, math.inf, -deltas.sum(dim=(1, 2)))
        return losses, -torch.ones_like(deltas)

    (solution,) = adam(cliff, torch.zeros(1, 1, 1), SparseGroupLasso(0.0, 0.0))
    assert solution.status is Status.NON_FINITE
    assert solution.delta.item() == pytest.approx(0.2)
    assert math.isfinite(solution.objective)


@pytest.mark.parametrize("solver", [proximal_gradient, adam])
def test_the_callback_follows_the_evaluations(
    solver: Callable[..., tuple[Solution, ...]],
) -> None:
    value_and_grad, start = networks(3)
    told: list[Progress] = []
    found = solver(
        value_and_grad,
        start,
        SparseGroupLasso(0.0, torch.tensor([0.0, 0.2, 9.0])),
        callback=told.append,
    )
    assert [p.evaluation for p in told] == list(range(1, len(told) + 1))
    assert len(told) == max(solution.n_evaluations for solution in found)
    assert told[-1].n_active == 0
    assert {p.n_problems for p in told} == {3}
    lowest = tuple(min(record.objective for record in s.history) for s in found)
    assert told[-1].objectives == lowest


def test_no_problems_have_no_solutions() -> None:
    value_and_grad, _ = networks(1)
    assert proximal_gradient(value_and_grad, torch.zeros(0, 2, 3), SparseGroupLasso(0, 0)) == ()


def test_a_solution_cannot_be_changed() -> None:
    value_and_grad, start = networks(1)
    (solution,) = adam(value_and_grad, start, SparseGroupLasso(0.0, 0.0), steps=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        solution.loss = 0.0


@pytest.mark.parametrize("solver", [proximal_gradient, adam])
@pytest.mark.parametrize(
    ("start", "options", "error", "message"),
    [
        (torch.zeros(2, 3), {}, ValueError, r"delta0 has shape \[2, 3\].*delta0\[None\]"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), {}, TypeError, r"delta0 has dtype torch\.int64"),
        (torch.full((1, 2, 3), math.nan), {}, ValueError, "delta0 holds NaN or infinity"),
        (torch.zeros(1, 2, 3), {"tolerance": 0.0}, ValueError, r"tolerance is 0\.0"),
        (torch.zeros(1, 2, 3), {"tolerance": math.nan}, ValueError, "tolerance is nan"),
        (torch.zeros(3, 2, 3), {}, ValueError, "for 1 problems"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    solver: Callable[..., tuple[Solution, ...]],
    start: Tensor,
    options: dict[str, float],
    error: type[Exception],
    message: str,
) -> None:
    def parabola(deltas: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        return deltas.square().sum(dim=(1, 2)), 2 * deltas

    with pytest.raises(error, match=f"(?s){message}"):
        solver(parabola, start, SparseGroupLasso(torch.ones(1), 0.0), **options)


def test_budgets_and_step_sizes_must_be_positive() -> None:
    value_and_grad, start = networks(1)
    none = SparseGroupLasso(0.0, 0.0)
    with pytest.raises(ValueError, match="max_evaluations is 0"):
        proximal_gradient(value_and_grad, start, none, max_evaluations=0)
    with pytest.raises(ValueError, match="steps is 0"):
        adam(value_and_grad, start, none, steps=0)
    with pytest.raises(ValueError, match=r"learning_rate is -1\.0"):
        adam(value_and_grad, start, none, learning_rate=-1.0)


def test_losses_and_gradients_of_wrong_shapes_are_refused() -> None:
    def summed(deltas: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        return deltas.square().sum()[None], 2 * deltas

    with pytest.raises(ValueError, match=r"losses of shape \[1\].*one loss a delta"):
        proximal_gradient(summed, torch.zeros(2, 2, 3), SparseGroupLasso(0.0, 0.0))
