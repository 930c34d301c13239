"""Baselines on opinions, against the same by hand: a prompt and the favourite's letter."""

from __future__ import annotations

import string
from dataclasses import replace
from typing import Any

import oracle
import pytest
from test_surveys import QUESTIONS, SHOWN, TEMPLATE

from tl_laai.baselines import METHODS, tune
from tl_laai.opinion_baselines import tune_on_opinions
from tl_laai.opinions import OpinionQuestion, option_orders
from tl_laai.prompts import PromptTemplate
from tl_laai.tasks import Example

EVEN = OpinionQuestion("bee", "bee?", ("x", "y", "z"), (0.2, 0.4, 0.4))  # y, as in few-shot prompts


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_right_answers_are_the_favourites_letters(backend: str, seed: int) -> None:
    model = oracle.shared_model(backend, "llama")
    template = replace(TEMPLATE, answer_prefix=" ", separator="\n\n\n")
    asked = (*SHOWN, EVEN, *QUESTIONS)
    right = []
    for question in asked:
        [order] = option_orders(question, 1, seed=seed)
        prompt = template.ask(question.question, [question.options[i] for i in order])
        letter = string.ascii_uppercase[order.index(question.favourite)]
        assert template.demonstrate([question], seed=seed) == f"{prompt} {letter}\n\n\n"
        right.append(Example(prompt, letter))
    bare = PromptTemplate("{input}", answer_prefix=" ", separator="\n\n\n", answer_end="")
    told: list[tuple[int, int]] = []

    def tell(done: int, total: int) -> None:
        told.append((done, total))

    options: dict[str, Any] = {"seed": seed, "progress": tell}
    for name in ("task-vector", "in-context-vector"):
        by_hand = tune(model, right, METHODS[name], template=bare, **options)
        found = tune_on_opinions(model, asked, METHODS[name], template=template, **options)
        assert found.setting == by_hand.setting
        assert found.table == by_hand.table
    assert told == [(1, 3), (2, 3), (3, 3)] * 4


def test_fewer_than_four_questions_are_refused(backend: str) -> None:
    model = oracle.shared_model(backend, "llama")
    with pytest.raises(ValueError, match="needs at least 4"):
        tune_on_opinions(model, QUESTIONS, METHODS["task-vector"], template=TEMPLATE)
