"""Suffix tokens of frozen prompts, packed into one axis and run through the blocks.

Rows of many problems share one packed batch: a row is one (problem, example) pair. Every token
attends to the kept keys of its row's prefix and to the suffix tokens before it in its row.
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
from jaxtyping import Int
from torch import Tensor

from tl_laai.attention import attend, room_for_steps, visible
from tl_laai.backends import Backend, own_modes, rank_within
from tl_laai.products import BLOCKS, CAPABILITY, USE_ONEDNN, frozen_products
from tl_laai.prompts import TokenisedExample

_NEVER = 1 << 30

STEP_BLOCK = BLOCKS[CAPABILITY] if USE_ONEDNN else 1
"""Suffixes are padded to multiples of it: what is left over of a block is rounded otherwise."""


@dataclass(frozen=True)
class FrozenPrompts:
    """Prompts whose prefix keys and values are kept.

    Attributes:
        backend: the model.
        examples: what was frozen, in order.
        prefix_of: index of each example's prefix, `[n_examples]`; equal prefixes are shared.
        prefix_lengths: tokens of each prefix, `[n_prefixes]`.
        keys: layer -> `[n_prefixes, n_kv_heads, room_for_keys, d_head]`.
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

    @own_modes()
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


class Packing:
    """Where each token of a batch of rows sits in the padded grid that attention works on.

    Rows that share a prefix are stacked, so that its keys are multiplied once for all of them:
    the grid is `[n_lines, rows a line, steps]`, and the rows of a line have one prefix. Where one
    prefix has many more rows than others it has several lines, so that at most half of the places
    for rows are empty. Tokens enter in stages (rows whose edited layer is higher join later);
    tokens of one stage are contiguous.

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
        used, prefix, counts = torch.unique(
            prompts.prefix_of[rows], return_inverse=True, return_counts=True
        )
        width = _line_width(counts)
        lines = -(-counts // width)
        self.used = torch.repeat_interleave(used, lines)  # prefix of each line
        rank = rank_within(prefix)
        line = (torch.cumsum(lines, 0) - lines)[prefix] + rank // width
        backend = prompts.backend
        heads_a_key = backend.n_heads // backend.n_kv_heads
        if STEP_BLOCK > 1 and _next_token_only(prompts):  # whole blocks of rows are fewer places
            steps, width = 1, -(-width // STEP_BLOCK) * STEP_BLOCK
        else:
            steps = room_for_steps(int(lengths.max()), heads_a_key, backend.d_head, STEP_BLOCK)
        self.grid = (len(self.used), width, steps)
        self.row_slot = line * width + rank % width
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
        """Keys or values of each line's prefix."""
        return kept if self._one_line_each else kept[self.used]

    @cached_property
    def _one_line_each(self) -> bool:
        n_prefixes = len(self.prompts.prefix_lengths)
        return self.used.tolist() == list(range(n_prefixes))

    @cached_property
    def prefix_position(self) -> Tensor:
        """Position of every prefix key, `[n_lines, room_for_keys]`; past the end: never."""
        kept = self.prompts.keys[0]
        lengths = self.prompts.prefix_lengths[self.used]
        at = torch.arange(kept.shape[2], device=lengths.device).expand(len(self.used), -1)
        return torch.where(at < lengths[:, None], at, _NEVER)


def _next_token_only(prompts: FrozenPrompts) -> bool:
    """Whether every suffix is its last prompt token, with no answer behind it: opinions."""
    return len(prompts.tokens) == len(prompts.examples) and bool((prompts.targets < 0).all())


def _line_width(counts: Int[Tensor, " n_prefixes"]) -> int:
    """The most rows a line at which at most half of the places of all lines are empty."""
    width = int(counts.max())
    while int((-(-counts // width)).sum()) * width > 2 * int(counts.sum()):
        width = -(-width // 2)
    return width


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
            rule.sinks,
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
            with frozen_products():
                x = backend.call_block(layer, x).to(backend.device)
    yield last, x


def last_residual(steps: Iterator[tuple[int, Tensor]]) -> Tensor:
    """The residual of the last step of a run."""
    return deque(steps, maxlen=1).pop()[1]
