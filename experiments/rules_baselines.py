"""Other methods' rows of the table of rules, each tuned by the same cross-validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shared_fits import finetuning
from tables import Row, answer_row


def vectors(model: Any, data: Any, seed: int) -> list[Row]:
    """Other activation interventions, each tuned by the same cross-validation."""
    from tl_laai.baselines import METHODS, tune
    from tl_laai.evaluation import evaluate_edits
    from tl_laai.side_effects import next_token_kl

    tuned = {name: tune(model, data.train, m, seed=seed) for name, m in METHODS.items()}
    edits = {name: t.edit for name, t in tuned.items()}
    scores = evaluate_edits(model, data.test, edits)
    moved = next_token_kl(model, edits)
    return [
        answer_row(name, scores[name], str(t.setting), kl_unrelated=float(moved[name].mean()))
        for name, t in tuned.items()
    ]


def begun(model: Any, data: Any, seed: int) -> list[Row]:
    """The task vector asked for less: that its answer begins right, wherever it ends.

    Fits, learnt heads and fine-tuning are taught the line break that ends an answer; what is read
    off activations is not. It is tuned without the line break here.
    """
    return _begun(["task-vector"], model, data, seed)


def begun_others(model: Any, data: Any, seed: int) -> list[Row]:
    """The same of the other interventions that are read off activations."""
    from tl_laai.baselines import METHODS

    names = [name for name in METHODS if name not in ("task-vector", "learnt-heads")]
    return _begun(names, model, data, seed)


def _begun(names: Sequence[str], model: Any, data: Any, seed: int) -> list[Row]:
    from dataclasses import replace

    from tl_laai.baselines import METHODS, tune
    from tl_laai.evaluation import evaluate_edits
    from tl_laai.metrics import begins_with
    from tl_laai.prompts import DEFAULT_TEMPLATE

    endless = replace(DEFAULT_TEMPLATE, answer_end="")
    tuned = {
        name: tune(model, data.train, METHODS[name], seed=seed, template=endless) for name in names
    }
    scores = evaluate_edits(model, data.test, {name: t.edit for name, t in tuned.items()})
    rows = []
    for name, score in scores.items():
        correct = [int(begins_with(row.prediction, row.target)) for row in score.rows]
        row = answer_row(f"{name}, begins right", score, str(tuned[name].setting))
        rows.append(row | {"exact_match": score.begins_right, "correct": correct})
    return rows


def wider_heads(model: Any, data: Any, seed: int) -> list[Row]:
    """Learnt head offsets in up to all heads, and for up to three times as many steps."""
    from tl_laai.baselines import tune
    from tl_laai.evaluation import evaluate_edits
    from tl_laai.head_vectors import LearntHeads

    n = model.cfg.n_layers * model.cfg.n_heads
    tuned = {
        steps: tune(model, data.train, LearntHeads((n // 6, n // 2, n), steps=steps), seed=seed)
        for steps in (20, 40, 60)
    }
    steps = max(tuned, key=lambda k: max(t.validation_probability for t in tuned[k].table))
    chosen = tuned[steps]
    score = evaluate_edits(model, data.test, {"it": chosen.edit})["it"]
    return [answer_row("learnt-heads, wider", score, f"{chosen.setting}, {steps} steps")]


def wider_finetuning(model: Any, data: Any, seed: int) -> list[Row]:
    """LoRA and IA3 with a lower learning rate more on offer, and twice as many steps."""
    rates = {"lora": (1e-4, 3e-4, 1e-3), "ia3": (3e-3, 1e-2, 3e-2)}
    return [
        row
        for method, own in rates.items()
        for row in finetuning(
            model,
            data,
            seed,
            methods=[method],
            suffix=", wider",
            learning_rates=own,
            steps=(5, 10, 20, 40, 80),
        )
    ]
