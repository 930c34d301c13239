"""Scores, distances, counts and ranks, each against a slow twin or a known answer."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tl_laai.metrics import (
    Sparsity,
    begins_with,
    exact_match,
    kl_divergence,
    sparsity,
    spearman,
    total_variation,
    wasserstein_ordered,
)

quickly = settings(deadline=None, max_examples=50)
DISTANCES = [kl_divergence, total_variation, wasserstein_ordered]


@st.composite
def pairs_of_distributions(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Two distributions over the same options; the first may hold exact zeros."""
    n_options = draw(st.integers(2, 6))
    whole = st.integers(0, 9)
    p = np.array(draw(st.lists(whole, min_size=n_options, max_size=n_options)), dtype=float)
    q = np.array(draw(st.lists(whole, min_size=n_options, max_size=n_options)), dtype=float) + 1
    p[draw(st.integers(0, n_options - 1))] += 1
    return p / p.sum(), q / q.sum()


def lists_of_numbers(n: int) -> st.SearchStrategy[list[float]]:
    return st.lists(st.integers(-3, 3).map(float), min_size=n, max_size=n)


# --- exact match ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "target", "expected"),
    [
        ("Paris", "Paris", True),
        (" Paris\n", "Paris\t", True),
        ("paris", "Paris", False),
        ("Paris is", "Paris", False),
        ("", "Paris", False),
        ("e\u0301te\u0301", "été", True),  # combining accents
        ("ﬁn", "fin", False),  # NFC keeps a ligature, NFKC would not
        ("New  York", "New York", False),
    ],
)
def test_exact_match_forgives_white_space_around_and_the_form_of_accents_only(
    prediction: str, target: str, expected: bool
) -> None:
    assert exact_match(prediction, target) is expected
    assert exact_match(target, prediction) is expected


@pytest.mark.parametrize(
    ("prediction", "target", "expected"),
    [
        ("Paris", "Paris", True),
        (" Paris is a city", "Paris", True),
        ("Paris, France", "Paris", True),
        ("Parisian", "Paris", False),
        ("Pari", "Paris", False),
        ("In Paris", "Paris", False),
        ("cafe\u0301 noir", "caf\u00e9", True),
        ("New York City", "New York", True),
        ("\u0915\u093f", "\u0915", False),  # Hindi: a vowel sign makes another syllable
        ("\u0e19\u0e35\u0e49", "\u0e19", False),  # Thai, likewise
        ("\u0915\u093f \u0914\u0930", "\u0915\u093f", True),
        ("", "Paris", False),
    ],
)
def test_an_answer_may_go_on_after_the_right_words(
    prediction: str, target: str, expected: bool
) -> None:
    assert begins_with(prediction, target) is expected
    with pytest.raises(TypeError, match="prediction is None"):
        begins_with(None, target)  # type: ignore[arg-type]  # the error is the point


def test_exact_match_refuses_what_is_not_text() -> None:
    with pytest.raises(TypeError, match=r"prediction is None, but must be a decoded answer"):
        exact_match(None, "Paris")  # type: ignore[arg-type]  # the error is the point
    with pytest.raises(TypeError, match=r"target is 7"):
        exact_match("7", 7)  # type: ignore[arg-type]  # the error is the point


# --- distances between distributions -------------------------------------------------------------


def slow_kl(p: np.ndarray, q: np.ndarray) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def slow_total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """The largest difference in probability over all sets of options."""
    n = len(p)
    sets = [[i for i in range(n) if mask >> i & 1] for mask in range(2**n)]
    return max(abs(sum(p[i] - q[i] for i in chosen)) for chosen in sets)


def slow_wasserstein(p: np.ndarray, q: np.ndarray) -> float:
    """Move mass greedily from the left, option by option, counting mass times steps."""
    earth, holes, cost = list(p), list(q), 0.0
    i = j = 0
    while i < len(earth) and j < len(holes):
        moved = min(earth[i], holes[j])
        cost += moved * abs(i - j)
        earth[i] -= moved
        holes[j] -= moved
        if earth[i] <= holes[j]:
            i += 1
        else:
            j += 1
    return cost / (len(p) - 1)


@quickly
@given(pairs_of_distributions())
def test_distances_equal_their_slow_twins(pair: tuple[np.ndarray, np.ndarray]) -> None:
    p, q = pair
    assert float(kl_divergence(p, q)) == pytest.approx(slow_kl(p, q), abs=1e-12)
    assert float(total_variation(p, q)) == pytest.approx(slow_total_variation(p, q), abs=1e-12)
    assert float(wasserstein_ordered(p, q)) == pytest.approx(slow_wasserstein(p, q), abs=1e-12)


