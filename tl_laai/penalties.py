"""The sparse group lasso over attention heads: value, prox, stationarity and `lambda_max`.

    P(delta) = l1 * ||delta||_1 + group * sum_h ||delta_h||_2

over the last two axes `[n_heads, d_head]` of `delta`: sparse inside a head, and whole heads left
out (Simon, Friedman, Hastie & Tibshirani, "A sparse-group lasso", JCGS 2013). A point is
*stationary* for `F + P` when a unit proximal step leaves it where it is. For a loss `F` that is not
convex this certifies stationarity, never a global optimum.

Norms and sums are taken in float64 whatever the dtype of `delta`; keep deltas on the CPU for a
device that has no float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch
from jaxtyping import Float, Int
from torch import Tensor

# One number for all problems, or a tensor [n_problems] with one a problem. The shape is left to
# `_checked`, whose message says more than a failed annotation.
Weight = float | int | Float[Tensor, "..."]

# Relative excess over the computed root, so that rounding never leaves a head just above zero.
_ROOT_MARGIN = 1e-13
_ROOT_STEPS = 100
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, eq=False)
class SparseGroupLasso:
    """L1 and group-L2 penalty on deltas, for one problem or for many at once.

    Example:
        >>> penalty = SparseGroupLasso(l1=1.0, group=0.0)
        >>> penalty.prox(torch.tensor([[3.0, -0.5]]), 1.0)
        tensor([[2., 0.]])

    Args:
        l1: Weight of the absolute values, finite and >= 0; one number for all problems, or a tensor
            of shape `[n_problems]` with one weight a problem.
        group: Weight of the heads' Euclidean norms; as `l1`.

    Raises:
        TypeError: A weight is neither a number nor a floating-point tensor.
        ValueError: A weight is negative, not finite, or of a wrong shape.
    """

    l1: Weight
    group: Weight

    def __post_init__(self) -> None:
        """Check the weights, and make numbers of integers and of tensors without axes."""
        l1, group = _checked("l1", self.l1), _checked("group", self.group)
        if isinstance(l1, Tensor) and isinstance(group, Tensor):
            _check_same_length("l1", l1, "group", group)
        object.__setattr__(self, "l1", l1)
        object.__setattr__(self, "group", group)

    @classmethod
    def from_ratio(cls, lambda_: Weight, l1_ratio: float) -> SparseGroupLasso:
        """The penalty `lambda_ * (l1_ratio * ||.||_1 + sum_h ||._h||_2)`.

        Example:
            >>> SparseGroupLasso.from_ratio(0.5, l1_ratio=0.1)
            SparseGroupLasso(l1=0.05, group=0.5)

        Args:
            lambda_: The group weight, a number or a tensor of shape `[n_problems]`.
            l1_ratio: What `lambda_` is multiplied by to give the L1 weight; finite and >= 0.

        Returns:
            The penalty with `group = lambda_` and `l1 = l1_ratio * lambda_`.

        Raises:
            TypeError, ValueError: As for the constructor.
        """
        ratio = _checked("l1_ratio", l1_ratio)
        lambda_ = _checked("lambda_", lambda_)
        return cls(l1=ratio * lambda_, group=lambda_)

    def __eq__(self, other: object) -> bool:
        """Whether both penalties hold equal weights of the same kind."""
        if not isinstance(other, SparseGroupLasso):
            return NotImplemented
        return _same(self.l1, other.l1) and _same(self.group, other.group)

    def value(self, delta: Float[Tensor, "*batch n_heads d_head"]) -> Float[Tensor, "*batch"]:
        """`P(delta)`, in float64; differentiable, with subgradient zero where `delta` is zero.

        Example:
            >>> SparseGroupLasso(l1=0.0, group=2.0).value(torch.tensor([[3.0, 4.0]]))
            tensor(10., dtype=torch.float64)

        Args:
            delta: Shape `[n_heads, d_head]`, or with batch axes in front.

        Returns:
            One value for each delta.

        Raises:
            TypeError, ValueError: `delta` is no floating-point tensor, or does not fit the weights.
        """
        _check_delta("delta", delta)
        wide = delta.double()
        absolute = wide.abs().sum(dim=(-2, -1))
        heads = _norm(wide).sum(dim=-1)
        l1, group = self._spread(self.l1, delta, 0), self._spread(self.group, delta, 0)
        return l1 * absolute + group * heads

    def prox(
        self, delta: Float[Tensor, "*batch n_heads d_head"], step: Weight
    ) -> Float[Tensor, "*batch n_heads d_head"]:
        """The minimiser of `||. - delta||^2 / 2 + step * P(.)`, with exact zeros.

        Every entry is soft-thresholded by `step * l1`, then every head is scaled by
        `max(0, 1 - step * group / ||head||)` (Simon et al. 2013, section 3.2).

        Example:
            >>> delta = torch.tensor([[3.0, 4.0], [1.0, 1.0]])
            >>> SparseGroupLasso(l1=0.0, group=2.5).prox(delta, 1.0)
            tensor([[1.5000, 2.0000],
                    [0.0000, 0.0000]])

        Args:
            delta: Shape `[n_heads, d_head]`, or with batch axes in front.
            step: Step size, finite and >= 0: a number, or one a problem.

        Returns:
            A tensor like `delta`.

        Raises:
            TypeError, ValueError: `delta` or `step` is of a wrong type, range or shape.
        """
        _check_delta("delta", delta)
        scale = self._spread(_checked("step", step), delta, 2)
        wide = delta.double()
        soft = wide.sign() * (wide.abs() - scale * self._spread(self.l1, delta, 2)).clamp_min(0)
        norm = _norm(soft)[..., None]
        threshold = scale * self._spread(self.group, delta, 2)
        # A head at zero norm stays zero; the clamp only keeps 0 / 0 away.
        keep = (1 - threshold / norm.clamp_min(_TINY)).clamp_min(0)
        # Adding zero turns -0.0 into 0.0, so that equal deltas are equal bytes.
        return (soft * keep + 0.0).to(delta.dtype)

    def stationarity(
        self,
        delta: Float[Tensor, "*batch n_heads d_head"],
        gradient: Float[Tensor, "*batch n_heads d_head"],
    ) -> Float[Tensor, "*batch"]:
        """`||delta - prox_P(delta - gradient)||`: zero exactly at a stationary point of `F + P`.

        Example:
            >>> penalty = SparseGroupLasso(l1=0.0, group=5.0)
            >>> penalty.stationarity(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
            tensor(0., dtype=torch.float64)

        Args:
            delta: Shape `[n_heads, d_head]`, or with batch axes in front.
            gradient: Gradient of the smooth loss at `delta`; the same shape.

        Returns:
            One float64 residual for each delta, in the units of `delta` (a unit step).

        Raises:
            TypeError, ValueError: No floating-point tensors, or of shapes that do not fit.
        """
        _check_delta("delta", delta)
        _check_delta("gradient", gradient)
        if delta.shape != gradient.shape:
            raise ValueError(
                f"gradient has shape {list(gradient.shape)}, but delta has shape "
                f"{list(delta.shape)}; give the gradient at this delta."
            )
        wide = delta.double()
        moved = wide - self.prox(wide - gradient.double(), 1.0)
        return _norm(moved.flatten(-2))

    def head_thresholds(
        self, gradient: Float[Tensor, "*batch n_heads d_head"]
    ) -> Float[Tensor, "*batch n_heads"]:
        """For each head the smallest weight at which it stays zero: its gradient attribution.

        With `a = l1 / group` of this penalty, it is the smallest `lambda` such that
        `||soft(g_h, a * lambda)||_2 <= lambda`: a group weight. A penalty without group part has
        the smallest L1 weight instead, `max |g_h|`. Only the ratio of the two weights matters.

        Example:
            >>> SparseGroupLasso(l1=0.0, group=1.0).head_thresholds(torch.tensor([[3.0, 4.0]]))
            tensor([5.0000], dtype=torch.float64)

        Args:
            gradient: Gradient of the smooth loss at zero, `[n_heads, d_head]` or with batch axes.

        Returns:
            One float64 threshold a head, right to 1e-12 relative and never below the exact root,
            so that zero is stationary at the returned weight.

        Raises:
            TypeError: `gradient` is not a floating-point tensor.
            ValueError: Both weights are zero (no weight keeps a head at zero), l1 is so much larger
                that their ratio overflows, the gradient is not finite, or shapes differ.
        """
        _check_delta("gradient", gradient)
        if not bool(gradient.isfinite().all()):
            raise ValueError("gradient holds NaN or infinity; give the gradient at a finite loss.")
        l1, group = self._spread(self.l1, gradient, 1), self._spread(self.group, gradient, 1)
        if bool(((l1 == 0) & (group == 0)).any()):
            raise ValueError(
                f"head_thresholds needs the ratio of l1 to group, but both are zero in {self}; "
                "give at least one positive weight, such as SparseGroupLasso(l1=0.0, group=1.0)."
            )
        size = gradient.double().abs()
        largest = size.amax(dim=-1)
        ratio = torch.where(group > 0, l1 / group, torch.zeros_like(l1))
        if not bool(ratio.isfinite().all()):
            raise ValueError(
                f"head_thresholds needs the ratio of l1 to group, which is too large for a number "
                f"in {self}; give a larger group weight, or group=0.0 for the l1 penalty alone."
            )
        # ||soft(g_h, a * lambda)|| - lambda is convex and falls with slope <= -1, so that Newton's
        # steps from the left of its root climb to it and never pass it. With the largest entry
        # alone the root would be largest / (1 + a): no larger than the true one.
        root = largest / (1 + ratio)
        for _ in range(_ROOT_STEPS):
            soft = (size - (ratio * root)[..., None]).clamp_min(0)
            norm = _norm(soft)
            slope = 1 + ratio * soft.sum(dim=-1) / norm.clamp_min(_TINY)
            climbed = torch.maximum(root, root + (norm - root) / slope)
            if torch.equal(climbed, root):
                break
            root = climbed
        return torch.where(group > 0, root * (1 + _ROOT_MARGIN), largest)

    def lambda_max(
        self, gradient: Float[Tensor, "*batch n_heads d_head"]
    ) -> Float[Tensor, "*batch"]:
        """The smallest weight at which `delta = 0` is stationary: the largest head threshold.

        Example:
            >>> gradient = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
            >>> SparseGroupLasso(l1=0.0, group=1.0).lambda_max(gradient)
            tensor(5.0000, dtype=torch.float64)

        Args:
            gradient: Gradient of the smooth loss at zero, `[n_heads, d_head]` or with batch axes.

        Returns:
            One float64 weight for each gradient; what it weighs is told at `head_thresholds`.

        Raises:
            TypeError, ValueError: As for `head_thresholds`.
        """
        return self.head_thresholds(gradient).amax(dim=-1)

    def scaled(self, factor: Weight) -> SparseGroupLasso:
        """The penalty with both weights multiplied by `factor`, so with the same ratio.

        Example:
            >>> SparseGroupLasso(l1=1.0, group=2.0).scaled(0.5)
            SparseGroupLasso(l1=0.5, group=1.0)

        Args:
            factor: Finite and >= 0: a number, or a tensor of shape `[n_problems]`.

        Returns:
            A new penalty.

        Raises:
            TypeError, ValueError: `factor` is of a wrong type, range or length.
        """
        number = _checked("factor", factor)
        for weight in (self.l1, self.group):
            if isinstance(weight, Tensor) and isinstance(number, Tensor):
                _check_same_length("factor", number, "the penalty", weight)
        return SparseGroupLasso(l1=self.l1 * number, group=self.group * number)

    def at(self, problems: Int[Tensor, "*selected"]) -> SparseGroupLasso:
        """The penalty of some of the problems; a weight shared by all stays a number.

        Example:
            >>> SparseGroupLasso(l1=torch.tensor([1.0, 2.0]), group=3.0).at(torch.tensor(1))
            SparseGroupLasso(l1=2.0, group=3.0)

        Args:
            problems: Indices of problems: shape `[n_selected]`, or a single one of shape `[]`, for
                which both weights become numbers.

        Returns:
            A new penalty.

        Raises:
            IndexError: An index is out of range.
        """
        l1, group = (w[problems] if isinstance(w, Tensor) else w for w in (self.l1, self.group))
        return SparseGroupLasso(l1=l1, group=group)

    @staticmethod
    def _spread(weight: float | Tensor, delta: Tensor, n_inner: int) -> Tensor:
        """`weight` in float64, on the last batch axis of `delta`, with `n_inner` axes behind it."""
        if not isinstance(weight, Tensor):
            return torch.tensor(weight, dtype=torch.float64, device=delta.device)
        if delta.dim() < 3 or delta.shape[-3] != weight.shape[0]:
            raise ValueError(
                f"the penalty's weights are for {weight.shape[0]} problems, but the tensor has "
                f"shape {list(delta.shape)}; give [..., {weight.shape[0]}, n_heads, d_head], or "
                "select problems with SparseGroupLasso.at."
            )
        return weight.to(device=delta.device, dtype=torch.float64).reshape(-1, *[1] * n_inner)


def _norm(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values, dim=-1)
    return norm


def _same(first: float | Tensor, second: float | Tensor) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    return not isinstance(first, Tensor) and not isinstance(second, Tensor) and first == second


def _checked(name: str, weight: object) -> float | Tensor:
    """`weight` as a float or a 1-D tensor, or an error that tells what would be right."""
    allowed = "a finite number >= 0, or a floating-point tensor of shape [n_problems] of such"
    if isinstance(weight, Tensor):
        if not weight.is_floating_point():
            raise TypeError(f"{name} has dtype {weight.dtype}; give {allowed}.")
        if weight.dim() == 0:
            weight = weight.item()
        elif weight.dim() > 1:
            raise ValueError(f"{name} has shape {list(weight.shape)}; give {allowed}.")
        elif not bool((weight.isfinite() & (weight >= 0)).all()):
            raise ValueError(f"{name} holds {weight.tolist()}; give {allowed}.")
        else:
            return weight
    if isinstance(weight, bool) or not isinstance(weight, Real):
        raise TypeError(f"{name} is {weight!r}; give {allowed}.")
    number = float(weight)
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{name} is {number}; give {allowed}.")
    return number


def _check_same_length(name: str, first: Tensor, other: str, second: Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(
            f"{name} is for {first.numel()} problems, but {other} is for {second.numel()}; "
            "give both the same length, or a number for one of them."
        )


def _check_delta(name: str, delta: object) -> None:
    if not isinstance(delta, Tensor) or not delta.is_floating_point():
        kind = delta.dtype if isinstance(delta, Tensor) else type(delta).__name__
        raise TypeError(f"{name} is {kind}; give a floating-point tensor [..., n_heads, d_head].")
    if delta.dim() < 2 or delta.shape[-1] == 0 or delta.shape[-2] == 0:
        raise ValueError(
            f"{name} has shape {list(delta.shape)}; give [n_heads, d_head], or with batch axes in "
            "front; reshape a flat vector with .reshape(n_heads, d_head)."
        )
