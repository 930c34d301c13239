"""Penalties against slow, obviously right twins."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_laai.penalties import SparseGroupLasso

PENALTIES = [
    SparseGroupLasso(0.0, 0.0),
    SparseGroupLasso(0.4, 0.0),
    SparseGroupLasso(0.0, 0.9),
    SparseGroupLasso(0.3, 0.7),
    SparseGroupLasso(0.02, 1.5),
]
weights = st.floats(0, 3, allow_subnormal=False)
seeds = st.integers(0, 2**31)
steps = st.floats(1e-3, 10)


def random_tensor(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slow_value(delta: torch.Tensor, l1: float, group: float) -> float:
    total = 0.0
    for head in delta.tolist():
        total += l1 * sum(abs(entry) for entry in head)
        total += group * math.sqrt(sum(entry * entry for entry in head))
    return total


def slow_prox(point: torch.Tensor, l1: float, group: float, step: float) -> torch.Tensor:
    """Minimise ||x - point||^2 / 2 + step * P(x) by coordinate search from many-scaled moves."""

    def objective(x: torch.Tensor) -> float:
        return 0.5 * float((x - point).square().sum()) + step * slow_value(x, l1, group)

    best, best_value = min(
        ((start, objective(start)) for start in (point.clone(), torch.zeros_like(point))),
        key=lambda pair: pair[1],
    )
    reach = 1.0
    while reach > 1e-7:
        improved = False
        for index in range(point.numel()):
            for sign in (1.0, -1.0):
                trial = best.clone()
                trial.view(-1)[index] += sign * reach
                # A move through zero stops at zero, where the objective has its kink.
                snapped = trial.clone()
                snapped.view(-1)[index] = 0.0
                for candidate in (trial, snapped):
                    value = objective(candidate)
                    if value < best_value:
                        best, best_value, improved = candidate, value, True
        if not improved:
            reach /= 2
    return best


def slow_threshold(head: torch.Tensor, ratio: float) -> float:
    """The root of ||soft(head, ratio * lambda)|| = lambda by bisection in Python floats."""
    sizes = [abs(entry) for entry in head.tolist()]

    def leaves_zero(lambda_: float) -> bool:
        return math.sqrt(sum(max(s - ratio * lambda_, 0.0) ** 2 for s in sizes)) > lambda_

    low, high = 0.0, math.sqrt(sum(s * s for s in sizes)) + 1e-300
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if leaves_zero(middle) else (low, middle)
    return high


@pytest.mark.parametrize("penalty", PENALTIES)
def test_value_is_the_sum_written_out(penalty: SparseGroupLasso) -> None:
    delta = random_tensor(0, 3, 5)
    assert penalty.value(delta).item() == pytest.approx(
        slow_value(delta, penalty.l1, penalty.group), rel=1e-13
    )


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("seed", [0, 1])
def test_prox_is_the_minimiser_found_by_search(penalty: SparseGroupLasso, seed: int) -> None:
    point = random_tensor(seed, 2, 2)
    found = slow_prox(point, penalty.l1, penalty.group, 0.8)
    torch.testing.assert_close(penalty.prox(point, 0.8), found, atol=1e-4, rtol=0)


@settings(deadline=None, max_examples=50)
@given(seeds, weights, weights, steps)
def test_no_perturbation_does_better_than_the_prox(
    seed: int, l1: float, group: float, step: float
) -> None:
    penalty, point = SparseGroupLasso(l1, group), random_tensor(seed, 3, 4)
    prox = penalty.prox(point, step)

    def objective(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * (x - point).square().sum(dim=(-2, -1)) + step * penalty.value(x)

    for reach in (1.0, 1e-1, 1e-2, 1e-3):
        trials = prox + reach * random_tensor(seed + 1, 64, 3, 4)
        # Strong convexity: any other point is worse by half its squared distance.
        worse = 0.5 * (trials - prox).square().sum(dim=(-2, -1))
        assert bool((objective(trials) >= objective(prox) + worse - 1e-12 * (1 + step)).all())


@settings(deadline=None, max_examples=50)
@given(seeds, weights, weights, steps)
def test_prox_is_firmly_nonexpansive(seed: int, l1: float, group: float, step: float) -> None:
    penalty = SparseGroupLasso(l1, group)
    x, y = random_tensor(seed, 2, 3, 4)
    moved = penalty.prox(x, step) - penalty.prox(y, step)
    assert float(moved.square().sum()) <= float((moved * (x - y)).sum()) + 1e-12


@settings(deadline=None, max_examples=50)
@given(seeds, weights, weights, steps)
def test_what_the_prox_removes_is_a_subgradient_there(
    seed: int, l1: float, group: float, step: float
) -> None:
    """Moreau: x = prox + step * s, and s supports P at prox."""
    penalty, x = SparseGroupLasso(l1, group), random_tensor(seed, 3, 4)
    prox = penalty.prox(x, step)
    support = (x - prox) / step
    others = prox + 2 * random_tensor(seed + 1, 32, 3, 4)
    linear = penalty.value(prox) + (support * (others - prox)).sum(dim=(-2, -1))
    assert bool((penalty.value(others) >= linear - 1e-9).all())


def test_whole_heads_become_exactly_zero() -> None:
    delta = torch.tensor([[3.0, 4.0], [0.3, -0.2]])
    prox = SparseGroupLasso(0.0, 1.0).prox(delta, 0.5)
    assert torch.equal(prox[1], torch.zeros(2))
    assert not bool(torch.signbit(prox[1]).any())
    torch.testing.assert_close(prox[0], torch.tensor([2.7, 3.6]))


def test_single_entries_become_exactly_zero() -> None:
    prox = SparseGroupLasso(1.0, 0.0).prox(torch.tensor([[3.0, -0.5, -2.0]]), 1.0)
    assert torch.equal(prox, torch.tensor([[2.0, 0.0, -1.0]]))


def test_prox_without_weights_or_step_changes_nothing() -> None:
    delta = random_tensor(0, 2, 3, dtype=torch.float32)
    assert torch.equal(SparseGroupLasso(0.0, 0.0).prox(delta, 5.0), delta)
    assert torch.equal(SparseGroupLasso(1.0, 1.0).prox(delta, 0.0), delta)
    assert not bool(SparseGroupLasso(1.0, 1.0).prox(torch.zeros(2, 3), 1.0).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prox_keeps_the_dtype(dtype: torch.dtype) -> None:
    assert SparseGroupLasso(0.1, 0.1).prox(random_tensor(0, 2, 3, dtype=dtype), 1).dtype == dtype


def test_stationarity_is_zero_exactly_at_the_minimiser() -> None:
    """For F = ||delta - point||^2 / 2 the minimiser of F + P is the prox."""
    penalty, point = SparseGroupLasso(0.3, 0.5), random_tensor(0, 3, 4)
    solution = penalty.prox(point, 1.0)
    assert penalty.stationarity(solution, solution - point).item() < 1e-15
    away = solution + 0.01
    # F's curvature is one, so that the residual is the distance itself.
    expected = (away - solution).norm().item()
    assert penalty.stationarity(away, away - point).item() == pytest.approx(expected, rel=1e-9)


@settings(deadline=None, max_examples=50)
@given(
    seeds,
    st.floats(0, 100, allow_subnormal=False),
    st.integers(1, 40),
    st.sampled_from([1e-8, 1.0, 1e6]),
)
def test_head_thresholds_are_the_roots_found_by_bisection(
    seed: int, ratio: float, d_head: int, scale: float
) -> None:
    gradient = scale * random_tensor(seed, 3, d_head)
    thresholds = SparseGroupLasso(l1=ratio, group=1.0).head_thresholds(gradient)
    for head, threshold in zip(gradient, thresholds.tolist(), strict=True):
        assert threshold == pytest.approx(slow_threshold(head, ratio), rel=1e-12)


@settings(deadline=None, max_examples=50)
@given(seeds, st.floats(0, 20), st.sampled_from([torch.float32, torch.float64]))
def test_zero_is_stationary_at_lambda_max_and_not_below(
    seed: int, ratio: float, dtype: torch.dtype
) -> None:
    gradient = random_tensor(seed, 4, 16, dtype=dtype)
    lambda_max = SparseGroupLasso(l1=ratio, group=1.0).lambda_max(gradient).item()
    assert not bool(SparseGroupLasso.from_ratio(lambda_max, ratio).prox(-gradient, 1.0).any())
    below = SparseGroupLasso.from_ratio(lambda_max * (1 - 1e-6), ratio)
    assert bool(below.prox(-gradient, 1.0).any())
    zero = torch.zeros_like(gradient)
    assert below.stationarity(zero, gradient).item() > 0


def test_thresholds_of_a_pure_group_are_norms_and_of_a_pure_l1_are_largest_entries() -> None:
    gradient = random_tensor(3, 4, 7)
    pure_group = SparseGroupLasso(0.0, 3.0).head_thresholds(gradient)
    torch.testing.assert_close(pure_group, gradient.norm(dim=-1), rtol=1e-12, atol=0)
    pure_l1 = SparseGroupLasso(3.0, 0.0)
    assert torch.equal(pure_l1.head_thresholds(gradient), gradient.abs().amax(dim=-1))
    at_max = SparseGroupLasso(pure_l1.lambda_max(gradient), 0.0)
    assert not bool(at_max.prox(-gradient, 1.0).any())


def test_thresholds_of_a_zero_gradient_are_zero() -> None:
    for penalty in PENALTIES[1:]:
        assert torch.equal(penalty.head_thresholds(torch.zeros(2, 3)), torch.zeros(2).double())


def test_many_problems_at_once_are_the_problems_one_by_one() -> None:
    l1 = torch.tensor([0.0, 0.2, 0.5], dtype=torch.float64)
    group = torch.tensor([0.7, 0.1, 0.0], dtype=torch.float64)
    step = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    delta, gradient = random_tensor(0, 3, 4, 5), random_tensor(1, 3, 4, 5)
    many = SparseGroupLasso(l1, group)
    for i in range(3):
        one = SparseGroupLasso(l1[i].item(), group[i].item())
        assert many.at(torch.tensor(i)) == one
        assert torch.equal(many.value(delta)[i], one.value(delta[i]))
        assert torch.equal(many.prox(delta, step)[i], one.prox(delta[i], step[i].item()))
        assert torch.equal(
            many.stationarity(delta, gradient)[i], one.stationarity(delta[i], gradient[i])
        )
        assert torch.equal(many.head_thresholds(gradient)[i], one.head_thresholds(gradient[i]))
        assert torch.equal(many.lambda_max(gradient)[i], one.lambda_max(gradient[i]))


def test_more_batch_axes_in_front_are_allowed() -> None:
    delta = random_tensor(0, 2, 3, 4, 5)
    many = SparseGroupLasso(torch.tensor([0.1, 0.2, 0.3]), 0.4)
    assert many.value(delta).shape == (2, 3)
    assert torch.equal(many.prox(delta, 1.0)[1], many.prox(delta[1], 1.0))
    assert many.lambda_max(delta).shape == (2, 3)


def test_scaled_multiplies_both_weights_and_at_selects_problems() -> None:
    assert SparseGroupLasso(1.0, 2.0).scaled(0.5) == SparseGroupLasso(0.5, 1.0)
    factor = torch.tensor([1.0, 2.0, 3.0])
    many = SparseGroupLasso(1.0, 2.0).scaled(factor)
    assert many == SparseGroupLasso(factor, 2 * factor)
    assert many.at(torch.tensor([2, 0])) == SparseGroupLasso(
        torch.tensor([3.0, 1.0]), torch.tensor([6.0, 2.0])
    )
    assert SparseGroupLasso(1.0, factor).at(torch.tensor([1])).l1 == 1.0
    assert SparseGroupLasso.from_ratio(factor, 0.5) == SparseGroupLasso(0.5 * factor, factor)
    assert many != SparseGroupLasso(1.0, 2.0)


def test_value_has_a_zero_gradient_at_zero() -> None:
    delta = torch.zeros(2, 3, requires_grad=True)
    SparseGroupLasso(1.0, 1.0).value(delta).backward()
    assert delta.grad is not None
    assert torch.equal(delta.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("name", ["l1", "group"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1.0, ValueError, "-1.0"),
        (math.nan, ValueError, "nan"),
        (math.inf, ValueError, "inf"),
        (torch.tensor([1.0, -2.0]), ValueError, "-2.0"),
        (torch.tensor([1.0, math.nan]), ValueError, "nan"),
        (torch.ones(2, 2), ValueError, r"\[2, 2\]"),
        (torch.tensor([1]), TypeError, "int64"),
        ("0.1", TypeError, "'0.1'"),
        (True, TypeError, "True"),
    ],
)
def test_bad_weights_are_refused_by_name(
    name: str, value: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"(?s){name} .*{message}.*finite number >= 0"):
        SparseGroupLasso(**{"l1": 0.0, "group": 0.0, name: value})


def test_weights_and_tensors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="l1 is for 2 problems, but group is for 3"):
        SparseGroupLasso(torch.ones(2), torch.ones(3))
    many = SparseGroupLasso(torch.ones(2), 1.0)
    with pytest.raises(ValueError, match=r"2 problems.*\[3, 4, 5\]"):
        many.value(torch.ones(3, 4, 5))
    with pytest.raises(ValueError, match=r"2 problems.*\[2, 5\]"):
        many.prox(torch.ones(2, 5), 1.0)
    with pytest.raises(ValueError, match="factor is for 3 problems"):
        many.scaled(torch.ones(3))
    with pytest.raises(ValueError, match="gradient has shape"):
        many.stationarity(torch.ones(2, 4, 5), torch.ones(2, 5, 4))
    with pytest.raises(ValueError, match=r"delta has shape \[3\].*reshape"):
        many.value(torch.ones(3))
    with pytest.raises(TypeError, match=r"delta is torch\.int64"):
        many.value(torch.ones(2, 3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"step is -1\.0"):
        many.prox(torch.ones(2, 3, 4), -1.0)


def test_lambda_max_of_no_penalty_or_of_a_broken_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match=r"both are zero.*group=1\.0"):
        SparseGroupLasso(0.0, 0.0).lambda_max(torch.ones(2, 3))
    with pytest.raises(ValueError, match="gradient holds NaN or infinity"):
        SparseGroupLasso(0.0, 1.0).lambda_max(torch.full((2, 3), math.nan))
    for extreme in (SparseGroupLasso(1.0, 1e-320), SparseGroupLasso(1e300, 1e-10)):
        with pytest.raises(ValueError, match=r"l1 to group, which is too large.*group=0\.0"):
            extreme.lambda_max(torch.ones(2, 3))
