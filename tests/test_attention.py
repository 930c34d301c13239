"""Attention over prefix and suffix: who sees whom, and what comes of it, against loops."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import exact_in_float32, exact_products
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tl_laai.attention import attend, room_for_keys, room_for_steps, visible
from tl_laai.packing import STEP_BLOCK
from tl_laai.products import USE_ONEDNN


@settings(deadline=None, max_examples=50)
@given(
    query=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    prefix=st.lists(st.integers(0, 9), max_size=4),
    suffix=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    window=st.one_of(st.none(), st.integers(1, 6)),
)
def test_a_query_sees_keys_at_or_before_it_within_the_window(
    query: list[int], prefix: list[int], suffix: list[int], window: int | None
) -> None:
    seen = visible(
        torch.tensor(query)[None, None],
        torch.tensor(prefix, dtype=torch.long)[None],
        torch.tensor(suffix)[None, None],
        window,
    )[0, 0, 0, :, 0]
    for i, at in enumerate(query):
        for j, key in enumerate([*prefix, *suffix]):
            assert bool(seen[i, j]) == (key <= at and (window is None or at - key < window))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("n_prefix", [0, 3])
def test_attention_over_prefix_and_suffix_equals_loops_over_heads_and_keys(
    softcap: float | None, with_sinks: bool, n_prefix: int
) -> None:
    u, r, s, kv, g, d = 2, 3, 2, 2, 2, 4
    draw = functools.partial(torch.randn, dtype=torch.float64)
    q = draw(u * r * s, kv * g, d)
    prefix_keys, prefix_values = draw(u, kv, n_prefix, d), draw(u, kv, n_prefix, d)
    keys, values = draw(u, r, s, kv, d), draw(u, r, s, kv, d)
    positions = torch.arange(n_prefix, n_prefix + s).expand(u, r, s)
    seen = visible(positions, torch.arange(n_prefix).expand(u, -1), positions, None)
    sinks = draw(kv * g) if with_sinks else None
    z = attend((u, r, s), q, prefix_keys, prefix_values, keys, values, seen, 0.3, softcap, sinks)
    got = z.view(u, r, s, kv * g, d)
    for a in range(u):
        for b in range(r):
            for c in range(s):
                for head in range(kv * g):
                    own = head // g
                    k = torch.cat([prefix_keys[a, own], keys[a, b, : c + 1, own]])
                    v = torch.cat([prefix_values[a, own], values[a, b, : c + 1, own]])
                    scores = 0.3 * k @ q.view(u, r, s, kv * g, d)[a, b, c, head]
                    if softcap is not None:
                        scores = softcap * torch.tanh(scores / softcap)
                    weights = scores.exp()
                    total = weights.sum() + (0 if sinks is None else sinks[head].exp())
                    torch.testing.assert_close(got[a, b, c, head], weights @ v / total)


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, marks=exact_in_float32),
        pytest.param(torch.float64, marks=exact_products),
    ],
)
@settings(deadline=None, max_examples=60)
@given(
    heads=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3, 8])),
    d=st.sampled_from([4, 8, 64, 256]),
    n_prefix=st.integers(0, 40),
    n_suffix=st.integers(1, 5),
    longer=st.tuples(st.integers(0, 20), st.integers(0, 3 if USE_ONEDNN else 5)),
    beside=st.tuples(st.integers(1, 5), st.integers(1, 16)),
)
def test_a_row_rounds_alike_beside_others_with_longer_prefixes_and_suffixes(
    heads: tuple[int, int],
    d: int,
    n_prefix: int,
    n_suffix: int,
    longer: tuple[int, int],
    beside: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    kv, g = heads
    room = functools.partial(room_for_steps, heads_a_key=g, d_head=d, block=STEP_BLOCK)
    most = room(n_suffix + longer[1])
    draw = functools.partial(torch.randn, dtype=dtype)
    whole = (beside[0], -(-beside[1] // STEP_BLOCK) * STEP_BLOCK)
    q, upstream = draw(*whole, most, kv * g, d), draw(*whole, most, kv * g, d)
    keys, values = draw(*whole, most, kv, d), draw(*whole, most, kv, d)
    prefix = draw(2, beside[0], kv, room_for_keys(n_prefix + longer[0]), d)

    def row_zero(u: int, r: int, s: int, p: int) -> list[Tensor]:
        """What the first row's tokens get, and the gradients of their q, k and v."""
        positions = torch.arange(n_prefix, n_prefix + s).expand(u, r, s).clone()
        positions[:, :, n_suffix:] = 1 << 30
        at = torch.arange(p)
        at = torch.where(at < n_prefix, at, 1 << 30).expand(u, -1)
        own = [t[:u, :r, :s].clone().requires_grad_() for t in (q, keys, values)]
        z = attend(
            (u, r, s), own[0].reshape(u * r * s, kv * g, d), *prefix[:, :u, :, :p].contiguous(),
            own[1], own[2], visible(positions, at, positions, None), 0.1, None,
        ).view_as(own[0])  # fmt: skip
        pulled = upstream[:u, :r, :s].clone()
        pulled[:, :, n_suffix:] = 0
        gradients = torch.autograd.grad((z * pulled).sum(), own)
        return [t[0, 0, :n_suffix] for t in (z, *gradients)]

    alone = row_zero(1, 1, room(n_suffix), room_for_keys(n_prefix))
    together = row_zero(*beside, most, room_for_keys(n_prefix + longer[0]))
    if STEP_BLOCK > 1:  # one token a row, and whole blocks of rows
        alone += row_zero(1, STEP_BLOCK, 1, room_for_keys(n_prefix))
        together += row_zero(*whole, 1, room_for_keys(n_prefix + longer[0]))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)
