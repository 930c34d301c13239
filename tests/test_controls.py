"""Controls keep what they should keep, and change the rest."""

from __future__ import annotations

import collections

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_laai.controls import permuted_heads, random_direction, shuffled_answers, shuffled_shares
from tl_laai.edits import Edit
from tl_laai.opinions import OpinionQuestion
from tl_laai.tasks import Example


def edit() -> Edit:
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    heads[2] = 0
    return Edit(
        {1: heads, 3: 2 * heads},
        "every_step",
        {1: torch.tensor([1.0, 0.5, 0.0, 2.0])},
        {2: torch.randn(16, generator=generator)},
        {0: torch.randn(16, generator=generator)},
    )


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from("abcde"), min_size=2, max_size=12), st.integers(0, 5))
def test_no_input_keeps_its_answer_unless_most_answers_are_the_same(
    answers: list[str], seed: int
) -> None:
    examples = [Example(f"in {i}", answer) for i, answer in enumerate(answers)]
    if len(set(answers)) < 2:
        with pytest.raises(ValueError, match="1 different answers"):
            shuffled_answers(examples, seed)
        return
    shuffled = shuffled_answers(examples, seed)
    assert [e.input for e in shuffled] == [e.input for e in examples]
    assert sorted(e.output for e in shuffled) == sorted(answers)
    kept = sum(e.output == s.output for e, s in zip(examples, shuffled, strict=True))
    largest = max(collections.Counter(answers).values())
    assert kept == max(0, 2 * largest - len(answers))


def test_answers_are_shuffled_by_the_seed_alone() -> None:
    examples = [Example(f"in {i}", f"out {i}") for i in range(8)]
    assert shuffled_answers(examples, 3) == shuffled_answers(examples, 3)
    assert len({shuffled_answers(examples, seed) for seed in range(5)}) == 5


@pytest.mark.parametrize("seed", range(4))
def test_every_option_gets_the_share_of_another(seed: int) -> None:
    questions = [
        OpinionQuestion(f"q{n}", "Which?", tuple("abcdef"[:n]), shares)
        for n, shares in ((2, (0.9, 0.1)), (3, (0.5, 0.3, 0.2)), (5, (0.1, 0.4, 0.3, 0.15, 0.05)))
    ]
    shuffled = shuffled_shares(questions, seed)
    assert shuffled == shuffled_shares(questions, seed)
    for question, moved in zip(questions, shuffled, strict=True):
        assert moved.options == question.options
        assert sorted(moved.distribution) == sorted(question.distribution)
        pairs = zip(question.distribution, moved.distribution, strict=True)
        assert all(own != given for own, given in pairs)


def test_shares_are_shuffled_by_the_seed() -> None:
    questions = [OpinionQuestion("q", "Which?", ("a", "b", "c"), (0.5, 0.3, 0.2))] * 8
    assert len({tuple(q.distribution for q in shuffled_shares(questions, s)) for s in range(5)}) > 1


def test_a_random_direction_keeps_norms_and_zeros_and_little_else() -> None:
    original, placebo = edit(), random_direction(edit(), seed=1)
    for name in ("deltas", "residual", "replace"):
        old, new = getattr(original, name), getattr(placebo, name)
        assert old.keys() == new.keys()
        for layer, vector in old.items():
            torch.testing.assert_close(new[layer].norm(dim=-1), vector.norm(dim=-1))
            nonzero = vector.norm(dim=-1) > 0
            cosine = torch.cosine_similarity(new[layer], vector, dim=-1)[nonzero]
            assert float(cosine.abs().max()) < 0.9
    assert placebo.position == "every_step"
    assert torch.equal(placebo.scale[1], original.scale[1])
    assert torch.equal(random_direction(edit(), seed=1).deltas[1], placebo.deltas[1])


def test_permuted_heads_are_all_elsewhere() -> None:
    original, moved = edit(), permuted_heads(edit(), seed=0)
    for layer, delta in original.deltas.items():
        source = [
            next(h for h in range(4) if torch.equal(delta[h], row)) for row in moved.deltas[layer]
        ]
        assert sorted(source) == [0, 1, 2, 3]
        assert all(head != at for at, head in enumerate(source))
        if layer in original.scale:
            assert torch.equal(moved.scale[layer], original.scale[layer][source])
    assert torch.equal(moved.residual[2], original.residual[2])


def test_permuting_needs_two_heads() -> None:
    with pytest.raises(ValueError, match=r"deltas for \[\] heads in 0 layers"):
        permuted_heads(Edit(residual={1: torch.ones(8)}), seed=0)
    with pytest.raises(ValueError, match=r"\[1\] heads in 1 layers.*two heads"):
        permuted_heads(Edit({1: torch.ones(1, 8)}), seed=0)
