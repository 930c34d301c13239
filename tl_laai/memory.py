"""How much memory evaluations take, told before any of it is allocated."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tl_laai.attention import room_for_keys
from tl_laai.backends import Backend
from tl_laai.prompts import TokenisedExample
from tl_laai.solvers import check_positive
from tl_laai.vocabulary import bytes_of_a_pass


def bytes_of_gib(gib: float) -> int:
    """Bytes of a bound on memory in GiB.

    Raises:
        ValueError: it is no finite number above zero.
    """
    check_positive("max_memory", gib)
    return int(gib * 2**30)


def bytes_per_token(backend: Backend, n_keys: int, lowest_layer: int) -> int:
    """Estimated memory that one suffix token takes in a forward and backward.

    Args:
        backend: the model.
        n_keys: keys that a token sees.
        lowest_layer: the first layer that runs.
    """
    d_mlp = int(getattr(backend.model.cfg, "d_mlp", None) or 4 * backend.d_model)
    width = 12 * backend.d_model + 7 * d_mlp + 8 * backend.n_heads * backend.d_head
    per_layer = width + 6 * backend.n_heads * n_keys
    return per_layer * (backend.n_layers - lowest_layer) * torch.finfo(backend.dtype).bits // 8


def memory_estimate(
    backend: Backend,
    examples: Sequence[TokenisedExample],
    *,
    layers: Sequence[int],
    rows: Sequence[Sequence[int]],
    max_memory: float = 1.0,
) -> int:
    """Estimated bytes above the model that problems take, before any of it is allocated.

    Args:
        backend: the model.
        examples: the tokenised examples of all problems.
        layers: the edited layer of each problem.
        rows: the examples of each problem, as indices.
        max_memory: GiB that one chunk of rows may take; frozen prefixes and the pass over the
            vocabulary come on top.
    """
    room = room_for_keys(max(len(e.prompt) for e in examples) - 1)
    n_prefixes = len({e.prompt[:-1] for e in examples})
    per_key = backend.n_kv_heads * backend.d_head * torch.finfo(backend.dtype).bits // 8
    kept = 2 * backend.n_layers * n_prefixes * room * per_key
    n_tokens = sum(max(1, len(examples[i].answer)) for own in rows for i in own)
    evaluation = n_tokens * bytes_per_token(backend, room + 1, min(layers))
    vocabulary = bytes_of_a_pass(backend.unembedding().weight, n_tokens)
    return kept + min(evaluation, bytes_of_gib(max_memory)) + vocabulary
