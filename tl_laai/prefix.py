"""The frozen prefix: keys and values of prompts computed once, and suffix tokens run on them.

Only the last prompt token (and the answer tokens behind it) can depend on an edit there, because
attention is causal. So everything before it is computed once, by the model's own forward, and
each evaluation runs the remaining "suffix" tokens only. Rows of many problems share one packed
batch: a row is one (problem, example) pair. This is exact: it equals a full forward to rounding
error. On the first use of a model, and whenever prompts grow longer, that is checked against the
model's own forward, and a model that does not agree is refused.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_laai.backends import Backend, backend_of, rank_within
from tl_laai.prompts import TokenisedExample

_NEVER = 1 << 30
_PREFILL_TOKENS = 2048


@dataclass(frozen=True)
class FrozenPrompts:
    """Prompts whose prefix keys and values are kept.

    Attributes:
        backend: the model.
        examples: what was frozen, in order.
        prefix_of: index of each example's prefix, `[n_examples]`; equal prefixes are shared.
        prefix_lengths: tokens of each prefix, `[n_prefixes]`.
        keys: layer -> `[n_prefixes, n_kv_heads, longest_prefix, d_head]`.
        values: the same.
        offsets: where an example's suffix tokens start in the arrays below, `[n_examples + 1]`.
        tokens, positions, targets: of every suffix token, `[n_tokens]`; the target of a token
            that predicts no answer token is -1.
        is_prompt_end: marks each example's last prompt token, `[n_tokens]`.
        prompt_ends: index of that token in the arrays above, `[n_examples]`.
        residuals: entry layer -> residual before that layer of every suffix token.
    """

    backend: Backend
    model: Any
    examples: tuple[TokenisedExample, ...]
    prefix_of: Int[Tensor, " n_examples"]
    prefix_lengths: Int[Tensor, " n_prefixes"]
    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    offsets: Int[Tensor, " n_examples_plus_1"]
    tokens: Int[Tensor, " n_tokens"]
    positions: Int[Tensor, " n_tokens"]
    targets: Int[Tensor, " n_tokens"]
    is_prompt_end: Tensor
    prompt_ends: Int[Tensor, " n_examples"]
    residuals: dict[int, Tensor] = field(default_factory=dict)

    def enter_at(self, layers: Sequence[int]) -> None:
        """Compute and keep the suffix residuals before each of `layers`."""
        missing = sorted(set(layers) - self.residuals.keys())
        if not missing:
            return
        packing = Packing(self, torch.arange(len(self.examples)), n_stages=1)
        stop = missing[-1]
        with torch.no_grad():
            x = self.backend.embed(self.tokens, self.positions)
            for layer, residual in run(packing, {0: x}, lambda _, z: z, stop=stop):
                if layer in missing:
                    self.residuals[layer] = residual


def freeze(
    model: Any, examples: Sequence[TokenisedExample], *, share_prefix: bool = False
) -> FrozenPrompts:
    """Compute the keys and values of prompts once.

    Example:
        >>> prompts = freeze(model, tokenise(model, task.examples[:10]))  # doctest: +SKIP

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        examples: tokenised prompts with their answers (an answer may be empty for decoding).
        share_prefix: freeze only the tokens common to all prompts, so that a long few-shot
            context is run once for all; right for decoding without an edit in the context.

    Raises:
        TypeError: a model of another class.
        ValueError: no examples, attached hooks, or attention that cannot be frozen exactly.
    """
    if not examples:
        raise ValueError("examples is empty: give at least one tokenised example.")
    backend = backend_of(model)
    _check_no_hooks(model)
    common = _common_prefix(examples) if share_prefix else None
    frozen = [
        e.prompt[: len(e.prompt) - 1 if common is None else min(common, len(e.prompt) - 1)]
        for e in examples
    ]
    prefixes = list(dict.fromkeys(frozen))
    index_of = {prefix: i for i, prefix in enumerate(prefixes)}
    longest_row = max(len(e.prompt) + len(e.answer) for e in examples)
    backend.ensure_positions(longest_row)
    keys, values = _prefill(backend, prefixes)

    tokens, positions, targets, ends, offsets = [], [], [], [], [0]
    for example, prefix in zip(examples, frozen, strict=True):
        sequence = (*example.prompt, *example.answer[:-1])
        end = len(example.prompt) - 1
        for position in range(len(prefix), len(sequence)):
            tokens.append(sequence[position])
            positions.append(position)
            ends.append(position == end)
            answered = position - end
            targets.append(example.answer[answered] if 0 <= answered < len(example.answer) else -1)
        offsets.append(len(tokens))

    def on_device(values_: Sequence[int] | Sequence[bool]) -> Tensor:
        return torch.tensor(values_, device=backend.device)

    prompts = FrozenPrompts(
        backend=backend,
        model=model,
        examples=tuple(examples),
        prefix_of=on_device([index_of[p] for p in frozen]),
        prefix_lengths=on_device([len(p) for p in prefixes]),
        keys=keys,
        values=values,
        offsets=on_device(offsets),
        tokens=on_device(tokens),
        positions=on_device(positions),
        targets=on_device(targets),
        is_prompt_end=on_device(ends),
        prompt_ends=on_device([i for i, end in enumerate(ends) if end]),
    )
    _verify(prompts)
    return prompts


def _check_no_hooks(model: Any) -> None:
    """Refuse attached hooks: they would see packed tokens, at positions that are not theirs."""
    hooked = [
        name
        for name, point in model.hook_dict.items()
        if not all(map(_passes_on, (*point.fwd_hooks, *point.bwd_hooks)))
    ]
    if hooked:
        raise ValueError(
            f"model has hooks at {hooked[:3]}, {len(hooked)} in all: they cannot be honoured where "
            "prompts are frozen. Call model.reset_hooks(including_permanent=True), or leave the "
            "block in which an intervention is applied_to it."
        )


def _passes_on(handle: Any) -> bool:
    """Whether a hook is TransformerLens' own, which only hands a tensor to another hook point."""
    module = getattr(getattr(handle, "user_hook", None), "__module__", None) or ""
    return handle.is_permanent and module.startswith("transformer_lens.")


