"""An additive intervention: what it is, its algebra, where it applies, and its files.

    hook_z[layer][:, position] += delta[layer]        (before W_O, one row of delta a head)

Source: Nguyen, Nguyen, Nguyen, Nguyen (2025), "Task-driven Layerwise Additive Activation
Intervention": a vector for the last prompt token at one layer, viewed as one block a head. Ours
are the second position rule (`every_step`) and more than one layer, which sums need.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tl_laai.artifacts import Artifact, find_artifact, load_artifact, push_artifact, save_artifact
from tl_laai.fingerprints import Fingerprint, compatible, fingerprint
from tl_laai.hooking import (
    HookFunction,
    Position,
    PromptLength,
    delta_hooks,
    deltas_applied,
    hook_name,
)
from tl_laai.splits import integer

_HOOK_NAME = re.compile(r"blocks\.(\d+)\.attn\.hook_z")


class HeadNorm(NamedTuple):
    """A head that an intervention uses, and the Euclidean norm of its part of delta."""

    layer: int
    head: int
    norm: float


@dataclass(frozen=True, eq=False, repr=False)
class Intervention:
    r"""A vector for each head of some layers, added to `hook_z` where the position rule says.

    Example:
        capital = Intervention({9: delta}, fingerprint=fingerprint(model))
        with capital.applied_to(model):
            model.generate("Q: Kenya\nA:")
        (2 * capital - other).save_pretrained("capital/")

    Args:
        deltas: layer -> delta, `[n_heads, d_head]`, float32 or float64, in units of `hook_z`.
            Copied and detached; every layer has the same shape.
        position: `"prompt_end"`: the last prompt token only. `"every_step"`: the last token at
            each decoding step, the prompt's last token being the first of them.
        fingerprint: the model that it was fitted on; None: unknown, and no model is refused.
        provenance: how it came about (task, split, seed, penalty, solver status, versions): JSON.

    Raises:
        TypeError: a delta that is no float32/float64 tensor, or provenance that is no JSON.
        ValueError: no layer, a layer out of range, unequal or wrong shapes, non-finite values.
    """

    deltas: Mapping[int, Float[Tensor, "n_heads d_head"]]
    position: Position = "prompt_end"
    fingerprint: Fingerprint | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.position not in get_args(Position):
            raise ValueError(f"position={self.position!r}: allowed are {get_args(Position)}.")
        if not self.deltas:
            raise ValueError("deltas={}: give at least one layer, such as {9: delta}.")
        shape = getattr(next(iter(self.deltas.values())), "shape", torch.Size())
        for layer, delta in self.deltas.items():
            _check_delta(layer, delta, shape, self.fingerprint)
        copies = {layer: self.deltas[layer].detach().clone() for layer in sorted(self.deltas)}
        object.__setattr__(self, "deltas", MappingProxyType(copies))
        provenance = MappingProxyType(json_provenance(self.provenance))
        object.__setattr__(self, "provenance", provenance)

    def __reduce__(self) -> tuple[Any, ...]:
        # Mapping proxies cannot be pickled, and process pools and deepcopy need to.
        parts = (dict(self.deltas), self.position, self.fingerprint, dict(self.provenance))
        return Intervention, parts

    def __repr__(self) -> str:
        model = "unknown" if self.fingerprint is None else self.fingerprint.name
        n_heads = self.shape[0] * len(self.deltas)
        return (
            f"Intervention(layers={self.layers}, heads={self.n_heads_used}/{n_heads}, "
            f"norm={self.norm():.4g}, position={self.position!r}, model={model!r})"
        )

    # ------------------------------------------------------------------------------- looking

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have a delta, in order (a delta of zeros counts)."""
        return tuple(self.deltas)

    @property
    def shape(self) -> tuple[int, int]:
        """`(n_heads, d_head)` of every delta."""
        n_heads, d_head = next(iter(self.deltas.values())).shape
        return n_heads, d_head

    @property
    def n_heads_used(self) -> int:
        """How many heads, over all layers, have any entry that is not zero."""
        return len(self.heads())

    def norm(self) -> float:
        """Euclidean norm over all layers and heads."""
        return math.sqrt(sum(float(d.double().square().sum()) for d in self.deltas.values()))

    def heads(self, layer: int | None = None) -> list[HeadNorm]:
        """The heads that are not exactly zero, largest norm first.

        Example:
            for layer, head, norm in intervention.heads(): ...

        Args:
            layer: only this layer's heads; None: all layers.

        Raises:
            ValueError: a layer that has no delta here.
        """
        if layer is not None and layer not in self.deltas:
            raise ValueError(f"layer={layer}: this intervention has the layers {self.layers}.")
        found = [
            HeadNorm(number, head, float(row.double().norm()))
            for number, delta in self.deltas.items()
            if layer in (None, number)
            for head, row in enumerate(delta)
            if bool(row.count_nonzero())
        ]
        return sorted(found, key=lambda head: (-head.norm, head.layer, head.head))

    # ------------------------------------------------------------------------------- algebra

    def add(self, other: Intervention, *, strict: bool = True) -> Intervention:
        """The sum: layers of either, deltas added where both have one. The same as `+`.

        Example:
            french_capital = capital.add(french)

        Args:
            other: an intervention with the same position rule.
            strict: refuse interventions that were fitted on different models.

        Returns:
            The sum, with the first known fingerprint and both provenances.

        Raises:
            ValueError: different position rules or shapes; different models, if strict.
        """
        if self.position != other.position:
            raise ValueError(
                f"position={self.position!r} and {other.position!r} cannot be added: nest their "
                "`applied_to` instead, or give both one rule with dataclasses.replace."
            )
        if self.shape != other.shape:
            raise ValueError(f"deltas of shapes {self.shape} and {other.shape} cannot be added.")
        if strict and self.fingerprint is not None and other.fingerprint is not None:
            reason = compatible(self.fingerprint, other.fingerprint)
            if reason is not None:
                raise ValueError(
                    f"interventions of different models are not added: {reason} If you mean it, "
                    "use first.add(second, strict=False)."
                )
        deltas = dict(self.deltas)
        for layer, delta in other.deltas.items():
            deltas[layer] = (
                deltas[layer] + delta.to(deltas[layer].device) if layer in deltas else delta
            )
        parts = [dict(self.provenance), dict(other.provenance)]
        return replace(
            self,
            deltas=deltas,
            fingerprint=self.fingerprint or other.fingerprint,
            provenance={"operation": "add", "parts": parts},
        )

    def _mapped(
        self, change: Callable[[int, Tensor], Tensor], operation: str, argument: Any = None
    ) -> Intervention:
        step = {"operation": operation, "argument": argument, "parts": [dict(self.provenance)]}
        deltas = {layer: change(layer, delta) for layer, delta in self.deltas.items()}
        return replace(self, deltas=deltas, provenance=step)

    def __add__(self, other: Intervention) -> Intervention:
        return self.add(other) if isinstance(other, Intervention) else NotImplemented

    def __radd__(self, other: object) -> Intervention:
        """Lets `sum` add several, which begins with 0."""
        return self if other == 0 and isinstance(other, int) else NotImplemented

    def __sub__(self, other: Intervention) -> Intervention:
        return self.add(-other) if isinstance(other, Intervention) else NotImplemented

    def __neg__(self) -> Intervention:
        return self._mapped(lambda _, delta: -delta, "negate")

    def __mul__(self, factor: int | float) -> Intervention:
        if not isinstance(factor, int | float):
            return NotImplemented
        _check_finite("factor", factor)
        return self._mapped(lambda _, delta: delta * factor, "multiply", factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: int | float) -> Intervention:
        if not isinstance(divisor, int | float):
            return NotImplemented
        _check_finite("divisor", divisor)
        if divisor == 0:
            raise ZeroDivisionError("an intervention cannot be divided by zero.")
        return self._mapped(lambda _, delta: delta / divisor, "divide", divisor)

    # With `__eq__` and no `__hash__` there is no hash, rightly: tensors can be changed in place.
    def __eq__(self, other: object) -> bool:
        """Exactly the same tensors, position rule and model; provenance is not compared."""
        if not isinstance(other, Intervention):
            return NotImplemented
        return (
            self.position == other.position
            and self.fingerprint == other.fingerprint
            and self.layers == other.layers
            and all(_same(delta, other.deltas[layer]) for layer, delta in self.deltas.items())
        )

    def zeros_like(self) -> Intervention:
        """The same layers and shapes, all zero: the neutral element of `+`."""
        return self._mapped(lambda _, delta: torch.zeros_like(delta), "zeros_like")

    def only_heads(self, heads: Iterable[tuple[Any, ...]]) -> Intervention:
        """Keep these `(layer, head)` pairs, or entries of `heads()`; zero all others."""
        return self._with_heads_zeroed(heads, keep=True)

    def without_heads(self, heads: Iterable[tuple[Any, ...]]) -> Intervention:
        """Set these `(layer, head)` pairs, or entries of `heads()`, to zero; the others stay."""
        return self._with_heads_zeroed(heads, keep=False)

    def _with_heads_zeroed(self, heads: Iterable[tuple[Any, ...]], *, keep: bool) -> Intervention:
        chosen = {
            (integer("layer in heads", layer), integer("head in heads", head))
            for layer, head, *_ in heads
        }
        for layer, head in chosen:
            if layer not in self.deltas or not 0 <= head < self.shape[0]:
                raise ValueError(
                    f"heads contains {(layer, head)}: layers are {self.layers} and heads "
                    f"0 to {self.shape[0] - 1}."
                )

        def zeroed(layer: int, delta: Tensor) -> Tensor:
            rows = [((layer, head) in chosen) == keep for head in range(self.shape[0])]
            kept = torch.tensor(rows, device=delta.device)[:, None]
            return torch.where(kept, delta, torch.zeros_like(delta))

        name = "only_heads" if keep else "without_heads"
        return self._mapped(zeroed, name, sorted(chosen))

    # ------------------------------------------------------------------------------ applying

    def hooks(self, prompt_length: PromptLength = None) -> list[tuple[str, HookFunction]]:
        """TransformerLens `fwd_hooks` that carry the intervention through one forward.

        Example:
            logits = model.run_with_hooks(tokens, fwd_hooks=intervention.hooks())

        Args:
            prompt_length: tokens of the prompt in that forward, one number, or `[batch]` for
                right-padded rows; None: all of them; 0: the prompt lies in the key-value cache.

        Returns:
            `[("blocks.9.attn.hook_z", function), ...]`, one a layer.

        Raises:
            TypeError: a prompt length that is no integer.
            ValueError: a negative prompt length.
        """
        return delta_hooks(self.deltas, position=self.position, prompt_length=prompt_length)

    def applied_to(
        self, model: Any, *, prompt_length: PromptLength = None, strict: bool = True
    ) -> AbstractContextManager[None]:
        r"""Within the block every forward and every `generate` of the model is intervened.

        Blocks can be nested: then the interventions add up. In `generate` the prompt ends where
        its first forward ends, with and without a key-value cache; left-padded rows all end
        there. Outside, every forward is a prompt of its own.

        Example:
            with intervention.applied_to(model):
                model.generate("Q: Kenya\nA:", max_new_tokens=4)

        Args:
            model: `HookedTransformer` or `TransformerBridge`; left as found, whatever is raised.
            prompt_length: for forwards outside `generate`; see `hooks`.
            strict: refuse another model than the one it was fitted on.

        Raises:
            ValueError: another model, if strict; a layer or head shape that it has not.
            RuntimeError: a stream of `generate_stream` is read after the block.
        """
        self.check_model(model, strict=strict)
        return deltas_applied(
            model, self.deltas, position=self.position, prompt_length=prompt_length
        )

    def check_model(self, model: Any, *, strict: bool) -> None:
        """Refuse a model whose heads have another shape and, if strict, any other model."""
        cfg = model.cfg
        if self.layers[-1] >= cfg.n_layers or self.shape != (cfg.n_heads, cfg.d_head):
            raise ValueError(
                f"model has {cfg.n_layers} layers of (n_heads, d_head) = "
                f"{(cfg.n_heads, cfg.d_head)}, but the intervention has layers {self.layers} of "
                f"{self.shape}: it cannot be applied to this model."
            )
        if strict and self.fingerprint is not None:
            reason = compatible(self.fingerprint, fingerprint(model))
            if reason is not None:
                raise ValueError(
                    f"model is not the one that this intervention was fitted on: {reason} If you "
                    "mean it, pass strict=False in Python; laai has no option for it."
                )

    # --------------------------------------------------------------------------------- files

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `intervention.safetensors` and `intervention_config.json` to a folder.

        The files appear whole or not at all; an older intervention there is replaced, and other
        files are left alone. Returns the folder.

        Raises:
            ValueError: the path is a file.
        """
        artifact = self._artifact()
        return save_artifact(folder, artifact.tensors, artifact.config)

    @classmethod
    def from_pretrained(
        cls, folder_or_hub_id: str | Path, *, revision: str | None = None
    ) -> Intervention:
        """Read an intervention from a local folder or from the Hugging Face Hub, to the CPU.

        Example:
            capital = Intervention.from_pretrained("capital/")

        Args:
            folder_or_hub_id: a folder that `save_pretrained` wrote, or a Hub name `owner/name`.
            revision: branch, tag or commit on the Hub.

        Raises:
            ValueError: nothing there, or files that are truncated, foreign or inconsistent.
        """
        folder = find_artifact(folder_or_hub_id, revision=revision)
        tensors, config = load_artifact(folder)
        try:
            known = config["fingerprint"]
            return cls(
                {_layer_of(name): tensor for name, tensor in tensors.items()},
                position=config["position"],
                fingerprint=None if known is None else Fingerprint.from_dict(known),
                provenance=config["provenance"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder} holds no valid intervention: {error!r}.") from error

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        commit_message: str = "Upload intervention",
    ) -> str:
        """Upload the intervention and a model card to the Hugging Face Hub.

        Args:
            repo_id: `owner/name`; made where it does not exist.
            private: whether a new repository is private.
            token: access token; None: the one that `hf auth login` stored.
            commit_message: what the commit says.

        Returns:
            The repository's address.
        """
        return push_artifact(
            self._artifact(),
            self.heads(),
            repo_id=repo_id,
            private=private,
            token=token,
            commit_message=commit_message,
        )

    def _artifact(self) -> Artifact:
        known = None if self.fingerprint is None else self.fingerprint.to_dict()
        config = {
            "position": self.position,
            "fingerprint": known,
            "provenance": dict(self.provenance),
        }
        return Artifact({hook_name(layer): d for layer, d in self.deltas.items()}, config)


def json_provenance(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance as JSON would give it back.

    Raises:
        TypeError: it is no JSON.
    """
    try:
        return dict(json.loads(json.dumps(dict(provenance), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"provenance={provenance!r} is not JSON ({error}). Use strings, finite numbers, "
            "booleans, None, lists and dictionaries."
        ) from error


def _check_delta(layer: int, delta: Tensor, shape: torch.Size, model: Fingerprint | None) -> None:
    """Refuse what cannot be a layer's delta, in words."""
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"deltas has the key {layer!r}: layers are integers, as in {{9: delta}}.")
    if layer < 0 or (model is not None and layer >= model.n_layers):
        last = "and up" if model is None else f"to {model.n_layers - 1} ({model.name})"
        raise ValueError(f"deltas has layer {layer}: layers are 0 {last}.")
    if not isinstance(delta, Tensor) or delta.dtype not in (torch.float32, torch.float64):
        kind = delta.dtype if isinstance(delta, Tensor) else type(delta).__name__
        raise TypeError(
            f"deltas[{layer}] is of {kind}: give a float32 or float64 tensor (delta.float())."
        )
    allowed = shape if model is None else torch.Size((model.n_heads, model.d_head))
    if delta.ndim != 2 or delta.shape != allowed or 0 in delta.shape:
        expected = tuple(allowed) if len(allowed) == 2 else "two axes"
        raise ValueError(
            f"deltas[{layer}] has shape {tuple(delta.shape)}: expected [n_heads, d_head], here "
            f"{expected}, the same at every layer."
        )
    if not bool(delta.isfinite().all()):
        n_bad = int((~delta.isfinite()).sum())
        raise ValueError(
            f"deltas[{layer}] has {n_bad} values that are not finite: the fit that made it "
            "diverged, or a factor is too large."
        )


def _check_finite(name: str, number: int | float) -> None:
    if not math.isfinite(number):
        raise ValueError(f"{name}={number}: an intervention is scaled by finite numbers only.")


def _same(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second.to(first.device))


def _layer_of(name: str) -> int:
    """The layer in a tensor's name in a file."""
    match = _HOOK_NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"a tensor is called {name!r}, not blocks.<layer>.attn.hook_z")
    return int(match[1])
