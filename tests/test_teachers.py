"""Fitted teachers: the edit is that of Adam on plain few-shot forwards, and sees its part alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import oracle
import pytest
import torch

from tl_laai import teachers
from tl_laai.distributions import NothingTaughtError
from tl_laai.edits import Edit
from tl_laai.engine import Engine
from tl_laai.prompts import DEFAULT_TEMPLATE, PromptTemplate, tokenise
from tl_laai.relaxation import LEARNING_RATE
from tl_laai.splits import seeded_order
from tl_laai.tasks import Example
from tl_laai.teachers import fit_teacher

TEMPLATE = PromptTemplate(text="{input}>", answer_prefix="", separator=";\n", answer_end=";")
EXAMPLES = (Example("ab", "x"), Example("c", "yz"), Example("de", "w"), Example("AB", "v"))


@pytest.fixture(params=("llama", "gemma2"))
def model(request: pytest.FixtureRequest) -> Any:
    return oracle.shared_model("bridge", request.param)


def questions(model: Any, examples: Sequence[Example], seed: int, n: int) -> list[Any]:
    """Each example after those with another input, in one drawn order each, `n` in all."""
    ends_as_shown = PromptTemplate("{input}>", answer_prefix="", separator=";\n", answer_end=";\n")
    found = []
    for i, query in enumerate((seeded_order(examples, seed) * n)[:n]):
        others = [e for e in examples if e.input.lower() != query.input.lower()]
        shown = seeded_order(others, seed + i)
        found += tokenise(model, [query], template=ends_as_shown, demonstrations=shown)
    return found


def slowly_fitted(model: Any, asked: Sequence[Any], layer: int, steps: int) -> torch.Tensor:
    """Adam of torch on full forwards with a plain hook."""
    delta = torch.zeros_like(oracle.random_delta(model)).requires_grad_()
    optimiser = torch.optim.Adam([delta], lr=LEARNING_RATE)
    for _ in range(steps):
        _, delta.grad = oracle.loss_and_gradient(model, asked, layer, delta)
        optimiser.step()
    return delta.detach()


@pytest.mark.parametrize("layer", [None, 1])
def test_a_teachers_edit_is_adams_on_its_plain_few_shot_prompts(
    model: Any, layer: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = model.cfg.n_layers // 3 if layer is None else layer
    monkeypatch.setattr(teachers, "QUESTIONS", 6)
    edit = fit_teacher(model, EXAMPLES, steps=3, layer=layer, template=TEMPLATE, seed=7)
    slow = slowly_fitted(model, questions(model, EXAMPLES, 7, 6), used, 3)
    assert set(edit.deltas) == {used}
    assert edit.position == "prompt_end"
    # Adam divides gradients by their own size, which makes rounding of the smallest ones large.
    torch.testing.assert_close(edit.deltas[used].double(), slow, rtol=1e-4, atol=1e-6)


def test_no_steps_leave_a_teacher_as_it_is(model: Any) -> None:
    assert fit_teacher(model, (), steps=0) == Edit()


def test_a_teacher_needs_two_different_inputs(model: Any) -> None:
    same = [EXAMPLES[0], EXAMPLES[3]]
    with pytest.raises(NothingTaughtError, match=r"the input 'ab' alone.*teacher_steps=0"):
        fit_teacher(model, same, steps=1, template=DEFAULT_TEMPLATE, seed=1)
    with pytest.raises(NothingTaughtError, match=r"examples is empty.*teacher_steps=0"):
        fit_teacher(model, (), steps=1)


@pytest.mark.parametrize("layer", [-1, 9])
def test_a_layer_that_the_model_has_not_is_refused(model: Any, layer: int) -> None:
    last = model.cfg.n_layers - 1
    with pytest.raises(ValueError, match=f"teacher_layer is {layer}; .* 0 to {last}, or give None"):
        fit_teacher(model, EXAMPLES, steps=1, layer=layer)


def test_a_loss_that_is_not_finite_is_said(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: Engine, deltas: torch.Tensor, problems: torch.Tensor) -> Any:
        return deltas.sum(dim=(1, 2)) * torch.nan, deltas

    monkeypatch.setattr(Engine, "value_and_grad", lost)
    with pytest.raises(NothingTaughtError, match=r"steps is 1, .* not finite.*teacher_steps=0"):
        fit_teacher(model, EXAMPLES, steps=1, template=TEMPLATE)
