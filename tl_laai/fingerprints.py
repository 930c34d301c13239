"""What model is this: a record that can be kept in a file, and compared with a model at hand.

Compared are the shapes and a sample of the attention output weights `W_O`, centred over `d_model`:
an intervention lives in front of `W_O`, so two models that agree there mean the same by it. The
sample is the same on `HookedTransformer` and `TransformerBridge`, with and without TransformerLens'
weight processing (folding leaves `W_O` alone, centring is undone here), to the dtype's rounding.
A model that differs elsewhere only, such as an adapter on the queries, is not told apart.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

SIZES = ("n_layers", "n_heads", "d_head", "d_model")
SAMPLED_LAYERS = 3
SAMPLED_ROWS = 16
# Largest relative difference between two samples of one model. Centring rounds in the last place;
# the 8 bits of bfloat16 differ from float32 by 1.7e-3, the 11 of float16 by 2.6e-4 (measured).
TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "float16": 1e-3, "bfloat16": 6e-3}


@dataclass(frozen=True)
class Fingerprint:
    """A model's identity.

    Attributes:
        name: The last part of the name that it was loaded by.
        revision: Commit on the Hub, or the packaged file's hash; None where it cannot be told.
        backend: "HookedTransformer" or "TransformerBridge".
        n_layers: Number of layers.
        n_heads: Heads a layer.
        d_head: Dimensions of a head's z.
        d_model: Dimensions of the residual stream.
        dtype: Such as "float32".
        weight_processing: What TransformerLens recorded of it.
        weights_hash: SHA-256 of the sample, uncentred, in bfloat16. Equal between backends for
            models with RMS norm; TransformerLens' centring changes it for those with LayerNorm.
        weights_sample: The sample, centred: 16 entries of `W_O` at each of three layers.
    """

    name: str
    revision: str | None
    backend: str
    n_layers: int
    n_heads: int
    d_head: int
    d_model: int
    dtype: str
    weight_processing: Mapping[str, str | bool | None] = field(hash=False)
    weights_hash: str
    weights_sample: tuple[float, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON takes them."""
        return {**asdict(self), "weights_sample": list(self.weights_sample)}

    @classmethod
    def from_dict(cls, values: Any) -> Fingerprint:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: For missing or unknown keys, or a value of the wrong kind.
        """
        names = {entry.name for entry in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            given = sorted(values) if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(f"A fingerprint has the keys {sorted(names)}, not {given}.")
        try:
            sample = tuple(float(value) for value in values["weights_sample"])
            sizes = {key: int(values[key]) for key in SIZES}
            processing = dict(values["weight_processing"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"A fingerprint's values are damaged: {error}") from error
        for key in ("name", "revision", "backend", "dtype", "weights_hash"):
            if not isinstance(values[key], str) and (key, values[key]) != ("revision", None):
                raise ValueError(f"A fingerprint's {key!r} must be text, not {values[key]!r}.")
        known = {**sizes, "weight_processing": processing, "weights_sample": sample}
        return cls(**{**values, **known})


# Where `load_model` had it from. Not an attribute of the model, which is left as it was made.
_ORIGINS: weakref.WeakKeyDictionary[nn.Module, tuple[str, str | None]] = weakref.WeakKeyDictionary()


def remember_origin(model: Any, name: str, revision: str | None) -> None:
    """Note the name and revision by which a model was loaded, for its fingerprint."""
    _ORIGINS[model] = (name, revision)


def fingerprint(model: Any) -> Fingerprint:
    """The fingerprint of a `HookedTransformer` or `TransformerBridge`; a few milliseconds.

    Example:
        assert compatible(fingerprint(hooked_gemma), fingerprint(bridge_of_gemma)) is None

    Raises:
        ValueError: For a model whose attention has no `W_O`.
    """
    cfg = model.cfg
    name, revision = _ORIGINS.get(model, (str(getattr(cfg, "model_name", "unknown")), None))
    picked = _spread(cfg.n_layers, min(SAMPLED_LAYERS, cfg.n_layers))
    rows = torch.cat([_sampled_rows(output_weights(model, int(layer))) for layer in picked])
    columns = torch.arange(len(rows)) * 7919 % rows.shape[1]  # a prime stride: all over the width
    plain = rows[torch.arange(len(rows)), columns]
    centred = plain - rows.mean(dim=1)
    in_bfloat16 = plain.to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    return Fingerprint(
        name=name.rstrip("/").rsplit("/", maxsplit=1)[-1],
        revision=revision,
        backend=_backend_name(model),
        n_layers=int(cfg.n_layers),
        n_heads=int(cfg.n_heads),
        d_head=int(cfg.d_head),
        d_model=int(cfg.d_model),
        dtype=str(output_weights(model, 0).dtype).removeprefix("torch."),
        weight_processing=_weight_processing(model),
        weights_hash=hashlib.sha256(in_bfloat16).hexdigest(),
        weights_sample=tuple(float(f"{value:.6g}") for value in centred.tolist()),
    )


def compatible(a: Fingerprint, b: Fingerprint) -> str | None:
    """Why an intervention on `a`'s model does not belong on `b`'s; None where it does.

    Name, revision, backend, dtype and weight processing may differ: they do not change what an
    addition to z means.
    """
    for size in SIZES:
        if getattr(a, size) != getattr(b, size):
            return f"{a.name} has {size}={getattr(a, size)}, {b.name} has {getattr(b, size)}."
    tolerance = max(TOLERANCE.get(a.dtype, 1e-4), TOLERANCE.get(b.dtype, 1e-4))
    first = torch.tensor(a.weights_sample, dtype=torch.float64)
    second = torch.tensor(b.weights_sample, dtype=torch.float64)
    # Written so that a sample with NaN agrees with none.
    if first.shape != second.shape or not (first - second).norm() <= tolerance * first.norm():
        return f"{a.name} and {b.name} have the same shape but different weights (W_O)."
    return None


def output_weights(model: Any, layer: int) -> Float[Tensor, "n_heads d_head d_model"]:
    """`W_O` of a layer; raises ValueError where the layer's attention has none."""
    attention = getattr(model.blocks[layer], "attn", None)
    weights = getattr(attention, "W_O", None)
    if not isinstance(weights, Tensor) or weights.ndim != 3:
        raise ValueError(
            f"layer={layer} of this model has no attention output weights W_O of shape "
            "[n_heads, d_head, d_model]: interventions need attention with separate heads."
        )
    return weights.detach()


def _spread(n: int, size: int) -> Int[Tensor, " n_picked"]:
    """So many indices below `n`, from the first to the last."""
    # In bfloat16, which may be the default dtype, they would be others.
    return torch.linspace(0, n - 1, size, dtype=torch.float32).round().long()


def _sampled_rows(weights: Tensor) -> Float[Tensor, "rows d_model"]:
    n_heads, d_head, _ = weights.shape
    picked = _spread(n_heads * d_head, SAMPLED_ROWS)
    chosen = weights[(picked // d_head).to(weights.device), (picked % d_head).to(weights.device)]
    return chosen.float().cpu()


def _backend_name(model: Any) -> str:
    known = ("HookedTransformer", "TransformerBridge")
    names = [cls.__name__ for cls in type(model).__mro__]
    return next((name for name in names if name in known), names[0])


def _weight_processing(model: Any) -> dict[str, str | bool | None]:
    norm = getattr(model.cfg, "normalization_type", None)
    folded = getattr(model.cfg, "layer_norm_folding", False) or str(norm).endswith("Pre")
    processed = folded or bool(getattr(model, "_weights_processed", False))
    return {"normalization_type": norm, "norm_folded": bool(folded), "processed": processed}
