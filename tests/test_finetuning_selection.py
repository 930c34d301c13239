"""Choosing learning rate and steps of fine-tuning: the table against single runs, the refusals."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from test_adapters import slow_losses
from test_baselines import with_more
from test_finetuning import EXAMPLES, trained
from tiny import tiny_hf

from tl_laai import finetuning_selection
from tl_laai.finetuning_selection import tune_fine_tuning
from tl_laai.methods import Augment, as_they_are
from tl_laai.prompts import tokenise
from tl_laai.splits import cross_validation_folds


@pytest.mark.parametrize("augment", [as_they_are, with_more])
def test_the_table_is_complete_and_the_choice_is_its_best_refitted(augment: Augment) -> None:
    model, hf_model = oracle.shared_model("bridge", "llama"), tiny_hf("llama")
    options: Any = {"seed": 3, "hf_model": hf_model}
    grid: Any = {"learning_rates": [0.02, 0.001], "steps": [3, 1, 3], "n_folds": 2}
    chosen = tune_fine_tuning(model, EXAMPLES, augment=augment, **grid, **options)
    assert [(row.learning_rate, row.steps) for row in chosen.table] == [
        (0.001, 1),
        (0.001, 3),
        (0.02, 1),
        (0.02, 3),
    ]
    for row in chosen.table:
        losses, probabilities = [], []
        for fold in cross_validation_folds(EXAMPLES, 2, 3):
            kept = [e for i, e in enumerate(EXAMPLES) if i not in fold]
            setting = {"learning_rate": row.learning_rate, "steps": row.steps}
            alone = trained(examples=augment(kept), **setting, **options)
            with alone.applied() as inside:
                asked = tokenise(model, [EXAMPLES[i] for i in fold])
                own = [slow_losses(inside, e) for e in asked]
            losses.append(torch.stack([tokens.mean() for tokens in own]).mean())
            probabilities.append(torch.stack([(-tokens.sum()).exp() for tokens in own]).mean())
        slow = torch.stack(losses)
        mean = torch.stack(probabilities).mean().item()
        assert row.validation_probability == pytest.approx(mean, rel=1e-8)
        assert row.validation_loss == pytest.approx(slow.mean().item(), rel=1e-9)
        assert row.standard_error == pytest.approx(slow.std().item() / 2**0.5, rel=1e-6)
        assert row.n_folds == 2
    best = max(chosen.table, key=lambda row: row.validation_probability)
    assert (chosen.learning_rate, chosen.steps) == (best.learning_rate, best.steps)
    setting = {"learning_rate": best.learning_rate, "steps": best.steps}
    again = trained(examples=augment(EXAMPLES), **setting, **options)
    assert chosen.fine_tuned.losses == again.losses


def test_candidates_that_diverge_are_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = finetuning_selection._validation_scores

    def fake(task: Any, rate: float, *rest: Any) -> list[tuple[float, float]]:
        return [(math.nan, math.nan)] if rate == 0.01 else real(task, rate, *rest)

    monkeypatch.setattr(finetuning_selection, "_validation_scores", fake)
    chosen = tune_fine_tuning(
        oracle.shared_model("bridge", "llama"),
        EXAMPLES,
        learning_rates=[0.01, 0.02],
        steps=[1],
        hf_model=tiny_hf("llama"),
    )
    assert chosen.learning_rate == 0.02


@pytest.mark.parametrize(
    ("examples", "options", "match"),
    [
        (EXAMPLES[:3], {}, "examples holds 3: choosing by cross-validation needs at least 4"),
        (EXAMPLES, {"n_folds": 1}, "n_folds is 1; use at least 2"),
        (EXAMPLES, {"steps": []}, "is empty: give at least one candidate"),
        (EXAMPLES, {"learning_rates": []}, "is empty: give at least one candidate"),
    ],
)
def test_grids_that_cannot_be_are_refused(examples: Any, options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tune_fine_tuning(
            oracle.shared_model("bridge", "llama"), examples, hf_model=tiny_hf("llama"), **options
        )
