"""Folds and orders that a seed alone decides (splits of tasks: tests/test_tasks.py)."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_laai.splits import cross_validation_folds, seeded_order


@settings(deadline=None, max_examples=50)
@given(st.integers(4, 30), st.integers(2, 10), st.integers(0, 99))
def test_folds_are_disjoint_even_and_cover_all_examples(n: int, n_folds: int, seed: int) -> None:
    examples = [str(i) for i in range(n)]
    n_folds = min(n_folds, n)
    folds = cross_validation_folds(examples, n_folds, seed)
    assert sorted(itertools.chain(*folds)) == list(range(n))
    assert {len(fold) for fold in folds} <= {n // n_folds, -(-n // n_folds)}
    assert folds == cross_validation_folds(examples, n_folds, seed)


def test_another_seed_deals_other_folds() -> None:
    assert cross_validation_folds(range(12), 3, 0) != cross_validation_folds(range(12), 3, 1)


def test_examples_with_the_same_label_are_held_out_together() -> None:
    labels = [question for question in "abcdefg" for _ in range(3)]
    folds = cross_validation_folds(labels, 3, 0)
    assert sorted(itertools.chain(*folds)) == list(range(21))
    held_out = [{labels[i] for i in fold} for fold in folds]
    assert [len(fold) for fold in held_out] == [3, 2, 2]
    assert len(set.union(*held_out)) == 7


@pytest.mark.parametrize("n_folds", [1, 0])
def test_fewer_than_two_folds_are_refused(n_folds: int) -> None:
    with pytest.raises(ValueError, match=rf"n_folds is {n_folds}; use at least 2"):
        cross_validation_folds(range(4), n_folds, 0)


@given(st.integers(0, 99))
def test_an_order_has_every_item_and_is_the_seeds_alone(seed: int) -> None:
    order = seeded_order(range(20), seed)
    assert sorted(order) == list(range(20))
    random.seed(seed + 1)
    assert seeded_order(range(20), seed) == order
    assert seeded_order(range(20), seed + 1) != order
