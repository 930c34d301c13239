"""What a fit minimises: cross-entropy of answers, KL to a distribution; gradients in one pass.

Both are `logsumexp(logits) - <target, logits>` a token, up to a constant. With a vocabulary of
hundreds of thousands the logits of a batch do not fit in a cache, and often not in memory, so
the loss and its gradient with respect to the hidden state are accumulated together over slices
of the vocabulary (an online softmax, as in FlashAttention, Dao et al. 2022): each slice of the
unembedding is read once an evaluation and no logits are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

SLICE_ELEMENTS = 1 << 21
"""Largest number of logits alive at once; 8 MiB in float32."""


def slice_width(n_tokens: int, d_vocab: int, d_model: int) -> int:
    """How many vocabulary entries one slice holds: few logits, and a weight slice of ~8 MiB."""
    width = min(SLICE_ELEMENTS // max(1, n_tokens), SLICE_ELEMENTS // max(1, d_model))
    return max(1, min(d_vocab, max(512, width)))


class _UnembeddedCrossEntropy(torch.autograd.Function):
    """Per-token cross-entropy and, in the same pass, its gradient with respect to hidden."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
    ) -> Tensor:
        n, d = hidden.shape
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        needs_gradient = hidden.requires_grad
        source = hidden.detach()
        target_weight = weight[targets]
        target_logit = (source.to(accumulate) * target_weight.to(accumulate)).sum(-1)
        if bias is not None:
            target_logit = target_logit + bias[targets].to(accumulate)
        target_slope = None
        if softcap is not None:
            squashed = torch.tanh(target_logit / softcap)
            target_logit, target_slope = softcap * squashed, 1 - squashed.square()

        # One column a token: a tall product with a narrow right side is measurably faster here
        # than a short one with a wide right side.
        columns = source.T.contiguous()
        # Not -inf: a slice in which a bias of -inf forbids every token would give inf - inf.
        peak = source.new_full((n,), torch.finfo(accumulate).min, dtype=accumulate)
        total = source.new_zeros((n,), dtype=accumulate)
        pulled = source.new_zeros((n, d), dtype=accumulate)
        width = slice_width(n, weight.shape[0], d)
        for start in range(0, weight.shape[0], width):
            part = weight[start : start + width]
            logits = (part @ columns).to(accumulate)
            if bias is not None:
                logits += bias[start : start + width, None]
            slope = None
            if softcap is not None:
                logits = torch.tanh(logits.div_(softcap))
                slope = 1 - logits.square()
                logits *= softcap
            new_peak = torch.maximum(peak, logits.amax(dim=0))
            rescale = torch.exp(peak - new_peak)
            logits = logits.sub_(new_peak).exp_()
            total = total * rescale + logits.sum(dim=0)
            if needs_gradient:
                if slope is not None:
                    logits *= slope
                pulled *= rescale[:, None]
                if part.dtype == accumulate:
                    pulled.addmm_(logits.T, part)
                else:
                    pulled += (logits.T.to(part.dtype) @ part).to(accumulate)
            peak = new_peak
        loss = peak + total.log() - target_logit
        if needs_gradient:
            pull = target_weight.to(accumulate)
            if target_slope is not None:
                pull = pull * target_slope[:, None]
            ctx.save_for_backward((pulled / total[:, None] - pull).to(hidden.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (grad_outputs[0][:, None] * gradient).to(gradient.dtype), None, None, None, None


def cross_entropy(
    hidden: Float[Tensor, "n d_model"],
    weight: Float[Tensor, "d_vocab d_model"],
    targets: Int[Tensor, " n"],
    *,
    bias: Float[Tensor, " d_vocab"] | None = None,
    softcap: float | None = None,
) -> Float[Tensor, " n"]:
    """Cross-entropy of one target token for each hidden state, in nats.

    Equals `F.cross_entropy(cap(hidden @ weight.T + bias), targets, reduction="none")`; the
    logits are never held at once. Differentiable in `hidden` only.

    Example:
        >>> import torch
        >>> cross_entropy(torch.zeros(1, 2), torch.zeros(4, 2), torch.tensor([3]))
        tensor([1.3863])

    Args:
        hidden: normalised last residuals, `[n, d_model]`.
        weight: unembedding, `[d_vocab, d_model]`, any memory layout.
        targets: token ids, `[n]`.
        bias: added to the logits, `[d_vocab]`.
        softcap: logits become `softcap * tanh(logits / softcap)`.

    Returns:
        `[n]`, float32 (float64 for float64 inputs).
    """
    loss: Tensor = _UnembeddedCrossEntropy.apply(hidden, weight, bias, targets, softcap)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return loss


def greedy(
    hidden: Float[Tensor, "n d_model"],
    weight: Float[Tensor, "d_vocab d_model"],
    *,
    bias: Float[Tensor, " d_vocab"] | None = None,
) -> Int[Tensor, " n"]:
    """The most probable next token of each hidden state, `[n]` (a soft cap keeps the order)."""
    best = hidden.new_full((hidden.shape[0],), -torch.inf)
    token = torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)
    width = slice_width(hidden.shape[0], weight.shape[0], hidden.shape[1])
    for start in range(0, weight.shape[0], width):
        logits = hidden @ weight[start : start + width].T
        if bias is not None:
            logits = logits + bias[start : start + width]
        value, index = logits.max(dim=-1)
        better = value > best
        best = torch.where(better, value, best)
        token = torch.where(better, index + start, token)
    return token
