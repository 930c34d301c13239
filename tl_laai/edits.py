"""What may be done to a model at the edited positions: heads' outputs and the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from jaxtyping import Float
from torch import Tensor

from tl_laai.backends import Backend
from tl_laai.hooking import Position

_AXES = {
    "deltas": ("n_heads", "d_head"),
    "scale": ("n_heads",),
    "residual": ("d_model",),
    "replace": ("d_model",),
}


@dataclass(frozen=True)
class Edit:
    """What is done at the edited positions, to heads' outputs and to the residual stream.

    Heads: `z -> scale * z + delta` at `hook_z`. Residual before a block, `hook_resid_pre`:
    overwritten if `replace` has the layer, then `x -> x + residual`.

    Example:
        >>> Edit(residual={9: 2 * direction}, position="every_step")  # doctest: +SKIP

    Attributes:
        deltas: layer -> `[n_heads, d_head]`, added to `hook_z`.
        position: `prompt_end` or `every_step`.
        scale: layer -> `[n_heads]`, multiplies each head's own output first (0 ablates it).
        residual: layer -> `[d_model]`, added to the residual before that block.
        replace: layer -> `[d_model]`, the residual before that block becomes this.
    """

    deltas: Mapping[int, Float[Tensor, "n_heads d_head"]] = field(default_factory=dict)
    position: Position = "prompt_end"
    scale: Mapping[int, Float[Tensor, " n_heads"]] = field(default_factory=dict)
    residual: Mapping[int, Float[Tensor, " d_model"]] = field(default_factory=dict)
    replace: Mapping[int, Float[Tensor, " d_model"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.position not in get_args(Position):
            raise ValueError(f"position is {self.position!r}; use one of {get_args(Position)}.")
        for name, axes in _AXES.items():
            for layer, tensor in getattr(self, name).items():
                if tensor.ndim != len(axes):
                    raise ValueError(
                        f"{name}[{layer}] has shape {list(tensor.shape)}; give [{', '.join(axes)}]."
                    )
                if not bool(tensor.isfinite().all()):
                    raise ValueError(f"{name}[{layer}] holds NaN or infinity; give finite numbers.")

    @property
    def layers(self) -> set[int]:
        """Every layer that is touched."""
        return {layer for name in _AXES for layer in getattr(self, name)}

    def check_fits(self, backend: Backend) -> None:
        """Refuse a model that has not these layers, or heads or residuals of other shapes."""
        for name, axes in _AXES.items():
            shape = [getattr(backend, axis) for axis in axes]
            for layer, tensor in getattr(self, name).items():
                if layer not in range(backend.n_layers):
                    raise ValueError(
                        f"{name} has layer {layer}; this model has layers 0 to "
                        f"{backend.n_layers - 1}."
                    )
                if list(tensor.shape) != shape:
                    raise ValueError(
                        f"{name}[{layer}] has shape {list(tensor.shape)}; this model needs {shape}."
                    )
