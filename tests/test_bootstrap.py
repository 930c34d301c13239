"""Bootstrap intervals, against slow twins or a known answer."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_laai.bootstrap import bootstrap_interval, paired_bootstrap

quickly = settings(deadline=None, max_examples=50)


def lists_of_numbers(n: int) -> st.SearchStrategy[list[float]]:
    return st.lists(st.integers(-3, 3).map(float), min_size=n, max_size=n)


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
