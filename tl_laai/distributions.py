"""Next-token distributions that a fit should match: a teacher's, or the average of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from tl_laai.products import add_product_, linear
from tl_laai.vocabulary import Unembedding, at_once, log_sum_exp_minus, slices

_TABLES = 4  # of logits, alive at once while distributions are averaged


class NothingTaughtError(ValueError):
    """There is no teacher, or nothing that it could teach."""


@dataclass(frozen=True)
class Distributions:
    """Next-token distributions, averaged over teachers, in the form that a loss needs.

    A loss needs a target p only through the mean logit `sum_v p_v logit_v`. That is linear in the
    student's hidden state, one vector a token, unless logits are capped: then the teachers' own
    hidden states are kept, and p is made from them again, slice by slice.

    Attributes:
        offsets: entropy plus, without a cap, mean bias, `[n]`, in nats; float32 at least.
        mean_rows: mean row of the unembedding under each p, `[n, d_model]`; None with a cap.
        teachers: normalised last residuals, `[n, n_teachers, d_model]`; None without a cap.
        log_totals: log-sum-exp of their logits, `[n, n_teachers]`; None without a cap.
    """

    offsets: Float[Tensor, " n"]
    mean_rows: Float[Tensor, "n d_model"] | None = None
    teachers: Float[Tensor, "n n_teachers d_model"] | None = None
    log_totals: Float[Tensor, "n n_teachers"] | None = None

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: Tensor | slice) -> Distributions:
        """Some of them."""
        some = [t if t is None else t[index] for t in self._tensors()]
        return Distributions(*cast("list[Any]", some))

    @classmethod
    def cat(cls, parts: Sequence[Distributions]) -> Distributions:
        """Those of several, all of one head, as one.

        Raises:
            ValueError: they are averages over different numbers of teachers, of a capped head.
        """
        n_teachers = {part.teachers.shape[1] for part in parts if part.teachers is not None}
        if len(n_teachers) > 1:
            raise ValueError(
                f"n_teachers is {sorted(n_teachers)}: where logits are capped, all examples need "
                "the same number of teachers"
            )
        tensors = zip(*(part._tensors() for part in parts), strict=True)
        whole = [None if own[0] is None else torch.cat(own) for own in tensors]
        return cls(*cast("list[Any]", whole))

    def to(self, device: torch.device) -> Distributions:
        """The same on a device."""
        moved = [t if t is None else t.to(device) for t in self._tensors()]
        return Distributions(*cast("list[Any]", moved))

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.offsets, self.mean_rows, self.teachers, self.log_totals


def capped_mean_logit(
    hidden: Float[Tensor, "n d_model"], of: Distributions, head: Unembedding
) -> Float[Tensor, " n"]:
    """`sum_v p_v cap(logit_v)` of each hidden state, in nats, differentiable in `hidden`.

    Args:
        hidden: normalised last residuals, `[n, d_model]`.
        of: p of each, of a head with a cap.
        head: that head.
    """
    assert of.teachers is not None
    n = max(1, at_once(head.weight) // (1 + of.teachers.shape[1]))
    means = [
        _CappedMean.apply(hidden[i : i + n], of[i : i + n], head)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        for i in range(0, max(1, len(hidden)), n)
    ]
    return means[0] if len(means) == 1 else torch.cat(means)


class _CappedMean(torch.autograd.Function):
    """`sum_v p_v cap(logit_v)` and, in the same pass, its gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, of: Distributions, head: Unembedding) -> Tensor:
        assert of.teachers is not None
        assert of.log_totals is not None
        assert head.softcap is not None
        n, n_teachers, _ = of.teachers.shape
        wide = torch.promote_types(hidden.dtype, torch.float32)
        student = hidden.detach().to(wide)
        teachers = of.teachers.to(wide).flatten(0, 1)
        value = student.new_zeros(n)
        pulled = torch.zeros_like(student)
        log_totals = of.log_totals.to(wide).flatten()[:, None]
        for part, bias in slices(head, wide):
            p = head.cap(linear(teachers, part) + bias).sub_(log_totals).exp_()
            p = p.unflatten(0, (n, n_teachers)).mean(dim=1)
            logits = head.cap(linear(student, part) + bias)
            value += (p * logits).sum(dim=1)
            slope = 1 - (logits / head.softcap).square()
            add_product_(pulled, p.mul_(slope), part)
        ctx.save_for_backward(pulled.to(hidden.dtype))
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (grad_outputs[0][:, None] * gradient).to(gradient.dtype), None, None


def mean_distribution(
    hidden: Float[Tensor, "n_teachers n d_model"], head: Unembedding
) -> Distributions:
    """The average of several next-token distributions, in the form that a loss needs.

    Args:
        hidden: each teacher's normalised last residual at the same tokens.
        head: the unembedding.
    """
    n_teachers, n, d = hidden.shape
    few = max(1, at_once(head.weight) // (_TABLES * n_teachers))
    if n > few:
        parts = [mean_distribution(part, head) for part in hidden.split(few, dim=1)]
        return Distributions.cat(parts)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    flat = hidden.flatten(0, 1).to(wide)
    log_totals = log_sum_exp_minus(flat, head, torch.zeros_like(flat))
    mean_rows = None if head.softcap else log_totals.new_zeros((n, d))
    offsets = log_totals.new_zeros(n)
    for part, bias in slices(head, wide):
        logits = head.cap(linear(flat, part) + bias)
        average = logits.sub_(log_totals[:, None]).exp_().unflatten(0, (n_teachers, n)).mean(dim=0)
        offsets -= torch.xlogy(average, average).sum(dim=1)
        if mean_rows is not None:
            add_product_(mean_rows, average, part)
            # A bias of -inf forbids a token: it has no share, and 0 * -inf is no number.
            offsets += torch.where(average > 0, average * bias, 0).sum(dim=1)
    if mean_rows is not None:
        return Distributions(offsets, mean_rows)
    kept = hidden.transpose(0, 1).contiguous()
    return Distributions(offsets, None, kept, log_totals.unflatten(0, (n_teachers, n)).T)
