"""Scores, distances, counts, intervals and ranks, each against a slow twin or a known answer."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tl_laai.metrics import (
    Sparsity,
    begins_with,
    bootstrap_interval,
    exact_match,
    kl_divergence,
    paired_bootstrap,
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


# --- bootstrap -----------------------------------------------------------------------------------


def test_the_bootstrap_interval_equals_a_slow_twin_up_to_resampling_noise() -> None:
    values = list(np.random.default_rng(3).normal(size=40))
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(values, k=40)) for _ in range(4000))
    low, high = bootstrap_interval(values, n_resamples=4000)
    assert low == pytest.approx(means[100], abs=0.04)
    assert high == pytest.approx(means[3900], abs=0.04)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_interval_covers_the_true_mean_about_as_often_as_it_says(level: float) -> None:
    draw = np.random.default_rng(0)
    samples = draw.normal(loc=2.0, size=(300, 60))
    intervals = [bootstrap_interval(sample, level=level, n_resamples=200) for sample in samples]
    covered = statistics.fmean(low <= 2.0 <= high for low, high in intervals)
    assert covered == pytest.approx(level, abs=0.06)


@quickly
@given(lists_of_numbers(8), st.integers(0, 5))
def test_an_interval_lies_within_the_values_and_repeats_with_its_seed(
    values: list[float], seed: int
) -> None:
    low, high = bootstrap_interval(values, n_resamples=50, seed=seed)
    assert min(values) <= low <= high <= max(values)
    assert (low, high) == bootstrap_interval(np.array(values), n_resamples=50, seed=seed)


def test_exact_match_scores_need_no_conversion() -> None:
    scores = [True, False, True, True]
    assert bootstrap_interval(scores) == bootstrap_interval(np.array(scores))
    assert bootstrap_interval(scores) == bootstrap_interval([1.0, 0.0, 1.0, 1.0])


def test_pairing_removes_what_both_scores_share() -> None:
    shared = np.random.default_rng(0).normal(scale=10.0, size=50)
    result = paired_bootstrap(shared + 1.0, shared)
    assert (result.low, result.difference, result.high) == pytest.approx((1.0, 1.0, 1.0))
    assert (result.n_examples, result.n_groups, result.level) == (50, 1, 0.95)
    low, high = bootstrap_interval(shared)
    assert high - low > 3  # unpaired, the difference of 1 would be lost


@quickly
@given(lists_of_numbers(6), lists_of_numbers(6))
def test_a_paired_difference_turns_round_with_its_arguments(a: list[float], b: list[float]) -> None:
    there, back = (paired_bootstrap(*pair, n_resamples=60) for pair in ((a, b), (b, a)))
    assert there.difference == pytest.approx(statistics.fmean(a) - statistics.fmean(b))
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


def slow_hierarchical(differences: list[list[float]], n_resamples: int) -> tuple[float, float]:
    """Groups first, then examples in each, with the standard library alone."""
    draw = random.Random(1)
    means = []
    for _ in range(n_resamples):
        pooled: list[float] = []
        for group in draw.choices(differences, k=len(differences)):
            pooled += draw.choices(group, k=len(group))
        means.append(statistics.fmean(pooled))
    means.sort()
    return means[n_resamples // 40], means[-n_resamples // 40]


def test_groups_are_resampled_before_their_examples() -> None:
    generator = np.random.default_rng(0)
    sizes = [20, 30, 20, 25, 20]
    centres = [-1.0, 0.0, 0.5, 1.0, 2.0]
    groups = [list(generator.normal(c, 0.5, size=n)) for c, n in zip(centres, sizes, strict=True)]
    flat = np.concatenate(groups)
    labels = [f"seed {i}" for i, group in enumerate(groups) for _ in group]
    # The order of the rows must not matter to which group a row belongs.
    order = generator.permutation(flat.size)
    shuffled = [labels[i] for i in order]
    result = paired_bootstrap(flat[order], np.zeros(flat.size), shuffled, n_resamples=4000)
    low, high = slow_hierarchical(groups, 4000)
    assert result.n_groups == 5
    assert (result.low, result.high) == pytest.approx((low, high), abs=0.06)
    flat_result = paired_bootstrap(flat, np.zeros(flat.size))
    assert result.high - result.low > 2 * (flat_result.high - flat_result.low)


def slow_stratified(strata: list[list[list[float]]], n_resamples: int) -> tuple[float, float]:
    """The same for each stratum, and the mean of their means."""
    draw = random.Random(2)
    means = []
    for _ in range(n_resamples):
        of_strata = []
        for groups in strata:
            drawn = draw.choices(groups, k=len(groups))
            pooled = [x for group in drawn for x in draw.choices(group, k=len(group))]
            of_strata.append(statistics.fmean(pooled))
        means.append(statistics.fmean(of_strata))
    means.sort()
    return means[n_resamples // 40], means[-n_resamples // 40]


def test_strata_are_resampled_each_by_itself_and_weigh_alike() -> None:
    generator = np.random.default_rng(0)
    centres = [[-3.0, -2.0], [0.0, 1.0, 2.0], [9.0]]
    strata = [[list(generator.normal(c, 0.5, size=20)) for c in own] for own in centres]
    rows = [
        (value, f"seed {g}", f"task {s}")
        for s, own in enumerate(strata)
        for g, group in enumerate(own)
        for value in group
    ]
    rows = [rows[i] for i in generator.permutation(len(rows))]
    values, groups, tasks = zip(*rows, strict=True)
    result = paired_bootstrap(values, [0.0] * len(rows), groups, strata=tasks, n_resamples=4000)
    of_strata = [statistics.fmean(x for group in own for x in group) for own in strata]
    assert result.difference == pytest.approx(statistics.fmean(of_strata))
    assert (result.low, result.high) == pytest.approx(slow_stratified(strata, 4000), abs=0.04)
    assert result.n_groups == 6
    pooled = paired_bootstrap(values, [0.0] * len(rows), groups)
    assert pooled.high - pooled.low > 2 * (result.high - result.low)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([1.0], {}, r"values has shape \[1\]; give at least two numbers"),
        ([], {}, r"values has shape \[0\]"),
        ([1.0, math.nan], {}, "values holds NaN or infinity"),
        ([1.0, 2.0], {"level": 95.0}, r"level is 95\.0; give a coverage between 0 and 1"),
        ([1.0, 2.0], {"n_resamples": 0}, "n_resamples is 0; give at least 1"),
    ],
)
def test_the_bootstrap_refuses_what_has_no_interval(values, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values, **options)


def test_pairs_and_groups_must_match_in_length() -> None:
    with pytest.raises(ValueError, match=r"b has shape \[3\], but a has 2 scores"):
        paired_bootstrap([1, 0], [1, 0, 1])
    with pytest.raises(ValueError, match=r"groups has shape \[1\], but a has 2 scores"):
        paired_bootstrap([1, 0], [1, 0], [0])
    with pytest.raises(ValueError, match=r"strata has shape \[3\], but a has 2 scores"):
        paired_bootstrap([1, 0], [1, 0], strata=["a", "a", "b"])


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
