"""Packed suffix tokens: their places in the grid, and how they run."""

from __future__ import annotations

import oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_laai.packing import Packing, last_residual, run


@settings(deadline=None, max_examples=50)
@given(rows=st.lists(st.integers(0, 4), min_size=1, max_size=12), prompt_only=st.booleans())
def test_every_token_has_a_place_of_its_own_in_the_grid_of_its_prefix(
    rows: list[int], prompt_only: bool
) -> None:
    prompts = oracle.frozen()
    packing = Packing(prompts, torch.tensor(rows), prompt_only=prompt_only)
    expected = []
    for number, row in enumerate(rows):
        tokens = range(int(prompts.offsets[row]), int(prompts.offsets[row + 1]))
        kept = tokens[:1] if prompt_only else tokens
        expected += [(number, step, token) for step, token in enumerate(kept)]
    got = list(
        zip(packing.row.tolist(), packing.step.tolist(), packing.token.tolist(), strict=True)
    )
    assert got == expected
    slots = packing.slot.tolist()
    assert len(set(slots)) == len(slots)
    u, r, s = packing.grid
    assert u * r <= 2 * len(rows)
    for slot, (number, step, token) in zip(slots, expected, strict=True):
        assert slot % s == step
        assert packing.used[slot // (r * s)] == prompts.prefix_of[rows[number]]
        assert packing.suffix_position.flatten()[slot] == prompts.positions[token]
    empty = set(range(u * r * s)) - set(slots)
    assert all(packing.suffix_position.flatten()[place] > 10**9 for place in empty)
    last = {number: at for at, (number, _, _) in enumerate(got)}
    assert packing.last.tolist() == [last[number] for number in range(len(rows))]


def test_prefix_positions_end_with_each_prefix() -> None:
    prompts = oracle.frozen()
    packing = Packing(prompts, torch.tensor([4, 1]))
    for position, which in zip(packing.prefix_position, packing.used, strict=True):
        n = int(prompts.prefix_lengths[which])
        assert position[:n].tolist() == list(range(n))
        assert bool((position[n:] > 10**9).all())


def test_rows_of_a_prefix_on_several_lines_run_as_they_do_alone() -> None:
    prompts = oracle.frozen()
    prompts.enter_at([1])
    rows = torch.tensor([4] * 11 + [0, 1, 2, 3])
    together = Packing(prompts, rows)
    assert len(together.used) > len(together.used.unique())
    ran = []
    with torch.no_grad():
        for packing in (together, *(Packing(prompts, row[None]) for row in rows)):
            entries = {1: prompts.residuals[1][packing.token]}
            ran.append(last_residual(run(packing, entries, lambda _, z: z)))
    assert oracle.relative(ran[0], torch.cat(ran[1:])) < 1e-12


def test_rows_join_at_their_stage() -> None:
    prompts = oracle.frozen()
    rows, stages = torch.tensor([0, 1, 4, 3]), torch.tensor([0, 1, 1, 2])
    packing = Packing(prompts, rows, stages, 3)
    assert packing.n_tokens == [1, 1 + 3 + 4, 1 + 3 + 4 + 1]


def test_a_run_stops_where_told_and_ends_with_what_comes_after_the_last_block() -> None:
    prompts = oracle.frozen()
    prompts.enter_at([1])
    packing = Packing(prompts, torch.tensor([0, 4]))
    entries = {1: prompts.residuals[1][packing.token]}
    with torch.no_grad():
        whole = dict(run(packing, entries, lambda _, z: z))
        cut = dict(run(packing, entries, lambda _, z: z, stop=3))
    assert list(whole) == [1, 2, 3, 4]
    assert list(cut) == [1, 2, 3]
    assert torch.equal(cut[3], whole[3])
    with torch.no_grad():
        assert torch.equal(last_residual(run(packing, entries, lambda _, z: z)), whole[4])