@quickly
@given(pairs_of_distributions())
def test_distances_bound_one_another_as_theory_says(pair: tuple[np.ndarray, np.ndarray]) -> None:
    p, q = pair
    distance = float(total_variation(p, q))
    assert 0 <= distance <= 1
    assert 2 * distance**2 <= float(kl_divergence(p, q)) + 1e-12  # Pinsker
    # Every moved share goes one step at least and n_options - 1 at most.
    moved = float(wasserstein_ordered(p, q)) * (len(p) - 1)
    assert distance - 1e-12 <= moved <= distance * (len(p) - 1) + 1e-12


@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_are_exactly_zero_between_equals_and_work_over_leading_axes(distance) -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(4), size=(3, 2))
    q = np.random.default_rng(1).dirichlet(np.ones(4), size=(3, 2))
    assert np.array_equal(distance(p, p), np.zeros((3, 2)))
    together = distance(p, q)
    assert together.shape == (3, 2)
    assert together[2, 1] == float(distance(p[2, 1], q[2, 1])) > 0


def test_kl_is_infinite_only_where_the_model_rules_out_what_the_group_says() -> None:
    assert float(kl_divergence([0.5, 0.5], [1.0, 0.0])) == math.inf
    assert float(kl_divergence([1.0, 0.0], [0.5, 0.5])) == pytest.approx(math.log(2))
    assert float(kl_divergence([1.0, 0.0], [1.0, 0.0])) == 0.0


def test_wasserstein_sees_the_order_that_total_variation_does_not() -> None:
    start, near, far = np.eye(3)
    assert float(total_variation(start, near)) == float(total_variation(start, far)) == 1
    assert float(wasserstein_ordered(start, near)) == 0.5
    assert float(wasserstein_ordered(start, far)) == 1.0


def test_rounding_in_float32_is_forgiven() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(7), size=50).astype(np.float32)
    assert np.array_equal(kl_divergence(p, p), np.zeros(50))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(
    ("p", "q", "message"),
    [
        ([0.5, 0.6], [0.5, 0.5], r"p is off a sum of 1 by 0\.1 .*normalise"),
        ([0.5, 0.5], [1.5, -0.5], "q holds a negative number"),
        ([0.5, math.nan], [0.5, 0.5], "p holds a negative number, NaN"),
        ([0.5, 0.5], [0.2, 0.3, 0.5], r"q has shape \[3\], but p has shape \[2\]"),
        ([], [], r"p has shape \[0\]"),
    ],
)
def test_what_is_not_a_distribution_is_refused(distance, p, q, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distance(p, q)


def test_a_single_option_has_no_distances() -> None:
    with pytest.raises(ValueError, match="needs at least 2"):
        wasserstein_ordered([1.0], [1.0])


# --- sparsity ------------------------------------------------------------------------------------


@quickly
@given(arrays(np.float64, (3, 4), elements=st.sampled_from([0.0, -0.0, 1e-300, -2.0])))
def test_sparsity_counts_like_two_loops(delta: np.ndarray) -> None:
    entries = [float(value) for row in delta for value in row]
    alive = [any(float(value) != 0 for value in row) for row in delta]
    n_nonzero = sum(value != 0 for value in entries)
    counted = sparsity(delta)
    assert counted == Sparsity(3, sum(alive), 12, n_nonzero, counted.share_zero)
    assert counted.share_zero == pytest.approx((12 - n_nonzero) / 12)


def test_sparsity_refuses_other_shapes_and_values_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match=r"delta has shape \[4\]; give one \[n_heads, d_head\]"):
        sparsity(np.ones(4))
    with pytest.raises(ValueError, match="delta holds NaN or infinity"):
        sparsity(np.array([[1.0, math.nan]]))


# --- rank correlation ----------------------------------------------------------------------------


def slow_spearman(x: list[float], y: list[float]) -> float:
    """Pearson's correlation of ranks counted pair by pair."""

    def ranks(values: list[float]) -> list[float]:
        return [sum((u < v) + (u == v) / 2 for u in values) + 0.5 for v in values]

    return statistics.correlation(ranks(x), ranks(y))


@quickly
@given(st.integers(2, 12).flatmap(lambda n: st.tuples(lists_of_numbers(n), lists_of_numbers(n))))
def test_spearman_equals_its_slow_twin_with_ties(pair: tuple[list[float], list[float]]) -> None:
    x, y = pair
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(spearman(x, y))
    else:
        assert spearman(x, y) == pytest.approx(slow_spearman(x, y), abs=1e-12)


def test_spearman_without_ties_is_the_textbook_formula() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.permutation(30), generator.permutation(30)
    expected = 1 - 6 * float(((x - y) ** 2).sum()) / (30 * (30**2 - 1))
    assert spearman(x, y) == pytest.approx(expected)


def test_spearman_sees_order_alone() -> None:
    x = np.random.default_rng(0).normal(size=20)
    assert spearman(x, np.exp(x)) == 1.0
    assert spearman(x, -(x**3)) == -1.0


def test_spearman_refuses_lists_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="y has 3 numbers, but x has 2"):
        spearman([1.0, 2.0], [1.0, 2.0, 3.0])
