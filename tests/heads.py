"""Unembeddings and hidden states of ordinary sizes, and their logits all at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tl_laai import vocabulary


def slow_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None) -> Tensor:
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    return logits if cap is None else cap * torch.tanh(logits / cap)


def draw(
    n: int, d_vocab: int, d_model: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`hidden, weight, targets, bias` of ordinary sizes."""
    generator = torch.Generator().manual_seed(seed)
    hidden = 2 * torch.randn(n, d_model, generator=generator, dtype=torch.float64)
    weight = torch.randn(d_vocab, d_model, generator=generator, dtype=torch.float64)
    targets = torch.randint(d_vocab, (n,), generator=generator)
    bias = torch.randn(d_vocab, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), targets, bias.to(dtype)


def narrow_slices(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr(vocabulary, "slice_width", lambda *_: width)
