"""Fitted teachers: the edit is that of Adam on plain few-shot forwards, and sees its part alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import oracle
import pytest
import torch

from tl_laai import teachers
from tl_laai.edits import Edit
from tl_laai.prompts import DEFAULT_TEMPLATE, PromptTemplate, tokenise
from tl_laai.relaxation import LEARNING_RATE
from tl_laai.splits import seeded_order
from tl_laai.tasks import Example
from tl_laai.teachers import fit_teachers

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
    (edit,) = fit_teachers(model, [EXAMPLES], steps=3, layer=layer, template=TEMPLATE, seed=7)
    slow = slowly_fitted(model, questions(model, EXAMPLES, 7, 6), used, 3)
    assert set(edit.deltas) == {used}
    assert edit.position == "prompt_end"
    # Adam divides gradients by their own size, which makes rounding of the smallest ones large.
    torch.testing.assert_close(edit.deltas[used].double(), slow, rtol=1e-4, atol=1e-6)


def test_teachers_of_several_parts_are_those_fitted_alone(model: Any) -> None:
    parts = [EXAMPLES[:3], EXAMPLES[1:]]
    together = fit_teachers(model, parts, steps=2, layer=1, template=TEMPLATE, seed=3)
    for part, edit in zip(parts, together, strict=True):
        (alone,) = fit_teachers(model, [part], steps=2, layer=1, template=TEMPLATE, seed=3)
        torch.testing.assert_close(edit.deltas[1], alone.deltas[1], rtol=1e-6, atol=1e-9)


def test_no_steps_leave_teachers_as_they_are(model: Any) -> None:
    assert fit_teachers(model, [EXAMPLES, ()], steps=0) == [Edit(), Edit()]


def test_a_teacher_needs_two_different_inputs(model: Any) -> None:
    same = [EXAMPLES[0], EXAMPLES[3]]
    with pytest.raises(ValueError, match=r"the input 'ab' alone.*teacher_steps=0"):
        fit_teachers(model, [same], steps=1, template=DEFAULT_TEMPLATE, seed=1)