def _common_prefix(examples: Sequence[TokenisedExample]) -> int:
    first, last = min(e.prompt for e in examples), max(e.prompt for e in examples)
    pairs = enumerate(zip(first, last, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(last)))


def _prefill(
    backend: Backend, prefixes: Sequence[tuple[int, ...]]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Keys and values of each prefix; equal lengths together, so that nothing is padded."""
    longest = max(len(p) for p in prefixes)
    shape = (len(prefixes), backend.n_kv_heads, longest, backend.d_head)
    keys, values = (
        {
            layer: torch.zeros(shape, dtype=backend.dtype, device=backend.device)
            for layer in range(backend.n_layers)
        }
        for _ in range(2)
    )
    by_length: dict[int, list[int]] = {}
    for i, prefix in enumerate(prefixes):
        by_length.setdefault(len(prefix), []).append(i)
    for length, members in by_length.items():
        step = max(1, _PREFILL_TOKENS // max(1, length))
        for start in range(0, len(members) if length else 0, step):
            rows = torch.tensor(members[start : start + step], device=backend.device)
            tokens = torch.tensor([prefixes[i] for i in rows.tolist()], device=backend.device)
            positions = torch.arange(length, device=backend.device).repeat(len(rows))

            def keep(
                layer: int, x: Tensor, rows: Tensor = rows, positions: Tensor = positions
            ) -> None:
                _, k, v = backend.qkv(layer, x.flatten(0, 1), positions)
                for kept, new in ((keys, k), (values, v)):
                    new = new.unflatten(0, x.shape[:2]).transpose(1, 2).to(backend.dtype)
                    kept[layer][rows, :, : x.shape[1]] = new

            backend.capture(tokens, at_block=lambda _, __: None, at_attention=keep)
    return keys, values


class Packing:
    """Where each token of a batch of rows sits in the padded grid that attention works on.

    Rows that share a prefix are stacked, so that its keys are multiplied once for all of them:
    the grid is `[n_prefixes, rows a prefix, steps]`. Tokens enter in stages (rows whose edited
    layer is higher join later); tokens of one stage are contiguous.

    Args:
        prompts: the frozen prompts.
        rows: index of the example of each row, `[n_rows]`, ordered by stage.
        stages: stage of each row, `[n_rows]`, non-decreasing; omitted for one stage.
        prompt_only: leave the answer tokens out.
    """

    def __init__(
        self,
        prompts: FrozenPrompts,
        rows: Int[Tensor, " n_rows"],
        stages: Int[Tensor, " n_rows"] | None = None,
        n_stages: int = 1,
        *,
        prompt_only: bool = False,
    ) -> None:
        self.prompts = prompts
        device = prompts.tokens.device
        rows = rows.to(device)
        n_rows = len(rows)
        stages = torch.zeros(n_rows, dtype=torch.long) if stages is None else stages
        lengths = (prompts.prompt_ends + 1 if prompt_only else prompts.offsets[1:])[rows]
        lengths = lengths - prompts.offsets[rows]
        self.row = torch.repeat_interleave(torch.arange(n_rows, device=device), lengths)
        starts = torch.cumsum(lengths, 0) - lengths
        self.step = torch.arange(len(self.row), device=device) - starts[self.row]
        self.token = prompts.offsets[rows][self.row] + self.step
        self.positions = prompts.positions[self.token]
        self.last = starts + lengths - 1
        self.used, prefix = torch.unique(prompts.prefix_of[rows], return_inverse=True)
        rank = rank_within(prefix)
        self.grid = (len(self.used), int(rank.max()) + 1, int(lengths.max()))
        self.row_slot = prefix * self.grid[1] + rank
        self.slot = self.row_slot[self.row] * self.grid[2] + self.step
        per_stage = torch.bincount(stages.to(device)[self.row], minlength=n_stages)
        self.n_tokens = torch.cumsum(per_stage, 0).tolist()
        self.suffix_position = self._in_grid(self.positions, _NEVER)

    def _in_grid(self, values: Tensor, empty: int) -> Tensor:
        grid = values.new_full((math.prod(self.grid),), empty)
        grid[self.slot] = values
        return grid.view(self.grid)

    def gather_index(self, stage: int) -> Tensor:
        """Which token fills each place of the grid; places without one hold token 0."""
        n = self.n_tokens[stage]
        index = torch.zeros(math.prod(self.grid), dtype=torch.long, device=self.slot.device)
        index[self.slot[:n]] = torch.arange(n, device=index.device)
        return index

    def next_step(self, rows: Int[Tensor, " n_rows"], positions: Int[Tensor, " n_rows"]) -> Packing:
        """The packing of one more token of some of the rows, at given positions."""
        following = copy.copy(self)
        following.row = rows
        following.grid = (*self.grid[:2], 1)
        following.slot = self.row_slot[rows]
        following.positions = positions
        following.n_tokens = [len(rows)]
        following.suffix_position = following._in_grid(positions, _NEVER)
        return following

    def prefix(self, kept: Tensor) -> Tensor:
        """Keys or values of the prefixes in use."""
        return kept if len(self.used) == kept.shape[0] else kept[self.used]

    @cached_property
    def prefix_position(self) -> Tensor:
        """Position of every prefix key, `[n_prefixes, longest]`; places past the end: never."""
        kept = self.prompts.keys[0]
        lengths = self.prompts.prefix_lengths[self.used]
        at = torch.arange(kept.shape[2], device=lengths.device).expand(len(self.used), -1)
        return torch.where(at < lengths[:, None], at, _NEVER)


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
) -> Float[Tensor, "places n_heads d_head"]:
    """Softmax attention of gridded queries over frozen prefix and own suffix keys."""
    u, r, s = packing_grid
    kv, p, d = prefix_keys.shape[1:]
    t, g = keys.shape[2], q.shape[1] // kv
    grouped = q.view(u, r, s, kv, g, d)
    to_prefix = grouped.permute(0, 3, 1, 2, 4, 5).reshape(u, kv, r * s * g, d)
    to_suffix = grouped.permute(0, 1, 3, 2, 4, 5).reshape(u, r, kv, s * g, d)
    scores = torch.cat(
        [
            (to_prefix @ prefix_keys.transpose(-1, -2)).view(u, kv, r, s, g, p),
            (to_suffix @ keys.permute(0, 1, 3, 4, 2)).view(u, r, kv, s, g, t).transpose(1, 2),
        ],
        dim=-1,
    )
    scores = scores * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    accumulate = torch.float64 if scores.dtype == torch.float64 else torch.float32
    pattern = scores.softmax(dim=-1, dtype=accumulate).to(q.dtype)
    from_prefix = pattern[..., :p].reshape(u, kv, r * s * g, p) @ prefix_values
    own = pattern[..., p:].transpose(1, 2).reshape(u, r, kv, s * g, t)
    from_suffix = own @ values.transpose(2, 3)
    z = from_prefix.view(u, kv, r, s, g, d).permute(0, 2, 3, 1, 4, 5)
    z = z + from_suffix.view(u, r, kv, s, g, d).transpose(2, 3)
    return z.reshape(u * r * s, kv * g, d)


@dataclass
class SuffixCache:
    """Keys and values of suffix tokens that have run, for decoding token by token.

    Attributes:
        keys: layer -> `[u, r, t, n_kv_heads, d_head]`; values alike.
        positions: of each of them, `[u, r, t]`; places without a token: never.
    """

    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    positions: Tensor | None = None


def run(
    packing: Packing,
    entries: Mapping[int, Tensor],
    edit: Callable[[int, Tensor], Tensor],
    *,
    edit_residual: Callable[[int, Tensor], Tensor] | None = None,
    stop: int | None = None,
    cache: SuffixCache | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Run packed tokens through the blocks, yielding `(layer, residual before it)`.

    The last item is `(n_layers, residual after the last block)` (or `(stop, ...)`).

    Args:
        packing: where tokens sit.
        entries: layer -> residuals of the tokens that join before that layer, in stage order.
        edit: `(layer, z [n, n_heads, d_head]) -> z` with the interventions added.
        edit_residual: `(layer, residual before it [n, d_model]) -> residual`, likewise; what is
            yielded is already edited.
        stop: leave before this layer.
        cache: suffix tokens of earlier steps, also seen; this step's are appended.
    """
    prompts = packing.prompts
    backend = prompts.backend
    joins = sorted(entries)
    indices = [packing.gather_index(stage) for stage in range(len(joins))]
    stage = 0
    seen: dict[int | None, Tensor] = {}

    key_positions = packing.suffix_position
    if cache is not None:
        if cache.positions is not None:
            key_positions = torch.cat([cache.positions, key_positions], dim=-1)
        cache.positions = key_positions

    def own_pattern(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rule = backend.rule(layer)
        if rule.window not in seen:
            seen[rule.window] = visible(
                packing.suffix_position, packing.prefix_position, key_positions, rule.window
            )
        index = indices[stage]
        keys, values = (t.index_select(0, index).unflatten(0, packing.grid) for t in (k, v))
        if cache is not None:
            if layer in cache.keys:
                keys = torch.cat([cache.keys[layer], keys], dim=2)
                values = torch.cat([cache.values[layer], values], dim=2)
            cache.keys[layer], cache.values[layer] = keys, values
        z = attend(
            packing.grid,
            q.index_select(0, index),
            packing.prefix(prompts.keys[layer]),
            packing.prefix(prompts.values[layer]),
            keys,
            values,
            seen[rule.window],
            rule.scale,
            rule.softcap,
        )
        return edit(layer, z.index_select(0, packing.slot[: q.shape[0]]))

    positions = [
        packing.positions[: packing.n_tokens[max(0, sum(j <= layer for j in joins) - 1)]]
        for layer in range(backend.n_layers)
    ]
    last = backend.n_layers if stop is None else stop
    x = entries[joins[0]]
    with backend.attending(own_pattern, positions):
        for layer in range(joins[0], last):
            if stage + 1 < len(joins) and layer == joins[stage + 1]:
                stage += 1
                x = torch.cat([x, entries[layer]])
            if edit_residual is not None:
                x = edit_residual(layer, x)
            yield layer, x
            x = backend.call_block(layer, x)
    yield last, x


def last_residual(steps: Iterator[tuple[int, Tensor]]) -> Tensor:
    """The residual of the last step of a run."""
    return deque(steps, maxlen=1).pop()[1]


def _verify(prompts: FrozenPrompts) -> None:
    """Refuse a model whose own forward the engine does not reproduce.

    The tolerance is far above rounding (measured 1e-6 relative in float32, 3e-2 in bfloat16) and
    below what a wrong mask, position or missing term does.
    """
    backend = prompts.backend
    lengths = [len(e.prompt) + len(e.answer) for e in prompts.examples]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if lengths[longest] <= backend.verified_length:
        return
    example = prompts.examples[longest]
    tokens = torch.tensor([[*example.prompt, *example.answer[:-1]]], device=backend.device)
    packing = Packing(prompts, torch.tensor([longest]))
    with torch.no_grad():
        x = backend.embed(prompts.tokens[packing.token], packing.positions)
        ours = backend.final_norm(last_residual(run(packing, {0: x}, lambda _, z: z)))
        theirs = backend.capture(
            tokens, at_block=lambda _, __: None, at_attention=lambda _, __: None
        )[0, -len(ours) :]
        tolerance = 1e-3 if backend.dtype in (torch.float32, torch.float64) else 0.1
        worst = float((ours - theirs).norm() / theirs.norm())
        if backend.verified_length == 0 and worst <= tolerance:
            head = backend.unembedding()
            logits = ours @ head.weight.T
            logits = head.cap(logits if head.bias is None else logits + head.bias)
            expected = backend.logits(tokens)[0, -len(ours) :]
            # Root mean squares: in bfloat16 the worst of 262,144 logits is off by a tenth of them.
            shift, spread = (x - x.mean(-1, keepdim=True) for x in (logits - expected, expected))
            worst = float(shift.float().norm() / spread.float().norm())
    if not math.isfinite(worst):
        raise ValueError(
            f"model {type(prompts.model).__name__}: its own forward over {example.input!r} is not "
            "finite. Look for NaN among its weights, or load it in a wider dtype (float32)."
        )
    if worst > tolerance:
        raise ValueError(
            f"model {type(prompts.model).__name__}: its own forward and the frozen-prefix engine "
            f"differ by {worst:.1e} (relative; {tolerance:.0e} is allowed), so its attention has "
            "a feature that the engine does not know, or torch hooks are attached to its modules. "
            "Remove those; if that does not help, this model cannot be fitted."
        )
    backend.verified_length = max(backend.verified_length, lengths[longest])
