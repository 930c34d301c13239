"""Attention over a frozen prefix and own suffix keys, from queries, keys, values and positions.

What a row's attention rounds to must not depend on the rows beside it in a batch (see
`tl_laai.__init__`), so what they share, the room for keys and steps, has sizes within which torch
takes the same path: its softmax adds up in vectors of 16, and its batched matrix products have
other kernels for vectors and for tiny matrices; on other CPUs than Intel's also for what is left
over of blocks of four (with AVX2 of eight), and for more than eleven (eight), which is left so.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

_VECTOR = 16
"""Numbers in the widest vector of a CPU, in float32."""

_TINY = 400
"""Multiplications below which torch takes another kernel for a batch of matrix products."""


def room_for_keys(longest: int) -> int:
    """Places for the keys of prefixes, of which the longest has so many: whole vectors of them."""
    return -(-max(1, longest) // _VECTOR) * _VECTOR


def room_for_steps(longest: int, heads_a_key: int, d_head: int, block: int = 1) -> int:
    """Places for the suffix tokens of a row, of which the longest has so many.

    Whole blocks of them, and no matrix of scores is a vector, or tiny.
    """
    steps = max(2, longest)
    while steps % block or heads_a_key * d_head * steps**2 < _TINY:
        steps += 1
    return steps


def visible(
    query: Int[Tensor, "u r s"],
    prefix: Int[Tensor, "u p"],
    suffix: Int[Tensor, "u r t"],
    window: int | None,
) -> Tensor:
    """Which keys each query sees, bool `[u, 1, r, s, 1, p + t]`, from positions alone."""
    u, r, _ = query.shape
    keys = torch.cat([prefix[:, None].expand(u, r, -1), suffix], dim=-1)[:, :, None]
    distance = query[..., None] - keys
    seen = distance >= 0
    if window is not None:
        seen = seen & (distance < window)
    return seen[:, None, :, :, None]


def attend(
    packing_grid: tuple[int, int, int],
    q: Float[Tensor, "places n_heads d_head"],
    prefix_keys: Float[Tensor, "u n_kv_heads p d_head"],
    prefix_values: Float[Tensor, "u n_kv_heads p d_head"],
    keys: Float[Tensor, "u r t n_kv_heads d_head"],
    values: Float[Tensor, "u r t n_kv_heads d_head"],
    seen: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Float[Tensor, " n_heads"] | None = None,
) -> Float[Tensor, "places n_heads d_head"]:
    """Softmax attention of gridded queries over frozen prefix and own suffix keys.

    `sinks` are scores that take part in a head's softmax, and have no value.
    """
    u, r, s = packing_grid
    kv, p, d = prefix_keys.shape[1:]
    t, g = keys.shape[2], q.shape[1] // kv
    grouped = q.view(u, r, s, kv, g, d)
    to_prefix = grouped.permute(0, 3, 1, 2, 4, 5).reshape(u, kv, r * s * g, d)
    to_suffix = grouped.permute(0, 1, 3, 2, 4, 5).reshape(u, r, kv, s * g, d)
    # Whole in memory, or torch would copy them for several rows and not for one, and multiply
    # what is transposed in one case and not in the other.
    own_keys, own_values = (x.transpose(2, 3).contiguous() for x in (keys, values))
    scores = torch.cat(
        [
            (to_prefix @ prefix_keys.transpose(-1, -2)).view(u, kv, r, s, g, p),
            (to_suffix @ own_keys.transpose(-1, -2)).view(u, r, kv, s, g, t).transpose(1, 2),
        ],
        dim=-1,
    )
    scores = scores * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    accumulate = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if sinks is not None:
        own_sinks = sinks.to(scores).view(1, kv, 1, 1, g, 1).expand(u, kv, r, s, g, 1)
        scores = torch.cat([scores, own_sinks], dim=-1)
    pattern = scores.softmax(dim=-1, dtype=accumulate)[..., : p + t].to(q.dtype)
    from_prefix = pattern[..., :p].reshape(u, kv, r * s * g, p) @ prefix_values
    own = pattern[..., p:].transpose(1, 2).reshape(u, r, kv, s * g, t)
    from_suffix = own @ own_values
    z = from_prefix.view(u, kv, r, s, g, d).permute(0, 2, 3, 1, 4, 5)
    z = z + from_suffix.view(u, r, kv, s, g, d).transpose(2, 3)
    return z.reshape(u * r * s, kv * g, d)
