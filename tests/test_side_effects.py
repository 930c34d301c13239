"""Side effects against plain forwards over whole prompts."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F

from tl_laai.edits import Edit
from tl_laai.side_effects import UNRELATED, next_token_kl

PROMPTS = ("abc", "d", "efg hi")


def test_the_kl_is_that_of_plain_forwards(model: Any) -> None:
    check_against_plain_forwards(model)


def test_the_kl_under_capped_logits_is_that_of_plain_forwards() -> None:
    check_against_plain_forwards(oracle.shared_model("bridge", "gemma2"))


def check_against_plain_forwards(model: Any) -> None:
    delta = oracle.random_delta(model, scale=2.0)
    moved = next_token_kl(model, {"none": Edit(), "some": Edit({1: delta})}, PROMPTS)
    assert moved["none"].abs().max() < 1e-12
    for i, text in enumerate(PROMPTS):
        tokens = model.to_tokens(text)[0].tolist()
        plain = oracle.logits_under_edits(model, tokens, len(tokens))[-1].log_softmax(0)
        edited = oracle.logits_under_edits(model, tokens, len(tokens), {1: delta})[-1]
        expected = F.kl_div(edited.log_softmax(0), plain, reduction="sum", log_target=True)
        assert moved["some"][i].item() == pytest.approx(expected.item(), rel=1e-8)
    assert moved["some"].min() > 1e-3


def test_unrelated_texts_are_different_beginnings(model: Any) -> None:
    assert len(set(UNRELATED)) == len(UNRELATED) == 20
    moved = next_token_kl(model, {"some": Edit({0: torch.ones(4, 8)})})
    assert moved["some"].shape == (20,)
