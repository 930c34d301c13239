"""What methods share: settings, few-shot prompts without the asked example, right and wrong."""

from __future__ import annotations

import oracle
import pytest
import torch
from methods_on_tiny import EXAMPLES, prompt_after, residual, tokens

from tl_laai.controls import shuffled_answers
from tl_laai.methods import (
    Setting,
    every_second,
    given,
    leave_one_out,
    possible_heads,
    read,
    read_answers,
)
from tl_laai.prompts import DEFAULT_TEMPLATE
from tl_laai.vectors import TaskVector


def test_a_setting_names_what_is_set_and_nothing_else() -> None:
    assert str(Setting(layer=9, strength=2.0)) == "layer 9, strength 2"
    assert str(Setting(n_heads=4, learning_rate=0.03)) == "n heads 4, learning rate 0.03"
    assert str(Setting()) == ""
    assert given(0) == 0
    with pytest.raises(ValueError, match="another method's"):
        given(None)


def test_each_example_is_asked_after_all_the_others(backend: str) -> None:
    model = oracle.shared_model(backend, "llama")
    shown = [*EXAMPLES[:1], *EXAMPLES[2:]]
    asked = leave_one_out(model, EXAMPLES, EXAMPLES)[1]
    assert asked.prompt == prompt_after(model, shown, EXAMPLES[1].input)
    assert asked.output == EXAMPLES[1].output
    with pytest.raises(ValueError, match=r"examples holds 1.*at least two"):
        leave_one_out(model, EXAMPLES[:1], EXAMPLES[:1])


def test_answers_are_read_at_their_last_token_behind_the_prompt(backend: str) -> None:
    model = oracle.shared_model(backend, "gemma")
    right, wrong = read_answers(model, EXAMPLES, 3)
    swapped = shuffled_answers(EXAMPLES, 3)
    for states, examples in ((right, EXAMPLES), (wrong, swapped)):
        for i, example in enumerate(examples):
            text = DEFAULT_TEMPLATE.render(example.input) + " " + example.output
            expected = residual(model, tokens(model, text), 2)
            torch.testing.assert_close(states.residuals[2, i], expected, rtol=1e-9, atol=1e-9)


def test_texts_are_read_at_their_last_token(backend: str) -> None:
    model = oracle.shared_model(backend, "gpt2")
    texts = [tokens(model, "abc"), tokens(model, "d")]
    for i, text in enumerate(texts):
        expected = residual(model, text, 1)
        got = read(model, texts).residuals[1, i]
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_grids_fit_the_model(backend: str) -> None:
    model = oracle.shared_model(backend, "gemma")
    assert every_second(model, None) == (1, 3)
    assert every_second(model, (0, 2)) == (0, 2)
    assert possible_heads(model, (4, 16, 30)) == (4, 16)
    assert [s.layer for s in TaskVector().grid(model)] == [1, 2, 3]
