"""A model seen as blocks over packed tokens: what every backend has, and what it must define.

A backend keeps every piece of a block that belongs to the model (norms, MLP, residual wiring)
as the model's own module and replaces one thing only: the attention pattern over positions.
Tokens of many rows are packed into one axis `[n_tokens, d_model]`; the caller supplies the
function that lets them attend. Everything else in a block acts on each token alone, so packing
is exact and no padding token is ever computed.

Limits: decoder-only models whose attention is softmax over (optionally soft-capped, windowed)
dot products, perhaps beside sinks, with learnt or rotary positions. ALiBi, gated attention outputs,
mixers and encoder-decoders are refused, by name or because the check against the model's own
forward (`tl_laai.prefix`) does not hold.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_laai.products import frozen_products
from tl_laai.vocabulary import Unembedding

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""`(layer, q, k, v) -> z`, shapes `[n, n_heads | n_kv_heads, d_head]` -> `[n, n_heads, d_head]`."""


@dataclass(frozen=True)
class AttentionRule:
    """How one layer turns dot products into scores.

    Attributes:
        scale: factor on `q . k`.
        softcap: scores become `softcap * tanh(scores / softcap)`; None for no cap.
        window: a query sees keys at distances `0 .. window - 1`; None for all earlier positions.
        sinks: a score a head, `[n_heads]`, that takes part in its softmax, and has no value.
    """

    scale: float
    softcap: float | None
    window: int | None
    sinks: Tensor | None = None


class _StopForward(Exception):  # noqa: N818  # not an error
    """Leaves a model's forward once everything wanted has been captured."""


