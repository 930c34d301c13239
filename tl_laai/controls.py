"""Controls: edits that should do nothing of use, and answers that are wrong on purpose.

An edit that works says something about its direction and its heads only if an edit of the same
size in another direction, or on other heads, does not work; and something about the task only
if one fitted on other examples' answers does not.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tl_laai.edits import Edit
from tl_laai.opinions import OpinionQuestion
from tl_laai.tasks import Example


def shuffled_answers(examples: Sequence[Example], seed: int) -> tuple[Example, ...]:
    """Every input with the answer of another example, and with a different answer if possible.

    The examples are put in a random order in which equal answers stand together, and the answers
    are moved on by the size of the largest such group: no input keeps its answer unless more than
    half of the answers are the same.

    Example:
        >>> [e.output for e in shuffled_answers([Example("a", "1"), Example("b", "2")], seed=0)]
        ['2', '1']

    Args:
        examples: at least two with different answers.
        seed: which derangement.

    Returns:
        The same inputs in the same order.

    Raises:
        ValueError: all answers are the same.
    """
    groups: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(example.output, []).append(i)
    if len(groups) < 2:
        raise ValueError(
            f"examples holds {len(examples)} with {len(groups)} different answers: to give each "
            "the answer of another, give at least two with different answers."
        )
    # Python promises the same random() from a seed in every version, but not the same shuffle().
    generator = random.Random(seed)
    shuffled = [sorted(g, key=lambda _: generator.random()) for g in groups.values()]
    order = [i for g in sorted(shuffled, key=lambda _: generator.random()) for i in g]
    step = max(map(len, groups.values()))
    given = {i: order[(at + step) % len(order)] for at, i in enumerate(order)}
    return tuple(Example(e.input, examples[given[i]].output) for i, e in enumerate(examples))


def shuffled_shares(questions: Sequence[OpinionQuestion], seed: int) -> tuple[OpinionQuestion, ...]:
    """Every question with each option's share given to another of its options.

    Example:
        >>> [tea] = shuffled_shares([OpinionQuestion("q", "Tea?", ("yes", "no"), (1, 0))], seed=0)
        >>> tea.distribution
        (0, 1)

    Args:
        questions: what a group answered; the shares of one are moved on cyclically.
        seed: by how many options, question by question.
    """
    generator = random.Random(seed)
    moved = []
    for question in questions:
        shares = question.distribution
        by = 1 + int(generator.random() * (len(shares) - 1))
        moved.append(replace(question, distribution=shares[by:] + shares[:by]))
    return tuple(moved)


def random_direction(edit: Edit, seed: int) -> Edit:
    """The same edit in random directions: each head's, and each residual's, norm is kept.

    Example:
        >>> placebo = random_direction(as_edit(model, capital), seed=0)  # doctest: +SKIP

    Args:
        edit: heads that are zero stay zero; `scale` stays as it is.
        seed: which directions.
    """
    generator = torch.Generator().manual_seed(seed)

    def turned(vectors: Mapping[int, Tensor]) -> dict[int, Tensor]:
        new: dict[int, Tensor] = {}
        for layer, vector in sorted(vectors.items()):
            noise = torch.randn(vector.shape, generator=generator, dtype=torch.float64)
            noise /= noise.norm(dim=-1, keepdim=True)
            new[layer] = noise.to(vector) * vector.norm(dim=-1, keepdim=True)
        return new

    return replace(
        edit,
        deltas=turned(edit.deltas),
        residual=turned(edit.residual),
        replace=turned(edit.replace),
    )


def permuted_heads(edit: Edit, seed: int) -> Edit:
    """The same edit with every head's part given to another head of its layer.

    Example:
        >>> elsewhere = permuted_heads(as_edit(model, capital), seed=0)  # doctest: +SKIP

    Args:
        edit: one with `deltas`; its `scale` moves along, residual edits stay.
        seed: which permutation.

    Raises:
        ValueError: no heads are edited, or a layer has only one.
    """
    n_heads = [len(delta) for delta in edit.deltas.values()]
    if min(n_heads, default=0) < 2:
        raise ValueError(
            f"edit has deltas for {n_heads} heads in {len(n_heads)} layers: permuting needs at "
            "least two heads in every edited layer. Use random_direction instead."
        )
    generator = torch.Generator().manual_seed(seed)
    source = {}
    for layer in sorted({*edit.deltas, *edit.scale}):
        n = len(edit.deltas.get(layer, edit.scale.get(layer, ())))
        order = torch.randperm(n, generator=generator)
        source[layer] = torch.empty_like(order).index_copy(0, order, order.roll(1))
    return replace(
        edit,
        deltas={layer: delta[source[layer]] for layer, delta in edit.deltas.items()},
        scale={layer: scale[source[layer]] for layer, scale in edit.scale.items()},
    )
