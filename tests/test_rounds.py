"""What the rounds of a choice try: layers, penalties, steps and shares, and their defaults."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tl_laai import rounds
from tl_laai.candidates import Trial
from tl_laai.rounds import Rounds, mixed_folds, opinion_layers

ASKED = Rounds(tuple(range(18)), 18, None, None, ("answers", "distill"), None, 0.0)


def test_finalists_are_not_neighbours_while_there_are_others() -> None:
    assert ASKED.apart([4, 3, 5, 8, 7, 1]) == [4, 8, 1, 3, 5, 7]
    assert replace(ASKED, n_layers=3).apart([1, 0, 2]) == [1, 0, 2]
    assert ASKED.apart([]) == []


def test_few_layers_are_not_screened() -> None:
    assert replace(ASKED, layers=(4, 8, 1)).screening() == []
    four = replace(ASKED, layers=(4, 8, 1, 0))
    assert four.screening() == [Trial(layer, 0.0) for layer in (4, 8, 1, 0)]
    penalised = replace(four, relax_steps=())
    assert {trial.alpha for trial in penalised.screening()} == {rounds.SCREENING_ALPHA}
    assert (four.brief, penalised.brief) == ((rounds.SCREENING_STEPS,), ())


@pytest.mark.parametrize(
    ("relax_steps", "max_heads", "alphas"),
    [
        (None, None, rounds.ALPHAS),
        ((), None, rounds.PENALISED_ALPHAS),
        (None, 2, (0.0,)),
        ((), 2, rounds.PENALISED_ALPHAS),
    ],
)
def test_the_best_layers_meet_every_penalty(
    relax_steps: tuple[int, ...] | None, max_heads: int | None, alphas: tuple[float, ...]
) -> None:
    own = replace(ASKED, relax_steps=relax_steps, max_heads=max_heads)
    expected = [Trial(layer, alpha) for layer in (2, 7, 9) for alpha in alphas]
    assert own.labelled([9, 2, 7, 1]) == expected
    given = replace(own, alphas=[0.4], max_heads=None)
    assert given.labelled([9, 2, 7, 1]) == [Trial(layer, 0.4) for layer in (2, 7, 9)]
    assert replace(own, objectives=("distill",)).labelled([9, 2, 7, 1]) == []


def test_distilled_fits_are_tried_at_one_share_then_at_every_share() -> None:
    last = rounds.DISTILLED_SHARES[-1]
    tried = ASKED.taught([9, 2, 7, 1])
    assert tried == [Trial(layer, 0.0, "distill", last) for layer in (2, 7, 9)]
    mixed = [Trial(7, 0.0, "distill", share) for share in rounds.DISTILLED_SHARES]
    assert ASKED.mixed(tried[1]) == mixed
    given = replace(ASKED, label_share=0.3)
    assert {trial.label_share for trial in given.taught([4])} == {0.3}
    assert given.mixed(tried[1]) == []
    assert replace(ASKED, objectives=("answers",)).taught([4]) == []


def test_few_heads_are_looked_for_at_what_was_chosen() -> None:
    own = replace(ASKED, max_heads=2)
    chosen = Trial(7, 0.0, "distill", 0.5)
    expected = [Trial(7, alpha, "distill", 0.5) for alpha in rounds.SPARSE_ALPHAS]
    assert own.sparse(chosen) == expected
    assert replace(own, alphas=[0.4]).sparse(chosen) == [Trial(7, 0.4, "distill", 0.5)]


def test_steps_are_ascending() -> None:
    assert ASKED.steps == rounds.RELAX_STEPS
    assert ASKED.taught_steps == rounds.DISTILLED_STEPS
    own = replace(ASKED, relax_steps=(30, 5))
    assert own.steps == own.taught_steps == (5, 30)


def test_shares_of_labels_are_compared_on_half_of_the_folds() -> None:
    for n_folds, n_mixed in ((2, 2), (3, 2), (4, 2), (5, 2), (10, 5)):
        folds = [[i] for i in range(n_folds)]
        assert mixed_folds(folds) == folds[:n_mixed]


def test_opinion_fits_choose_among_a_third_a_half_and_two_thirds_of_the_model() -> None:
    assert opinion_layers(18) == (6, 9, 12)
    assert [opinion_layers(n) for n in (1, 2, 3)] == [(0,), (0, 1), (1, 2)]
