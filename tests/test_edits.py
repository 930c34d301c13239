"""Edits that fit no model, or not this one, are refused by name."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch

from tl_laai.decoding import answer_log_probabilities, decode
from tl_laai.edits import Edit
from tl_laai.prefix import freeze


@pytest.fixture
def windowed(backend: str) -> Any:
    return oracle.shared_model(backend, "gemma")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit({7: torch.zeros(4, 8)}), "deltas has layer 7; this model has layers 0 to 3"),
        (Edit({-1: torch.zeros(4, 8)}), "deltas has layer -1"),
        (Edit(scale={4: torch.ones(4)}), "scale has layer 4"),
        (
            Edit({1: torch.zeros(1, 8)}),
            r"deltas\[1\] has shape \[1, 8\]; this model needs \[4, 8\]",
        ),
        (Edit({1: torch.zeros(4, 7)}), r"needs \[4, 8\]"),
        (Edit(scale={1: torch.ones(1)}), r"scale\[1\] has shape \[1\]; this model needs \[4\]"),
        (Edit(residual={4: torch.ones(16)}), "residual has layer 4; this model has layers 0 to 3"),
        (
            Edit(replace={1: torch.ones(4)}),
            r"replace\[1\] has shape \[4\]; this model needs \[16\]",
        ),
    ],
)
def test_edits_that_do_not_fit_the_model_are_refused(
    windowed: Any, edit: Edit, message: str
) -> None:
    prompts = freeze(windowed, oracle.random_examples(oracle.LENGTHS))
    with pytest.raises(ValueError, match=message):
        decode(prompts, [Edit(), edit], max_new_tokens=1)
    with pytest.raises(ValueError, match=message):
        answer_log_probabilities(prompts, [Edit(), edit])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"deltas": {1: torch.zeros(8)}}, r"deltas\[1\] has shape \[8\]; give \[n_heads, d_head\]"),
        ({"scale": {2: torch.ones(4, 8)}}, r"scale\[2\] has shape \[4, 8\]; give \[n_heads\]"),
        ({"deltas": {1: torch.full((4, 8), torch.nan)}}, r"deltas\[1\] holds NaN"),
        ({"scale": {1: torch.full((4,), torch.inf)}}, r"scale\[1\] holds NaN or infinity"),
        (
            {"residual": {1: torch.ones(1, 8)}},
            r"residual\[1\] has shape \[1, 8\]; give \[d_model\]",
        ),
        ({"replace": {1: torch.full((8,), torch.nan)}}, r"replace\[1\] holds NaN"),
        ({"position": "last"}, "position is 'last'; use one of"),
    ],
)
def test_edits_that_fit_no_model_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Edit(**arguments)
