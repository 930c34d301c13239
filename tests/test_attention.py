"""Attention over prefix and suffix: who sees whom, and what comes of it, against loops."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_laai.attention import attend, visible


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
@pytest.mark.parametrize("n_prefix", [0, 3])
def test_attention_over_prefix_and_suffix_equals_loops_over_heads_and_keys(
    softcap: float | None, n_prefix: int
) -> None:
    u, r, s, kv, g, d = 2, 3, 2, 2, 2, 4
    draw = functools.partial(torch.randn, dtype=torch.float64)
    q = draw(u * r * s, kv * g, d)
    prefix_keys, prefix_values = draw(u, kv, n_prefix, d), draw(u, kv, n_prefix, d)
    keys, values = draw(u, r, s, kv, d), draw(u, r, s, kv, d)
    positions = torch.arange(n_prefix, n_prefix + s).expand(u, r, s)
    seen = visible(positions, torch.arange(n_prefix).expand(u, -1), positions, None)
    got = attend((u, r, s), q, prefix_keys, prefix_values, keys, values, seen, 0.3, softcap).view(
        u, r, s, kv * g, d
    )
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
                    torch.testing.assert_close(got[a, b, c, head], scores.softmax(0) @ v)