class Backend(ABC):
    """One model, seen as blocks over packed tokens.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; it is never changed.
    """

    def __init__(self, model: Any) -> None:
        cfg = model.cfg
        # Weakly: backends are cached by model, and must not keep it alive.
        self._model = weakref.ref(model)
        self.n_layers = int(cfg.n_layers)
        self.n_heads = int(cfg.n_heads)
        self.n_kv_heads = int(getattr(cfg, "n_key_value_heads", None) or cfg.n_heads)
        self.d_head = int(cfg.d_head)
        self.d_model = int(cfg.d_model)
        self.n_ctx = int(cfg.n_ctx)
        self.dtype, self.device = kind_of_weights(model)
        self.verified_length = 0
        # Its own modules are what runs: two threads would attend through each other's patterns.
        self.at_work = threading.RLock()
        # Logits are what the unembedding makes of the last normalised residual times this.
        self.logit_scale = 1.0

    @property
    def model(self) -> Any:
        """The model itself."""
        return self._model()

    # What differs between the two classes -------------------------------------------------

    @abstractmethod
    def block(self, layer: int) -> nn.Module:
        """The module called once per forward with the residual stream of `layer`."""

    @abstractmethod
    def attention(self, layer: int) -> nn.Module:
        """The module inside that block which mixes positions."""

    @abstractmethod
    def rule(self, layer: int) -> AttentionRule:
        """How `layer` scores queries against keys."""

    @abstractmethod
    def qkv(
        self,
        layer: int,
        normalised: Float[Tensor, "n d_model"],
        positions: Int[Tensor, " n"],
        *,
        with_query: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values with positions applied, `[n, heads, d_head]` each."""

    @abstractmethod
    def project_z(self, layer: int, z: Float[Tensor, "n n_heads d_head"]) -> Tensor:
        """Output projection of `layer`, `[n, d_model]`."""

    @abstractmethod
    def call_block(self, layer: int, residual: Float[Tensor, "n d_model"]) -> Tensor:
        """Run the block's own forward over packed tokens, `[n, d_model]`."""

    @property
    @abstractmethod
    def n_embeddings(self) -> int:
        """How many tokens the model has an embedding of."""

    @abstractmethod
    def unembedding(self) -> Unembedding:
        """The model's unembedding."""

    @abstractmethod
    def attention_output(self, out: Tensor) -> Any:
        """What the block expects its attention module to return."""

    def ensure_positions(self, length: int) -> None:
        """Make position tables reach `length` (nothing to do where the model grows them)."""
        return

    def tensors(self) -> list[Tensor]:
        """All that evaluations read of the model."""
        roots = (self.model, getattr(self.model, "original_model", self.model))
        return [t for root in roots for t in (*root.parameters(), *root.buffers())]

    # What both share ----------------------------------------------------------------------

    def final_norm(self, residual: Float[Tensor, "n d_model"]) -> Tensor:
        """What is unembedded: the last norm's output, scaled as the logits are."""
        norm = getattr(self.model, "ln_final", None)
        if norm is not None:
            device = next(norm.parameters(), residual).device
            residual = norm(residual[None].to(device))[0].to(self.device)
        return residual if self.logit_scale == 1 else residual * self.logit_scale

    def written(
        self,
        layer: int,
        part: Float[Tensor, "n n_heads d_head"],
        whole: Float[Tensor, "n n_heads d_head"],
    ) -> Float[Tensor, "n d_model"]:
        """What part of the heads' outputs adds to the residual, the rest being as in `whole`.

        That is `part` through W_O, without its bias, times the block's own factor on what it adds
        (Granite). Where a norm stands behind W_O (Gemma 2 and 3), its gain and the size that it
        has in `whole` are applied too, so that parts that sum to `whole` add what `whole` adds.
        """
        with torch.no_grad():
            device = next(self.attention(layer).parameters()).device
            part, whole = part.to(device), whole.to(device)
            bias = self.project_z(layer, torch.zeros_like(part))
            out = self.project_z(layer, part) - bias
            out = out * getattr(self.block(layer), "residual_multiplier", 1.0)
            norm = getattr(self.model.blocks[layer], "ln1_post", None)
            if norm is None:
                return out.to(self.device)
            gain: Tensor = norm(torch.ones_like(out)[None])[0]  # an RMS norm divides this by one
            size = self.project_z(layer, whole).square().mean(dim=-1, keepdim=True).sqrt()
            return (out * gain / size).to(self.device)

    def logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """The model's own logits by its own forward, without padding."""
        with torch.no_grad(), _without_dropout(self.model):
            return cast(
                Tensor,
                self.model(tokens, return_type="logits", attention_mask=torch.ones_like(tokens)),
            )

    def capture(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        at_block: Callable[[int, Tensor], None],
        at_attention: Callable[[int, Tensor], None],
    ) -> Tensor:
        """Run the model's own forward over unpadded tokens, up to the unembedding.

        Args:
            tokens: token ids `[batch, pos]`, all rows of the same length.
            at_block: called with `(layer, residual before the block [batch, pos, d_model])`.
            at_attention: called with `(layer, the attention's normalised input)`.

        Returns:
            The input of the unembedding, `[batch, pos, d_model]`, scaled as the logits are;
            empty if `at_block` left early.
        """
        final: list[Tensor] = []
        handles = []

        def block_hook(
            layer: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> None:
            self.note_block_call(layer, args, kwargs)
            at_block(layer, _hidden_states(args, kwargs))

        def attention_hook(
            layer: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> None:
            at_attention(layer, _hidden_states(args, kwargs))

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            final.append(_hidden_states(args, kwargs))
            raise _StopForward

        with self.at_work:
            try:
                for layer in range(self.n_layers):
                    for module, hook in (
                        (self.block(layer), partial(block_hook, layer)),
                        (self.attention(layer), partial(attention_hook, layer)),
                    ):
                        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                handles.append(self.model.unembed.register_forward_pre_hook(stop, with_kwargs=True))
                with torch.no_grad(), frozen_products(), suppress(_StopForward):
                    self.logits(tokens)
            finally:
                for handle in handles:
                    handle.remove()
        return final[0].to(self.device) * self.logit_scale if final else torch.empty(0)

    def note_block_call(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember what the model passes to a block (overridden where blocks need more)."""
        return

    def embed(
        self, tokens: Int[Tensor, " n"], positions: Int[Tensor, " n"]
    ) -> Float[Tensor, "n d_model"]:
        """The residual before block 0 of single tokens at given positions."""
        rotary = getattr(self.model.cfg, "positional_embedding_type", None) == "rotary"
        columns = torch.zeros_like(positions) if rotary else positions
        rows = rank_within(columns)
        grid = tokens.new_zeros((int(rows.max()) + 1, int(columns.max()) + 1))
        grid[rows, columns] = tokens
        found: list[Tensor] = []

        def at_block(_: int, residual: Tensor) -> None:
            found.append(residual)
            raise _StopForward

        self.capture(grid, at_block=at_block, at_attention=lambda _, __: None)
        return found[0].to(self.device)[rows, columns]

    @contextmanager
    def attending(self, attend: Attend, positions: Sequence[Tensor]) -> Iterator[None]:
        """Within the context, blocks attend through `attend` instead of their own pattern.

        Args:
            attend: lets packed queries see keys; returns z, with any edit already applied.
            positions: one tensor `[n]` a layer: absolute positions of that layer's tokens.
        """

        def forward(layer: int, *args: Any, **kwargs: Any) -> Any:
            x = _hidden_states(args, kwargs)
            # A layer may stand on a device of its own; what is packed does not.
            own = self.qkv(layer, x[0], positions[layer].to(x.device))
            z = attend(layer, *(t.to(self.device) for t in own))
            return self.attention_output(self.project_z(layer, z.to(x.device))[None])

        attributes = [vars(self.attention(layer)) for layer in range(self.n_layers)]
        with self.at_work:
            # Other libraries too put a forward of their own on a module.
            found = [own.get("forward") for own in attributes]
            try:
                for layer, own in enumerate(attributes):
                    own["forward"] = partial(forward, layer)
                with _without_dropout(self.model):
                    yield
            finally:
                for own, before in zip(attributes, found, strict=True):
                    own.pop("forward", None)
                    if before is not None:
                        own["forward"] = before


def rank_within(groups: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """How many earlier entries belong to the same group, for each entry.

    Example:
        >>> rank_within(torch.tensor([2, 0, 2, 2, 0]))
        tensor([0, 0, 1, 2, 1])
    """
    order = torch.argsort(groups, stable=True)
    counts = torch.bincount(groups)
    first = (torch.cumsum(counts, 0) - counts)[groups[order]]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - first
    return rank


def kind_of_weights(model: Any) -> tuple[torch.dtype, torch.device]:
    """The dtype and device of a model, by its first parameter."""
    parameter = next(model.parameters())
    return parameter.dtype, parameter.device


@contextmanager
def own_modes() -> Iterator[None]:
    """Gradients on, inference mode and autocast off, whatever the caller has switched on.

    No gradient passes through tensors that were made in inference mode, and autocast would round
    what is computed in the model's own dtype.
    """
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        for kind in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a block or its attention is given, by whatever name."""
    for key in ("query_input", "hidden_states"):
        if key in kwargs:
            return cast(Tensor, kwargs[key])
    return cast(Tensor, args[0])


@contextmanager
def _without_dropout(model: Any) -> Iterator[None]:
    """Put every module in eval mode, and each back into its own mode afterwards."""
    # A bridge does not list all modules of the model that it wraps among its own.
    modules = _modules_of(model, getattr(model, "original_model", model))
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _modules_of(*roots: nn.Module) -> set[nn.Module]:
    """All modules of models, each once.

    A bridge has a thousand or two, of which `modules()` makes a list in some milliseconds: long,
    at every step of a fit.
    """
    found, left = set(roots), list(roots)
    while left:
        for module in left.pop()._modules.values():
            if module is not None and module not in found:
                found.add(module)
                left.append(module)
    return found
