"""Passes over the vocabulary in slices: what a hidden state makes of its tokens, never all at once.

With a vocabulary of hundreds of thousands the logits of a batch do not fit in a cache, and often
not in memory, so a loss and its gradient with respect to the hidden state are accumulated together
over slices (as in FlashAttention, Dao et al. 2022): each slice of the unembedding is read once an
evaluation and no logits are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tl_laai.products import add_wide_product_, as_multiplied, wide_linear
from tl_laai.recording import is_recording

SLICE_ELEMENTS = 1 << 21
"""How many weights of the unembedding a slice holds: 8 MiB in float32."""

LOGITS = 1 << 23
"""Largest number of logits alive at once: 32 MiB in float32."""

GPU_SLICES, GPU_LOGITS = 16, 4
"""They are so many times as large on a GPU, where a slice costs kernels, not a cache."""

# Sums of exponentials outside these bounds are taken again, relative to the largest logit.
_SAFE_SUM = (1e-20, 1e30)


@dataclass(frozen=True)
class Unembedding:
    """The map from the last normalised residual to logits: `cap(hidden @ weight.T + bias)`.

    Where a model scales its logits, that residual is scaled before (`Backend.final_norm`).

    Attributes:
        weight: `[d_vocab, d_model]`, a view of the model's own memory.
        bias: `[d_vocab]` or None when it is zero.
        softcap: logits become `softcap * tanh(logits / softcap)`; None for no cap.
    """

    weight: Float[Tensor, "d_vocab d_model"]
    bias: Float[Tensor, " d_vocab"] | None
    softcap: float | None

    def cap(self, logits: Tensor) -> Tensor:
        """Logits of any shape, capped where the head caps them."""
        if self.softcap is None:
            return logits
        return self.softcap * torch.tanh(logits / self.softcap)


def logit_scale(config: Any) -> float:
    """The factor on a Hugging Face model's logits: Cohere's multiplies, Granite's divides."""
    scale = getattr(config, "logit_scale", None)
    return float(1 if scale is None else scale) / float(getattr(config, "logits_scaling", 1.0))


