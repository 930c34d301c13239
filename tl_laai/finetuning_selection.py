"""Learning rate and steps of fine-tuning, chosen by cross-validation inside the given examples.

The score is that of `selection.fit_auto`, the probability of held-out answers, and so are the folds
of the same number and seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tl_laai.adapters import AdapterConfig, Method, adapted, token_losses
from tl_laai.backends import own_modes
from tl_laai.finetuning import BATCH_SIZE, FineTuned, Training
from tl_laai.methods import Augment, as_they_are
from tl_laai.prompts import DEFAULT_TEMPLATE, PromptTemplate, TokenisedExample
from tl_laai.splits import cross_validation_folds
from tl_laai.tasks import Example, same_input_key

# Of eight rule tasks with ten examples (Gemma 3 270M), LoRA chose 3e-4 over 1e-4 in all.
LEARNING_RATES: Mapping[str, tuple[float, ...]] = {"lora": (3e-4, 1e-3), "ia3": (1e-2, 3e-2)}
CHECKPOINTS = (5, 10, 20, 40)


@dataclass(frozen=True)
class FineTuningCandidate:
    """One row of the validation table.

    Attributes:
        learning_rate, steps: the candidate.
        validation_loss: held-out answer cross-entropy in nats, mean over folds.
        standard_error: of that mean over folds.
        validation_probability: of the held-out answers, mean over folds: what is chosen by.
        n_folds: folds that were trained.
    """

    learning_rate: float
    steps: int
    validation_loss: float
    standard_error: float
    validation_probability: float
    n_folds: int


@dataclass(frozen=True)
class FineTuningSelection:
    """What cross-validation chose.

    Attributes:
        fine_tuned: trained on all examples at the choice.
        table: every candidate.
        learning_rate, steps: the choice.
    """

    fine_tuned: FineTuned
    table: tuple[FineTuningCandidate, ...]
    learning_rate: float
    steps: int


@own_modes()
def tune_fine_tuning(
    model: Any,
    examples: Sequence[Example],
    *,
    method: Method = "lora",
    rank: int = 8,
    target_modules: str | Sequence[str] | None = None,
    learning_rates: Sequence[float] | None = None,
    steps: Sequence[int] = CHECKPOINTS,
    n_folds: int = 2,
    batch_size: int = BATCH_SIZE,
    template: PromptTemplate = DEFAULT_TEMPLATE,
    seed: int = 0,
    hf_model: Any = None,
    augment: Augment = as_they_are,
) -> FineTuningSelection:
    """Train with learning rate and number of steps chosen by k-fold cross-validation.

    All numbers of steps are scored along one run, so only learning rates cost more.

    Example:
        >>> chosen = tune_fine_tuning(model, split.train)  # doctest: +SKIP
        >>> chosen.learning_rate, chosen.steps  # doctest: +SKIP
        (0.0003, 40)

    Args:
        model: as for `fine_tune`.
        examples: at least four; nothing else is looked at.
        method: `lora` or `ia3`, see `AdapterConfig`.
        rank: of LoRA's additions.
        target_modules: of LoRA; None for peft's own choice.
        learning_rates: candidates; None for the method's in `LEARNING_RATES`.
        steps: candidate numbers of steps.
        n_folds: at most the number of examples.
        batch_size: examples a step; all of them where there are no more.
        template: how inputs become prompts.
        seed: as for `fine_tune`, and of the assignment to folds.
        hf_model: as for `fine_tune`.
        augment: as for `baselines.tune`.

    Returns:
        The refitted choice and the whole validation table.

    Raises:
        ImportError, ValueError: as `fine_tune`; too few examples or folds; an empty grid.
    """
    if len(examples) < 4:
        raise ValueError(
            f"examples holds {len(examples)}: choosing by cross-validation needs at least 4. Give "
            "more, or choose learning_rate and steps yourself."
        )
    config = AdapterConfig(method, rank, target_modules)
    rates = sorted(set(LEARNING_RATES[method] if learning_rates is None else learning_rates))
    checkpoints = sorted(set(steps))
    if not (rates and checkpoints):
        raise ValueError("learning_rates or steps is empty: give at least one candidate of each.")
    inputs = [same_input_key(example.input) for example in examples]
    held_out = cross_validation_folds(inputs, min(n_folds, len(set(inputs))), seed)
    training = Training.of(model, examples, config, batch_size, template, seed, hf_model)
    folds = []
    for fold in held_out:
        known = [example for i, example in enumerate(examples) if i not in fold]
        folds.append((training.on(augment(known)), [training.examples[i] for i in fold]))
    table: list[FineTuningCandidate] = []
    for rate in rates:
        runs = [_validation_scores(fold, asked, rate, checkpoints) for fold, asked in folds]
        losses, probabilities = torch.tensor(runs, dtype=torch.float64).unbind(dim=2)
        errors = losses.std(dim=0, correction=1) / len(held_out) ** 0.5
        columns = (losses.mean(dim=0), errors, probabilities.mean(dim=0))
        table += [
            FineTuningCandidate(rate, at, loss, error, probability, len(held_out))
            for at, loss, error, probability in zip(
                checkpoints, *(column.tolist() for column in columns), strict=True
            )
        ]
    best = max(table, key=_score)
    training = training.on(augment(examples))
    fine_tuned = training.fine_tune(best.learning_rate, best.steps)
    return FineTuningSelection(fine_tuned, tuple(table), best.learning_rate, best.steps)


def _score(candidate: FineTuningCandidate) -> float:
    probability = candidate.validation_probability
    return -math.inf if math.isnan(probability) else probability


def _validation_scores(
    fold: Training, asked: Sequence[TokenisedExample], learning_rate: float, steps: Sequence[int]
) -> list[tuple[float, float]]:
    """Loss and probability of the examples held out, at each of the numbers of steps of one run."""
    scores = []
    with adapted(fold.hf_model, fold.config, fold.seed) as hf_model:
        for _ in fold.run(hf_model, learning_rate, steps, []):
            with torch.no_grad():
                own = [t.double() for t in token_losses(hf_model, asked)]
            loss = sum(float(t.mean()) for t in own) / len(own)
            scores.append((loss, sum(float((-t.sum()).exp()) for t in own) / len(own)))
    return scores
