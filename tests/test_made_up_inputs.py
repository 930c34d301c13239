"""Inputs that a model makes up: new, repeatable, and cut where the template goes on."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
from tiny import tiny_model

from tl_laai import made_up_inputs
from tl_laai.distributions import NothingTaughtError
from tl_laai.made_up_inputs import make_up_inputs
from tl_laai.prompts import PromptTemplate, tokenise, tokenise_prompts
from tl_laai.tasks import Example

TEMPLATE = PromptTemplate(text="{input}>", answer_prefix="", separator=";", answer_end=".")
SHOWN = (Example("ab", "x"), Example("c", "yz"), Example("de", "w"))


@pytest.fixture(scope="module", params=("llama", "gemma"))
def model(request: pytest.FixtureRequest) -> Any:
    return oracle.run_once(tiny_model("bridge", request.param))


def test_made_up_inputs_are_new_repeatable_and_cut_where_the_template_goes_on(model: Any) -> None:
    made = make_up_inputs(model, SHOWN, 40, template=TEMPLATE, seed=1)
    assert made == make_up_inputs(model, SHOWN, 40, template=TEMPLATE, seed=1)
    assert made != make_up_inputs(model, SHOWN, 40, template=TEMPLATE, seed=2)
    assert 5 <= len(set(made)) == len(made) <= 40  # most of what a random model says is cut off
    for text in made:
        assert ">" not in text
        assert text.strip() == text != ""
        assert text not in {e.input for e in SHOWN}
    assert make_up_inputs(model, SHOWN, 0, template=TEMPLATE) == ()


def test_made_up_inputs_end_where_all_of_the_template_goes_on(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ("water to me: x", "tea to you", "\nx", "at")
    answers = [tuple(model.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]
    monkeypatch.setattr(made_up_inputs, "decode", lambda *_, **__: (answers,))
    template = PromptTemplate("{input} to me:", separator=";")
    assert make_up_inputs(model, SHOWN, 4, template=template) == ("water", "tea to you", "at")
    answers = [answers[0], tuple(range(3, 3 + made_up_inputs._LONGEST_INPUT))]  # cut off
    assert make_up_inputs(model, SHOWN, 4, template=template) == ("water",)
    with pytest.raises(ValueError, match=r"template has \{input\} 2 times"):
        make_up_inputs(model, SHOWN, 4, template=PromptTemplate("{input} or {input}"))


def test_made_up_inputs_end_where_the_answer_begins_in_their_line(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ("dog -> chien", "cat -> chat")
    answers = [tuple(model.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]
    monkeypatch.setattr(made_up_inputs, "decode", lambda *_, **__: (answers,))
    template = PromptTemplate("{input}", answer_prefix=" -> ", separator="\n")
    assert make_up_inputs(model, SHOWN, 2, template=template) == ("dog", "cat")


def test_inputs_of_several_lines_are_not_made_up(model: Any) -> None:
    shown = (*SHOWN, Example("one\ntwo", "x"))
    with pytest.raises(NothingTaughtError, match=r"input 'one\\ntwo' has several lines"):
        make_up_inputs(model, shown, 2, template=TEMPLATE)


def test_inputs_may_have_twice_the_tokens_of_those_shown(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed: list[int] = []

    texts = ("at", "x" * made_up_inputs._LONGEST_INPUT)
    samples = [tuple(model.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]
    assert len(samples[1]) == made_up_inputs._LONGEST_INPUT

    def decoded(*_: Any, max_new_tokens: int, **__: Any) -> Any:
        allowed.append(max_new_tokens)
        return [samples]

    monkeypatch.setattr(made_up_inputs, "decode", decoded)
    long = Example("a b " * 5, "x")
    assert make_up_inputs(model, SHOWN, 2, template=TEMPLATE) == texts[:1]  # the other is cut off
    assert make_up_inputs(model, (*SHOWN, long), 2, template=TEMPLATE) == texts
    n_tokens = len(tokenise_prompts(model, [long.input])[0])
    assert {*allowed} == {made_up_inputs._LONGEST_INPUT, 2 * n_tokens}
    # Of a full context, what is left beside one more example.
    make_up_inputs(model, (long,) * 3, 1, template=TEMPLATE)
    opening = TEMPLATE.render("?", (long,) * 3).rsplit("?", 1)[0]
    (whole,) = tokenise(model, [long], template=TEMPLATE)
    room = model.cfg.n_ctx - len(tokenise_prompts(model, [opening])[0])
    room -= len(whole.prompt) + len(whole.answer)
    assert made_up_inputs._LONGEST_INPUT < allowed[-1] == room < 2 * n_tokens
    assert make_up_inputs(model, (), 1, template=TEMPLATE) == texts[:1]


def test_a_model_that_makes_up_nothing_is_said(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made_up_inputs, "decode", lambda *_, **__: ([(), ()],))
    with pytest.raises(NothingTaughtError, match="n is 2, and the model made up no input after 3"):
        make_up_inputs(model, SHOWN, 2, template=TEMPLATE)
