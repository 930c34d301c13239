"""`HookedTransformer` (TransformerLens 3.x) as blocks over packed tokens."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tl_laai.abstract_backend import AttentionRule, Backend
from tl_laai.vocabulary import Unembedding


class HookedBackend(Backend):
    """The blocks of a `HookedTransformer`."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        cfg = model.cfg
        kind = cfg.positional_embedding_type
        if kind not in ("standard", "rotary"):
            raise ValueError(
                f"model.cfg.positional_embedding_type is {kind!r}: only 'standard' (learnt) and "
                "'rotary' positions can be frozen exactly. Load another model."
            )
        for flag in ("use_dynamic_ntk_rope", "use_logn_attn"):
            if getattr(cfg, flag, False):
                raise ValueError(f"model.cfg.{flag} is True: not supported by the frozen prefix.")

    def block(self, layer: int) -> nn.Module:
        return cast(nn.Module, self.model.blocks[layer])

    def attention(self, layer: int) -> nn.Module:
        return cast(nn.Module, self.model.blocks[layer].attn)

    def rule(self, layer: int) -> AttentionRule:
        attn: Any = self.attention(layer)
        softcap = float(self.model.cfg.attn_scores_soft_cap)
        window = int(self.model.cfg.window_size) if attn.attn_type == "local" else None
        return AttentionRule(
            1.0 / float(attn.attn_scale),
            softcap if softcap > 0 else None,
            window,
            getattr(attn, "sinks", None),
        )

    def qkv(
        self, layer: int, normalised: Tensor, positions: Tensor, *, with_query: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        attn: Any = self.attention(layer)
        x = normalised[None]
        q, k, v = (t[0] for t in attn.calculate_qkv_matrices(x, x, x))
        if self.model.cfg.positional_embedding_type == "rotary":
            q, k = (self._rotate(attn, t, positions) for t in (q, k))
        return q, k, v

    def _rotate(self, attn: Any, x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = (t[positions, None, :] for t in (attn.rotary_cos, attn.rotary_sin))
        size = cos.shape[-1]
        rotated = x[..., :size] * cos + attn.rotate_every_two(x[..., :size]) * sin
        return torch.cat([rotated, x[..., size:]], dim=-1) if size < x.shape[-1] else rotated

    def ensure_positions(self, length: int) -> None:
        for layer in range(self.n_layers):
            attn: Any = self.attention(layer)
            table = getattr(attn, "rotary_cos", None)
            if table is not None and length > table.shape[0]:
                attn._extend_rotary_embeddings(min(self.n_ctx, 2 * length))

    def project_z(self, layer: int, z: Tensor) -> Tensor:
        attn: Any = self.attention(layer)
        weight = attn.W_O.reshape(-1, self.d_model)
        return torch.addmm(attn.b_O, z.reshape(z.shape[0], -1).to(weight), weight)

    def call_block(self, layer: int, residual: Tensor) -> Tensor:
        return cast(Tensor, self.model.blocks[layer](residual[None])[0])

    @property
    def n_embeddings(self) -> int:
        return len(self.model.embed.W_E)

    def unembedding(self) -> Unembedding:
        bias = self.model.unembed.b_U.detach()
        softcap = float(self.model.cfg.output_logits_soft_cap)
        return Unembedding(
            self.model.unembed.W_U.detach().T,
            bias if bool(bias.any()) else None,
            softcap if softcap > 0 else None,
        )

    def attention_output(self, out: Tensor) -> Any:
        return out
