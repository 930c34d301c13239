"""`TransformerBridge` (TransformerLens 3.9 and later) as blocks over packed tokens."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tl_laai.abstract_backend import AttentionRule, Backend
from tl_laai.vocabulary import Unembedding, logit_scale


class BridgeBackend(Backend):
    """The blocks of a `TransformerBridge`."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._rotary: dict[int, tuple[Tensor, Tensor]] = {}
        self._block_kwargs: dict[int, dict[str, Any]] = {}
        self._moved_weight: Tensor | None = None  # of an unembedding that stands elsewhere
        attention: Any = self.attention(0)
        # GPT-J and CodeGen keep sines and cosines in the attention itself.
        own_table = getattr(attention.original_component, "embed_positions", None)
        self._has_own_tables = isinstance(own_table, Tensor)
        self.logit_scale = logit_scale(model.original_model.config)
        # Cohere's, since TransformerLens 4.
        self._has_half_tables = model.original_model.config.model_type == "gpt_oss"
        self._interleaved_tables = bool(getattr(model.cfg, "rotary_interleaved_cos_sin", False))
        self._adjacent_pairs = (
            self._has_own_tables
            or self._interleaved_tables
            or bool(getattr(model.cfg, "rotary_adjacent_pairs", False))
        )
        missing = [name for name in "qkvo" if getattr(attention, name, None) is None]
        if missing:
            raise ValueError(
                f"model: attention of type {type(attention).__name__} has no projections "
                f"{missing}; only softmax attention with q, k, v and o can be frozen exactly."
            )

    def block(self, layer: int) -> nn.Module:
        return cast(nn.Module, self.model.blocks[layer].original_component)

    def attention(self, layer: int) -> nn.Module:
        attention = getattr(self.model.blocks[layer], "attn", None)
        if attention is None:
            raise ValueError(f"model: block {layer} has no attention; only transformers are fitted")
        return cast(nn.Module, attention)

    def rule(self, layer: int) -> AttentionRule:
        attn: Any = self.attention(layer)
        inner = attn.original_component
        config: Any = getattr(inner, "config", None)
        if getattr(config, "model_type", None) == "gpt_neo":  # unscaled, windows by another name
            is_local = config.attention_layers[layer] == "local"
            return AttentionRule(1.0, None, config.window_size if is_local else None)
        scale = float(getattr(inner, "scaling", None) or self.d_head**-0.5)
        window = getattr(inner, "sliding_window", None)
        if not hasattr(inner, "sliding_window"):
            kinds = getattr(config, "layer_types", None)
            if kinds is None or kinds[layer] == "sliding_attention":
                window = getattr(config, "sliding_window", None)
        softcap = getattr(inner, "attn_logit_softcapping", None)
        return AttentionRule(scale, softcap, window, getattr(inner, "sinks", None))

    def qkv(
        self, layer: int, normalised: Tensor, positions: Tensor, *, with_query: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        attn: Any = self.attention(layer)
        q, k, v = (getattr(attn, name)(normalised[None])[0] for name in "qkv")
        phase = getattr(attn, "_qk_norm_phase", None)
        if phase == "pre_reshape":
            q, k = attn.q_norm(q[None])[0], attn.k_norm(k[None])[0]
        q, k, v = (t.reshape(t.shape[0], -1, self.d_head) for t in (q, k, v))
        rotated_first = getattr(attn.config, "qk_norm_after_rope", False)  # Hunyuan
        if phase == "post_reshape" and not rotated_first:
            q, k = self._normalise_heads(attn, q, k)
        # SmolLM3 has layers without positions.
        if layer in self._rotary and getattr(attn.original_component, "use_rope", True):
            # The model hands every layer the same tables, on the embedding's device.
            cos, sin = (
                t[positions.to(t.device), None, :].to(q.device) for t in self._rotary[layer]
            )
            q, k = (self._rotate(t, cos, sin) for t in (q, k))
        if phase == "post_reshape" and rotated_first:
            q, k = self._normalise_heads(attn, q, k)
        return q, k, v

    @staticmethod
    def _normalise_heads(attn: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q = attn.q_norm(q.transpose(0, 1)[None])[0].transpose(0, 1)
        return q, attn.k_norm(k.transpose(0, 1)[None])[0].transpose(0, 1)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        size = cos.shape[-1]
        head, rest = x[..., :size], x[..., size:]
        if self._adjacent_pairs:
            if not self._interleaved_tables:
                cos, sin = (t[..., : size // 2].repeat_interleave(2, dim=-1) for t in (cos, sin))
            flipped = torch.stack((-head[..., 1::2], head[..., 0::2]), dim=-1).flatten(-2)
        else:
            flipped = torch.cat((-head[..., size // 2 :], head[..., : size // 2]), dim=-1)
        rotated = (head * cos + flipped * sin).to(x.dtype)
        return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated

    def project_z(self, layer: int, z: Tensor) -> Tensor:
        attn: Any = self.attention(layer)
        return cast(Tensor, attn.o(z.reshape(1, z.shape[0], -1))[0])

    def call_block(self, layer: int, residual: Tensor) -> Tensor:
        out = self.block(layer)(residual[None], **self._block_kwargs[layer])
        return cast(Tensor, (out[0] if isinstance(out, tuple) else out)[0])

    def note_block_call(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rotary = kwargs.get("position_embeddings")
        if isinstance(rotary, tuple) and isinstance(rotary[0], Tensor):
            known = self._rotary.get(layer)
            cos, sin = (t.detach().reshape(-1, *t.shape[-2:])[0] for t in rotary)
            if self._has_half_tables:
                cos, sin = (torch.cat([t, t], dim=-1) for t in (cos, sin))
            if known is not None:
                shared = min(len(cos), len(known[0]))
                if not torch.allclose(cos[:shared], known[0][:shared], rtol=0, atol=1e-2):
                    raise ValueError(
                        f"model: its rotary positions depend on the length of a prompt, and one of "
                        f"{len(cos)} tokens has others than one of {len(known[0])}. Load the model "
                        "anew for prompts on the other side of its original context."
                    )
            if known is None or len(known[0]) < len(cos):
                self._rotary[layer] = (cos, sin)
        elif self._has_own_tables:
            attn: Any = self.attention(layer)
            sin, cos = attn.original_component.embed_positions.chunk(2, dim=-1)
            self._rotary[layer] = (torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1))
        if layer not in self._block_kwargs:
            # Masks, positions and caches belong to the whole prompt; our attention has its own.
            plain = (bool, int, float, str)
            self._block_kwargs[layer] = {
                name: value if isinstance(value, plain) and name != "use_cache" else None
                for name, value in kwargs.items()
                if name not in ("hidden_states", "use_cache", "output_attentions")
            }

    def ensure_positions(self, length: int) -> None:
        # A forward that was stopped at the first block has told of that block alone.
        told_of_all = len(self._block_kwargs) == self.n_layers
        if told_of_all and all(len(cos) >= length for cos, _ in self._rotary.values()):
            return
        size = min(self.n_ctx, max(64, 1 << (length - 1).bit_length()))
        tokens = torch.zeros((1, size), dtype=torch.long, device=self.device)
        self.capture(tokens, at_block=lambda _, __: None, at_attention=lambda _, __: None)

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *(table for both in self._rotary.values() for table in both)]

    @property
    def n_embeddings(self) -> int:
        return len(self.model.original_model.get_input_embeddings().weight)

    def unembedding(self) -> Unembedding:
        unembed = self.model.unembed.original_component
        bias = unembed.bias
        config = self.model.original_model.config
        text_config = getattr(config, "text_config", config)
        softcap = getattr(text_config, "final_logit_softcapping", None)
        weight = unembed.weight.detach()
        if weight.device != self.device:
            if self._moved_weight is None:
                self._moved_weight = weight.to(self.device)
            weight = self._moved_weight
        bias = bias.detach().to(self.device) if bias is not None and bool(bias.any()) else None
        return Unembedding(weight, bias, softcap)

    def attention_output(self, out: Tensor) -> Any:
        return out, None