def slice_width(weight: Float[Tensor, "d_vocab d_model"]) -> int:
    """How many vocabulary entries one slice of the unembedding holds, whatever meets it.

    Sums over the vocabulary are rounded slice by slice: were slices cut by the number of tokens,
    what is said of one token would depend on those beside it.
    """
    d_vocab, d_model = weight.shape
    elements = SLICE_ELEMENTS * (1 if weight.device.type == "cpu" else GPU_SLICES)
    return max(1, min(d_vocab, max(512, elements // max(1, d_model))))


def at_once(weight: Float[Tensor, "d_vocab d_model"]) -> int:
    """How many tokens may meet a slice of the unembedding at once."""
    logits = LOGITS * (1 if weight.device.type == "cpu" else GPU_LOGITS)
    return max(1, logits // slice_width(weight))


def bytes_of_a_pass(weight: Float[Tensor, "d_vocab d_model"], n_tokens: int) -> int:
    """Estimated memory of a pass over the vocabulary: its logits, and two more tables like them."""
    accumulate = torch.float64 if weight.dtype == torch.float64 else torch.float32
    table = min(n_tokens, at_once(weight)) * slice_width(weight)
    return 3 * table * torch.finfo(accumulate).bits // 8


def _sums(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    needs_gradient: bool,
    follow_peak: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(peak, sum exp(logits - peak), its gradient in hidden)`, each slice of the weight once.

    The peak is zero unless it is followed: sums of exponentials of logits as language models
    have them are far from the ends of the floating-point range, and following costs a third of
    the time that is not spent in matrix products.
    """
    n, d = hidden.shape
    accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    # Not -inf: a slice in which a bias of -inf forbids every token would give inf - inf.
    lowest = torch.finfo(accumulate).min if follow_peak else 0.0
    peak = hidden.new_full((n,), lowest, dtype=accumulate)
    total = hidden.new_zeros((n,), dtype=accumulate)
    pulled = hidden.new_zeros((n, d), dtype=accumulate)
    hidden, width = as_multiplied(hidden), slice_width(weight)
    for start in range(0, weight.shape[0], width):
        part = weight[start : start + width].to(hidden)
        logits = wide_linear(hidden, part)
        if bias is not None:
            logits += bias[start : start + width]
        slope = None
        if softcap is not None:
            logits = torch.tanh(logits.div_(softcap))
            slope = 1 - logits.square()
            logits *= softcap
        if follow_peak:
            new_peak = torch.maximum(peak, logits.amax(dim=1))
            rescale = torch.exp(peak - new_peak)
            total *= rescale
            pulled *= rescale[:, None]
            logits -= new_peak[:, None]
            peak = new_peak
        logits = logits.exp_()
        total += logits.sum(dim=1)
        if needs_gradient:
            if slope is not None:
                logits *= slope
            add_wide_product_(pulled, logits, part)
    return peak, total, pulled


class _Unembedded(torch.autograd.Function):
    """`logsumexp(logits) - <target, logits>` a token and, in the same pass, its gradient.

    The target is a token (`targets`), or a distribution by its mean row of the unembedding
    (`mean_rows`; its mean bias is the caller's to subtract, and under a soft cap it is none).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor | None,
        mean_rows: Tensor | None,
        softcap: float | None,
    ) -> Tensor:
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        needs_gradient = hidden.requires_grad
        source = hidden.detach()
        rows = (weight[targets] if mean_rows is None else mean_rows).to(accumulate)
        value = (source.to(accumulate) * rows).sum(-1)
        if targets is not None and bias is not None:
            value = value + bias[targets].to(accumulate)
        if softcap is not None:
            squashed = torch.tanh(value / softcap)
            value, rows = softcap * squashed, rows * (1 - squashed.square())[:, None]

        # The exponentials themselves must fit into float16, whose largest number is 65504.
        narrow = hidden.dtype == torch.float16
        peak, total, pulled = _sums(source, weight, bias, softcap, needs_gradient, narrow)
        least, most = _SAFE_SUM
        unsafe = ~((total > least) & (total < most))
        if is_recording():
            # What cannot be told now is no number, for whoever replays to see.
            total = total.masked_fill(unsafe & (not narrow), torch.nan)
        elif not narrow and bool(unsafe.any()):
            again = _sums(source[unsafe], weight, bias, softcap, needs_gradient, True)
            for whole, part in zip((peak, total, pulled), again, strict=True):
                whole[unsafe] = part
        if needs_gradient:
            ctx.save_for_backward((pulled / total[:, None] - rows).to(hidden.dtype))
        return peak + total.log() - value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (grad_outputs[0][:, None] * gradient).to(gradient.dtype), *[None] * 5


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
    return _unembedded(hidden, Unembedding(weight, bias, softcap), targets, None)


def log_sum_exp_minus(
    hidden: Float[Tensor, "n d_model"], head: Unembedding, rows: Float[Tensor, "n d_model"]
) -> Float[Tensor, " n"]:
    """`logsumexp(logits) - <row, hidden>`, in nats, differentiable in `hidden`.

    Args:
        hidden: normalised last residuals, `[n, d_model]`.
        head: the unembedding; its cap is put on the logits and on the product alike.
        rows: one a token, such as the mean row of the unembedding under a distribution.
    """
    return _unembedded(hidden, head, None, rows)


def _unembedded(
    hidden: Tensor, head: Unembedding, targets: Tensor | None, rows: Tensor | None
) -> Tensor:
    """`_Unembedded` of a few tokens at a time."""
    n = at_once(head.weight)
    losses = [
        _Unembedded.apply(  # type: ignore[no-untyped-call]  # torch leaves apply untyped
            hidden[i : i + n],
            head.weight,
            head.bias,
            None if targets is None else targets[i : i + n],
            None if rows is None else rows[i : i + n],
            head.softcap,
        )
        for i in range(0, max(1, len(hidden)), n)
    ]
    return losses[0] if len(losses) == 1 else torch.cat(losses)


def slices(head: Unembedding, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Slices of the unembedding, `[width, d_model]`, and of its bias, `[width]` or `[1]`."""
    width = slice_width(head.weight)
    none = head.weight.new_zeros(1, dtype=dtype)
    for start in range(0, head.weight.shape[0], width):
        bias = none if head.bias is None else head.bias[start : start + width].to(dtype)
        yield head.weight[start : start + width].to(dtype), bias


def next_token(
    hidden: Float[Tensor, "n d_model"],
    head: Unembedding,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " n"]:
    """The most probable next token of each hidden state, or one drawn from its distribution.

    Args:
        hidden: normalised last residuals, `[n, d_model]`.
        head: the unembedding.
        generator: of the draws; None for the most probable token. A draw is the largest of the
            logits with independent Gumbel noise added, which needs no normalisation.

    Returns:
        Token ids, `[n]`.
    """
    n = at_once(head.weight)
    if len(hidden) > n:
        return torch.cat([next_token(part, head, generator) for part in hidden.split(n)])
    # In half precision ties, and noise rounded to zero, would make draws of another distribution.
    wide = torch.promote_types(hidden.dtype, torch.float32)
    best = hidden.new_full((hidden.shape[0],), -torch.inf, dtype=wide)
    token = torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)
    width = slice_width(head.weight)
    for start in range(0, head.weight.shape[0], width):
        logits = wide_linear(hidden, head.weight[start : start + width]).to(wide)
        if head.bias is not None:
            logits = logits + head.bias[start : start + width]
        if generator is not None:
            logits = head.cap(logits)  # which keeps the order, but not the distances
            noise = torch.empty_like(logits).exponential_(generator=generator)
            logits = logits - noise.log_()
        value, index = logits.max(dim=-1)
        better = value > best
        best = torch.where(better, value, best)
        token = torch.where(better, index + start, token)
    return token
