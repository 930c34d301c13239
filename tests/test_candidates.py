"""Rows of the validation table: their figures, and which of them is the best."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tl_laai.candidates import Candidate, Trial, best_first, best_of_rounds, candidates_of


def test_a_score_that_is_no_number_is_the_lowest() -> None:
    rows = [
        Candidate(1, 0.5, "final", 1.0, 0.1, score, 1.0, (1.0, 1.0), (score, 0.5))
        for score in (math.nan, 0.2)
    ]
    assert rows[0].score() == -math.inf
    assert rows[1].score() == pytest.approx(0.35)


def test_odds_are_those_of_a_probability() -> None:
    odds = [
        Candidate(1, 0.5, "final", 1.0, 0.1, score, 1.0, (1.0,), (score,)).odds()
        for score in (0.0, 0.2, 0.5, 1.0, math.nan, -math.inf)
    ]
    assert odds == pytest.approx([0.0, 0.25, 1.0, math.inf, -math.inf, -math.inf])


def test_a_candidate_without_a_finite_score_is_never_chosen() -> None:
    rows = [
        Candidate(layer, 0.5, "final", -score, 0.1, score, 1.0, (-score,) * 5, (score,) * 5)
        for layer, score in enumerate([math.nan, 0.2, -math.inf, 0.4])
    ]
    assert best_first(rows)[0].layer == 3
    assert json.dumps(rows[0].as_json(), allow_nan=False).count("null") == 12


def test_a_row_tells_mean_spread_and_heads_of_its_trial() -> None:
    deltas = torch.zeros(2, 2, 3, 4)
    deltas[0, 0, 1] = 1.0
    deltas[1] = math.nan
    losses = torch.tensor([[1.0, 3.0], [1.0, 1.0]], dtype=torch.float64)
    grid = [Trial(4, 0.9), Trial(5, 0.5, "distill", 0.2)]
    own, diverged = candidates_of("final", grid, 7, deltas, losses, losses / 10)
    assert (own.layer, own.alpha, own.round, own.relax_steps, own.n_folds) == (
        4,
        0.9,
        "final",
        7,
        2,
    )
    assert (own.validation_loss, own.standard_error) == pytest.approx((2.0, 1.0))
    assert own.validation_probability == pytest.approx(0.2)
    assert own.fold_scores == pytest.approx((0.1, 0.3))
    assert own.n_heads == 0.5
    assert (diverged.objective, diverged.label_share) == ("distill", 0.2)
    assert diverged.score() == -math.inf
    by_loss = candidates_of("distilled", grid[:1], 7, deltas[:1, :1], losses[:1], None)
    assert by_loss[0].score() == -2.0


def test_every_round_has_a_best_row() -> None:
    def row(name: str, score: float) -> Candidate:
        return Candidate(1, 0.5, name, 1.0, 0.1, score, 1.0, (1.0,), (score,))

    rows = [row("distilled", -2.0), row("distilled", -1.0), row("mixed", 0.2), row("mixed", 0.1)]
    assert best_of_rounds(rows) == [rows[1], rows[2]]
