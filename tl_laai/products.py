"""Products with a model's frozen weights, by the library that is fast on this CPU.

torch multiplies float32 matrices with MKL, which on CPUs of other makers than Intel leaves their
AVX-512 registers unused. oneDNN, which torch brings too, uses them (1.6 to 3 times MKL's speed on
an AMD EPYC, for one row as for hundreds; about as fast, with AVX2 alone), and rounds a row's
product alike however many rows there are, which MKL does on Intel's alone.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode


def about_cpu() -> str:
    """What the system says of this CPU, its maker's name included."""
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else platform.processor()


INTEL = "GenuineIntel" in about_cpu()
"""Whether this CPU is one of Intel's."""

BLOCKS = {"AVX512": 4, "AVX2": 8}
"""Width of vectors -> rows that torch's batched products take at once on CPUs not Intel's."""

CAPABILITY = torch.backends.cpu.get_cpu_capability()
"""The widest vectors that torch uses here, such as AVX512."""

# Behind torch.compile's linear layers; torch has no public name for it on plain tensors.
_onednn: Callable[..., Tensor] | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def takes_onednn(intel: bool, capability: str) -> bool:
    """Whether oneDNN multiplies on such a CPU, where torch brings both libraries."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return not intel and capability in BLOCKS and both and _onednn is not None


USE_ONEDNN = takes_onednn(INTEL, CAPABILITY)
"""Whether products go to oneDNN: where MKL would multiply on another maker's CPU."""


# New in torch 2.8.
_MM_WIDENS = "dtype" in torch.ops.aten.mm.overloads()


def _suits(x: Tensor, weight: Tensor) -> bool:
    return (
        USE_ONEDNN
        and all(
            type(t) in (Tensor, nn.Parameter)  # not quantised or sharded
            and t.dtype == torch.float32
            and t.device.type == "cpu"
            and t.layout == torch.strided
            and t.numel() > 0
            for t in (x, weight)
        )
        # With gaps between its rows or columns oneDNN is a thousand times slower.
        and (weight.is_contiguous() or weight.T.is_contiguous())
    )


def _product(x: Tensor, weight: Tensor) -> Tensor:
    assert _onednn is not None
    # One row alone would take another way, and be rounded otherwise than beside others.
    rows = x.expand(2, -1) if len(x) == 1 else x
    return _onednn(rows.contiguous(), weight, None, "none", [], "")[: len(x)]


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return _product(grad_outputs[0], weight.T), None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, differentiable in `x` alone.

    Args:
        x: `[..., d_in]`.
        weight: `[d_out, d_in]` in any memory layout.
        bias: `[d_out]`.
    """
    if not _suits(x, weight):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    product = cast(Tensor, _FrozenLinear.apply(rows, weight))  # type: ignore[no-untyped-call]
    product = product.view(*x.shape[:-1], len(weight))
    return product if bias is None else product + bias


def add_product_(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Add `x @ weight` to `total` in place; `[n, d_in]` and `[d_in, d_out]`, without gradients."""
    return total.add_(_product(x, weight.T)) if _suits(x, weight) else total.addmm_(x, weight)


def as_multiplied(x: Tensor) -> Tensor:
    """Numbers as `wide_linear` multiplies them: what it would widen is widened once."""
    return x if _tensor_cores_widen(x) else x.to(torch.promote_types(x.dtype, torch.float32))


def wide_linear(
    x: Float[Tensor, "n d_in"], weight: Float[Tensor, "d_out d_in"]
) -> Float[Tensor, "n d_out"]:
    """`x @ weight.T` in float32 at least.

    Products of half-precision numbers are exact in float32, and tensor cores add them up in it:
    only the result would be rounded to half precision.
    """
    if _tensor_cores_widen(x):
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    x = as_multiplied(x)
    return linear(x, weight.to(x.dtype))


def add_wide_product_(
    total: Float[Tensor, "n d_out"],
    x: Float[Tensor, "n d_in"],
    weight: Float[Tensor, "d_in d_out"],
) -> Float[Tensor, "n d_out"]:
    """Add `x @ weight` to `total` in place, `x` as wide as `total` and weights of any dtype."""
    if not _tensor_cores_widen(weight):
        return add_product_(total, x, weight.to(total.dtype))
    high = x.to(weight.dtype)
    low = (x - high).to(weight.dtype)  # together as good as twice as many digits
    total += torch.mm(high, weight, out_dtype=torch.float32)
    total += torch.mm(low, weight, out_dtype=torch.float32)
    return total


def _tensor_cores_widen(x: Tensor) -> bool:
    return x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16) and _MM_WIDENS


class _FrozenProducts(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not kwargs:
            if func is F.linear:
                return linear(*args)
            if func is torch.addmm:
                bias, x, weight = args
                if _suits(x, weight):
                    return linear(x, weight.T, bias)
        return func(*args, **(kwargs or {}))


def frozen_products() -> AbstractContextManager[object]:
    """A context in which the linear maps of a model's modules are fast, too.

    Their gradients are taken with respect to activations alone.
    """
    # A mode is asked at every operation of torch, and for every shape.
    return _FrozenProducts() if USE_ONEDNN else nullcontext()
