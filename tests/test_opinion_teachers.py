"""Taught opinions: each question's shares against plain few-shot forwards, one at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import oracle
import pytest
from test_surveys import QUESTIONS, SHOWN, TEMPLATE, slow_shares

from tl_laai.edits import Edit
from tl_laai.opinion_teachers import taught_questions


@pytest.fixture
def model(backend: str) -> Any:
    return oracle.shared_model(backend, "llama")


def test_shares_are_those_of_plain_forwards_after_the_other_demonstrations(model: Any) -> None:
    pea, key = SHOWN
    tea, sea, fee = QUESTIONS
    asked = (tea, key, sea, pea, fee)
    told: list[tuple[int, int]] = []
    taught = taught_questions(
        model,
        asked,
        SHOWN,
        n_orders=2,
        seed=1,
        template=TEMPLATE,
        progress=lambda done, total: told.append((done, total)),
    )
    behind = {"key": (pea,), "pea": (key,)}  # no question is shown before itself
    for question, found in zip(asked, taught, strict=True):
        shares = slow_shares(model, question, Edit(), 2, behind.get(question.id, SHOWN))
        predicted = (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0)
        assert found.distribution == pytest.approx(predicted, rel=1e-9)
        assert replace(found, distribution=question.distribution) == question
    assert told == [(3, 5), (4, 5), (5, 5)]


def test_the_groups_shares_are_seen_only_as_the_favourites_of_what_is_shown(model: Any) -> None:
    def taught(asked: Any, shown: Any) -> list[tuple[float, ...]]:
        found = taught_questions(model, asked, shown, seed=1, template=TEMPLATE)
        return [question.distribution for question in found]

    pea, key = SHOWN
    tea = QUESTIONS[0]
    other = [replace(tea, distribution=(0.0, 0.0, 1.0)), replace(pea, distribution=(0.6, 0.4, 0.0))]
    assert taught([tea, pea], SHOWN) == taught(other, [other[1], key])
    turned = replace(pea, distribution=(0.0, 1.0, 0.0))
    assert taught([tea], [turned, key]) != taught([tea], SHOWN)


def test_a_teacher_without_anything_to_read_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"demonstrations hold 0 questions.*at least one other"):
        taught_questions(model, QUESTIONS, (), template=TEMPLATE)
    with pytest.raises(ValueError, match=r"none but 'pea\?' itself"):
        taught_questions(model, SHOWN[:1], SHOWN[:1], template=TEMPLATE)
    with pytest.raises(ValueError, match="questions is empty"):
        taught_questions(model, (), SHOWN, template=TEMPLATE)
