"""The lesson of distilled fits taught to others: rows of the table of rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rules_fits import NAME, of_fit
from shared_fits import (
    LABEL_SHARE,
    TAUGHT_STEPS,
    TEACHER_STEPS,
    distilling,
    finetuning,
    layer_of,
)
from tables import TAUGHT, Row, answer_row


def taught_heads(model: Any, data: Any, seed: int) -> list[Row]:
    """Learnt head offsets that learn from a fitted teacher's answers too.

    On offer is what they chose with labels alone on seed 0, on all tasks but synonym.
    """
    from tl_laai.baselines import tune
    from tl_laai.evaluation import evaluate_edits
    from tl_laai.head_vectors import LearntHeads
    from tl_laai.side_effects import next_token_kl

    name, method = "learnt-heads, taught", LearntHeads((12, 36), (0.03,))
    tuned = tune(model, data.train, method, seed=seed, augment=_taught(model, data, seed))
    score = evaluate_edits(model, data.test, {name: tuned.edit})[name]
    moved = next_token_kl(model, {name: tuned.edit})[name]
    return [answer_row(name, score, str(tuned.setting), kl_unrelated=float(moved.mean()))]


def taught_finetuning(method: str, model: Any, data: Any, seed: int) -> list[Row]:
    """LoRA or IA3 that does so; a step sees 16 of some 124 examples."""
    learning = {"augment": _taught(model, data, seed), "steps": (20, 40)}
    return finetuning(model, data, seed, methods=[method], suffix=", taught", **learning)


def taught_fits(model: Any, data: Any, seed: int) -> list[Row]:
    """Delta on the same examples: the teacher's words, where distilled fits learn what it thinks.

    Layer and steps are those of the distilled fit.
    """
    from collections import Counter

    from tl_laai import FitProblem, evaluate, fit_many

    learnt = Counter(_taught(model, data, seed)(data.train))
    weights = [float(n) for n in learnt.values()]
    problem = FitProblem([*learnt], layer_of(NAME, TAUGHT, data.task.name, seed), weights=weights)
    [fitted] = fit_many(model, [problem], solver="adam", max_evaluations=TAUGHT_STEPS)
    score = evaluate(model, data.test, intervention=fitted.intervention)
    return [answer_row("fitted, taught", score, f"layer {fitted.layer}", **of_fit(fitted))]


def _taught(model: Any, data: Any, seed: int) -> Callable[[Sequence[Any]], list[Any]]:
    """From labelled examples to those and a fitted teacher's answers to inputs that are made up.

    Teacher, inputs and the labels' share are those of distilled fits; its answers are labels here
    (sequence-level distillation, Kim & Rush 2016), not distributions. A fold's teacher knows the
    fold's training part alone, but the inputs are made up once, from all ten.
    """
    from functools import cache

    from tl_laai import Example
    from tl_laai.distillation import teach
    from tl_laai.made_up_inputs import make_up_inputs
    from tl_laai.prompts import decoded_answer

    settings = distilling(seed, TEACHER_STEPS)["distillation"].on(model)
    inputs = make_up_inputs(model, data.train, settings.n_inputs, seed=seed)

    @cache
    def learn_from(labelled: tuple[Any, ...]) -> list[Any]:
        said = [example.tokens for example in teach(model, inputs, labelled, settings)]
        texts = [model.tokenizer.decode(list(tokens.answer)) for tokens in said]
        # An answer that was cut off has no line break, and would be taught one; an empty one is
        # no label.
        answered = [
            Example(tokens.input, answer)
            for tokens, text in zip(said, texts, strict=True)
            if "\n" in text and (answer := decoded_answer(text))
        ]
        n_copies = round(LABEL_SHARE / (1 - LABEL_SHARE) * len(answered) / len(labelled))
        return [*answered, *labelled * max(1, n_copies)]

    return lambda labelled: learn_from(tuple(labelled))
