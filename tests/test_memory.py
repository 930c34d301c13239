"""Estimates of memory."""

from __future__ import annotations

import oracle
import pytest

from tl_laai.backends import backend_of
from tl_laai.memory import memory_estimate


def test_memory_estimate_grows_with_the_problems_and_falls_with_the_limit() -> None:
    backend, examples = (
        backend_of(oracle.shared_model("bridge", "gpt2")),
        oracle.random_examples(oracle.LENGTHS),
    )

    def estimate(n_problems: int, max_memory: float = 1.0) -> int:
        rows = [range(len(examples))] * n_problems
        layers = [0] * n_problems
        return memory_estimate(backend, examples, layers=layers, rows=rows, max_memory=max_memory)

    assert 0 < estimate(1) < estimate(8)
    assert estimate(8, max_memory=1e-6) < estimate(8)
    for senseless in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"max_memory is {senseless}; give a finite number"):
            estimate(1, max_memory=senseless)
