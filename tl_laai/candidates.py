"""What a choice compares: settings that are tried, and how each did on what was held out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_laai.objectives import ObjectiveName


@dataclass(frozen=True)
class Trial:
    """A setting that is tried.

    Attributes:
        layer: the edited layer.
        alpha: the group weight as a share of each fit's own `lambda_max`.
        objective: `answers` or `distill`.
        label_share: weight of the labelled answers in a distilled fit.
    """

    layer: int
    alpha: float
    objective: ObjectiveName = "answers"
    label_share: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """One row of the validation table.

    Attributes:
        layer: the edited layer.
        alpha: the group weight as a share of each fit's own `lambda_max`.
        round: `screening` (brief fits, two folds), `final`, `distilled` (scored by the teacher's
            answers), `mixed` (shares of labels), or `heads` (a few of what was chosen).
        validation_loss: held-out cross-entropy in nats, mean over folds; KL for opinions, and
            where a teacher's answers are held out.
        standard_error: of that mean over folds.
        validation_probability: of held-out answers, mean over folds; None for opinions and where
            a teacher's answers are held out.
        n_heads: mean number of non-zero heads.
        fold_losses: of each fold that was fitted; where a teacher's answers are held out, of each
            such input.
        fold_scores: what is compared, the larger the better: the probability of the answers, or
            the loss with its sign turned.
        objective: `answers` or `distill`.
        label_share: weight of the labelled answers in a distilled fit.
        relax_steps: steps of the relaxed fit; 0 for the penalised one itself.
    """

    layer: int
    alpha: float
    round: str
    validation_loss: float
    standard_error: float
    validation_probability: float | None
    n_heads: float
    fold_losses: tuple[float, ...]
    fold_scores: tuple[float, ...]
    objective: ObjectiveName = "answers"
    label_share: float = 0.0
    relax_steps: int = 0

    @property
    def n_folds(self) -> int:
        """How many folds were fitted, or inputs held out."""
        return len(self.fold_losses)

    def score(self) -> float:
        """Mean of `fold_scores`; minus infinity where it is not a number."""
        mean = sum(self.fold_scores) / len(self.fold_scores)
        return -math.inf if math.isnan(mean) else mean

    def odds(self) -> float:
        """The score's odds where it is a probability: near 1 as telling as near 0."""
        score = self.score()
        return score / (1 - score) if 0 <= score < 1 else math.copysign(math.inf, score)

    def as_json(self) -> dict[str, Any]:
        """For the provenance: JSON has no NaN and no tuples."""
        return {name: _plain(value) for name, value in vars(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def candidates_of(
    name: str,
    grid: Sequence[Trial],
    relax_steps: int,
    deltas: Float[Tensor, "n_trials n_fits n_heads d_head"],
    losses: Float[Tensor, "n_trials n_folds"],
    probabilities: Float[Tensor, "n_trials n_folds"] | None,
) -> list[Candidate]:
    """A row a trial, of one round and one number of steps.

    Args:
        name: of the round.
        grid: what was tried.
        relax_steps: of all these rows.
        deltas: `[n_trials, n_fits, n_heads, d_head]`; not finite where a fit diverged.
        losses: held out, `[n_trials, n_folds]`, in nats, where `n_fits` is `n_folds` or 1.
        probabilities: of held-out answers, likewise; None to compare losses.
    """
    diverged = ~deltas.isfinite().flatten(2).all(dim=-1).cpu()
    losses = losses.masked_fill(diverged, math.nan)
    if probabilities is not None:
        probabilities = probabilities.masked_fill(diverged, math.nan)
    scores = -losses if probabilities is None else probabilities
    spread = losses.std(dim=1) if losses.shape[1] > 1 else losses.new_full((len(losses),), math.nan)
    heads = (deltas.nan_to_num().norm(dim=-1) > 0).sum(-1).double().mean(dim=1)
    return [
        Candidate(
            layer=trial.layer,
            alpha=trial.alpha,
            round=name,
            validation_loss=float(losses[i].mean()),
            standard_error=float(spread[i]) / losses.shape[1] ** 0.5,
            validation_probability=None
            if probabilities is None
            else float(probabilities[i].mean()),
            n_heads=float(heads[i]),
            fold_losses=tuple(losses[i].tolist()),
            fold_scores=tuple(scores[i].tolist()),
            objective=trial.objective,
            label_share=trial.label_share,
            relax_steps=relax_steps,
        )
        for i, trial in enumerate(grid)
    ]


def best_first(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Ranked by their score; those without a finite one come last."""
    return sorted(candidates, key=Candidate.score, reverse=True)


def best_of_rounds(rows: Sequence[Candidate]) -> list[Candidate]:
    """The best row of each round, in their order."""
    names = dict.fromkeys(row.round for row in rows)
    return [best_first([row for row in rows if row.round == name])[0] for name in names]
