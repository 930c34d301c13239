"""Opinion evaluations: each row against plain forwards, one prompt at a time, and the floors."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from tiny import VOCABULARY_SIZE, tiny_bridge

from tl_laai.decoding import option_log_probabilities
from tl_laai.edits import Edit
from tl_laai.fitting import fit
from tl_laai.opinions import OpinionQuestion, OpinionTemplate, option_examples
from tl_laai.prefix import freeze
from tl_laai.problems import engine_for
from tl_laai.prompts import TokenisedExample, tokenise_options
from tl_laai.surveys import (
    MEASURES,
    evaluate_opinions,
    mean_floor,
    question_losses,
    uniform_floor,
)

# Byte-level tokens: a name must be one character; contexts hold 128.
TEMPLATE = OpinionTemplate(
    text="{question}\n{options}\n=", option="{letter}{option}", answer_prefix="", separator="\n"
)
QUESTIONS = (
    OpinionQuestion("tea", "tea?", ("x", "y", "z"), (0.2, 0.7, 0.1)),
    OpinionQuestion("sea", "sea?", ("x", "y"), (0.0, 1.0)),
    OpinionQuestion("fee", "fee?", ("v", "w", "x", "y", "z"), (0.1, 0.2, 0.3, 0.2, 0.2)),
)
SHOWN = (
    OpinionQuestion("pea", "pea?", ("x", "y", "z"), (0.4, 0.3, 0.3)),
    OpinionQuestion("key", "key?", ("x", "y", "z"), (0.0, 0.1, 0.9)),
)


@pytest.fixture
def model(backend: str) -> Any:
    return oracle.shared_model(backend, "llama")


def edits_of(model: Any) -> dict[str, Edit]:
    delta = oracle.random_delta(model)
    return {"none": Edit(), "one": Edit({1: delta}), "two": Edit({0: delta, 2: -delta})}


def divergence(p: Sequence[float], q: Sequence[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def carried(p: Sequence[float], q: Sequence[float]) -> float:
    """Shares of p carried to places of q, first come first served: the cheapest way on a line."""
    have, need, cost = list(p), list(q), 0.0
    i = j = 0
    while i < len(have) and j < len(need):
        moved = min(have[i], need[j])
        cost += moved * abs(i - j)
        have[i] -= moved
        need[j] -= moved
        if have[i] <= need[j]:
            i += 1
        else:
            j += 1
    return cost / (len(have) - 1)


def slow_shares(
    model: Any, question: OpinionQuestion, edit: Edit, n_orders: int, shown: Sequence[Any]
) -> np.ndarray:
    """Probability of each option over the whole vocabulary, `[n_orders, n_options]`."""
    rows = []
    for example in option_examples(
        [question], n_orders=n_orders, seed=1, template=TEMPLATE, demonstrations=shown
    ):
        tokens = model.to_tokens(example.prompt)[0].tolist()
        with torch.no_grad():
            logits = oracle.logits_under_edits(model, tokens, len(tokens), edit.deltas)[-1]
        probabilities = logits.double().softmax(-1)
        row = [0.0] * len(question.options)
        for letter, option in zip("ABCDE", example.order, strict=False):
            [token] = model.to_tokens(letter, prepend_bos=False)[0].tolist()
            row[option] = probabilities[token].item()
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("shown", [(), SHOWN], ids=["zero-shot", "few-shot"])
def test_rows_are_those_of_plain_forwards_one_prompt_at_a_time(
    model: Any, shown: Sequence[OpinionQuestion]
) -> None:
    edits = edits_of(model)
    results = evaluate_opinions(
        model, QUESTIONS, edits, n_orders=4, seed=1, template=TEMPLATE, demonstrations=shown
    )
    assert list(results) == list(edits)
    for name, edit in edits.items():
        for question, row in zip(QUESTIONS, results[name].rows, strict=True):
            shares = slow_shares(model, question, edit, 4, shown)
            among = shares / shares.sum(axis=1, keepdims=True)
            predicted, group = among.mean(axis=0), np.array(question.distribution)
            assert row.question == question.id
            assert row.predicted == pytest.approx(predicted, rel=1e-9)
            assert row.outside == pytest.approx(1 - shares.sum(axis=1).mean(), rel=1e-9)
            assert row.kl == pytest.approx(divergence(group, predicted), rel=1e-9)
            assert row.prompt_kl == pytest.approx(
                np.mean([divergence(group, own) for own in among]), rel=1e-9
            )
            assert row.total_variation == pytest.approx(abs(group - predicted).sum() / 2)
            assert row.wasserstein == pytest.approx(carried(group, predicted), abs=1e-9)


def test_losses_of_questions_are_those_of_their_averaged_answers_by_plain_forwards(
    model: Any,
) -> None:
    edits = edits_of(model)
    weight = 0.3
    prompts = option_examples(QUESTIONS, n_orders=3, seed=1, template=TEMPLATE)
    weighed = [replace(e, outside_weight=weight) for e in prompts[::-1]]  # no order is assumed
    found = question_losses(model, weighed, list(edits.values()))
    for own, edit in zip(found, edits.values(), strict=True):
        slow = []
        for question in QUESTIONS[::-1]:
            shares = slow_shares(model, question, edit, 3, ())
            inside = shares.sum(axis=1, keepdims=True)
            kl = divergence(question.distribution, (shares / inside).mean(axis=0))
            slow.append(kl - weight * np.log(inside).mean())
        assert own.tolist() == pytest.approx(slow, rel=1e-9)


def test_losses_of_questions_that_are_asked_once_are_the_loss_of_a_fit(model: Any) -> None:
    [prompt, *others] = option_examples(QUESTIONS, n_orders=1, template=TEMPLATE)
    same_name = replace(prompt, distribution=prompt.distribution[::-1])  # another group's answers
    asked = [prompt, same_name, replace(prompt, question=""), replace(prompt, question=""), *others]
    own = replace(others[0], order=(), question="none")  # names in the question's own order
    delta = oracle.random_delta(model)
    losses = question_losses(model, [*asked, own], [Edit({1: delta})])
    slow = [
        engine_for(model, [[e]], layers=[1]).losses(delta[None], torch.tensor([0])).item()
        for e in [*asked, own]
    ]
    assert losses[0].tolist() == pytest.approx(slow, rel=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "gemma", "neox"])
def test_option_probabilities_are_those_of_the_whole_vocabulary(family: str) -> None:
    model = oracle.shared_model("bridge", family)
    examples = option_examples(QUESTIONS, n_orders=2, template=TEMPLATE)
    tokens = [tokenise_options(model, example) for example in examples]
    options = torch.full((len(examples), 5), -1)
    for i, (_, names) in enumerate(tokens):
        options[i, : len(names)] = torch.tensor(names)
    prompts = freeze(model, [TokenisedExample(prompt, (), "", "") for prompt, _ in tokens])
    edits = list(edits_of(model).values())
    found = option_log_probabilities(prompts, edits, options)
    assert bool((found.isinf() == (options < 0)).all())
    for i, edit in enumerate(edits):
        for j, (prompt, names) in enumerate(tokens):
            with torch.no_grad():
                logits = oracle.logits_under_edits(model, prompt, len(prompt), edit.deltas)[-1]
            expected = logits.double().log_softmax(-1)[list(names)]
            assert oracle.relative(found[i, j, : len(names)], expected) < 1e-9


def test_probabilities_of_all_tokens_sum_to_one_in_half_precision_too() -> None:
    model = oracle.run_once(tiny_bridge("llama", torch.bfloat16))
    prompts = freeze(model, [TokenisedExample((5, 9, 7, 30), (), "", "")])
    found = option_log_probabilities(prompts, [Edit()], torch.arange(VOCABULARY_SIZE)[None])
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_a_model_that_is_fitted_to_a_group_comes_closer_to_it(model: Any) -> None:
    edits = {"none": Edit()}
    losses = {}
    for name, weight in (("among", 0.0), ("all", 1.0)):
        examples = option_examples(QUESTIONS, n_orders=4, template=TEMPLATE, outside_weight=weight)
        fitted = fit(model, examples, layer=1, solver="adam", max_evaluations=25)
        edits[name] = Edit(dict(fitted.intervention.deltas))
        losses[name] = fitted.solution.loss
    results = evaluate_opinions(model, QUESTIONS, edits, template=TEMPLATE)
    assert results["among"].mean("prompt_kl") == pytest.approx(losses["among"], rel=1e-6)
    assert results["among"].mean("kl") < 0.8 * results["none"].mean("kl")
    assert results["all"].mean("prompt_kl") < losses["all"]
    inside = {name: 1 - result.mean("outside") for name, result in results.items()}
    assert inside["all"] > 4 * max(inside["none"], inside["among"])  # measured: 8 times
    kls = [e.mean("kl") <= e.mean("prompt_kl") for e in results.values()]
    assert all(kls)  # the divergence is convex, so averaging first cannot be worse


def test_the_uniform_floor_says_each_option_equally_often() -> None:
    floor = uniform_floor(QUESTIONS)
    for question, row in zip(QUESTIONS, floor.rows, strict=True):
        expected = divergence(
            question.distribution, [1 / len(question.options)] * len(question.options)
        )
        assert row.kl == row.prompt_kl == pytest.approx(expected)
        assert row.outside == 0


def test_the_mean_floor_averages_questions_with_as_many_options_by_position() -> None:
    floor = mean_floor(QUESTIONS, SHOWN)
    assert floor.rows[0].predicted == pytest.approx((0.2, 0.2, 0.6))
    assert floor.rows[1].predicted == (0.5, 0.5)
    assert floor.rows[1].kl == pytest.approx(np.log(2))
    assert floor.rows[2].predicted == pytest.approx((0.2,) * 5)


def test_figures_and_rows_can_be_written_as_json() -> None:
    floor = uniform_floor(QUESTIONS)
    low, high = floor.interval("kl")
    assert low < floor.mean("kl") < high
    figures = json.loads(json.dumps(floor.to_dict(rows=True), allow_nan=False))
    assert figures["n"] == 3
    assert figures["kl_interval"] == [low, high]
    assert set(MEASURES) <= set(figures)
    assert [row["question"] for row in figures["rows"]] == ["tea", "sea", "fee"]
    with pytest.raises(ValueError, match="measure is 'accuracy'"):
        floor.values("accuracy")  # type: ignore[arg-type]


def test_questions_that_are_shown_may_not_be_asked(model: Any) -> None:
    edits = {"none": Edit()}
    with pytest.raises(ValueError, match="must not share questions"):
        evaluate_opinions(model, QUESTIONS, edits, template=TEMPLATE, demonstrations=QUESTIONS[:1])
    with pytest.raises(ValueError, match="questions is empty"):
        evaluate_opinions(model, [], edits, template=TEMPLATE)
