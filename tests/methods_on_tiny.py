"""What the tests of baseline methods share: examples, slow few-shot prompts, plain hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import oracle
from torch import Tensor

from tl_laai.prompts import DEFAULT_TEMPLATE
from tl_laai.tasks import Example

# Inputs and answers of several lengths; short, since a byte is a token and the context is 128.
EXAMPLES = tuple(Example(a, b) for a, b in (("ab", "x"), ("cde", "yz"), ("f", "wv"), ("gh", "u")))


def tokens(model: Any, text: str) -> tuple[int, ...]:
    return tuple(model.to_tokens(text)[0].tolist())


def prompt_after(model: Any, shown: Sequence[Example], input: str) -> tuple[int, ...]:
    return tokens(model, DEFAULT_TEMPLATE.render(input, shown))


def residual(model: Any, prompt: Sequence[int], layer: int) -> Tensor:
    """The residual before a layer at the last token, by a plain hook."""
    name = f"blocks.{layer}.hook_resid_pre"
    return oracle.values_at(model, prompt, [name])[name][-1]


def heads(model: Any, prompt: Sequence[int], layer: int) -> Tensor:
    """The heads' outputs of a layer at the last token, by a plain hook."""
    name = f"blocks.{layer}.attn.hook_z"
    z = oracle.values_at(model, prompt, [name])[name][-1]
    return z.view(model.cfg.n_heads, model.cfg.d_head)
