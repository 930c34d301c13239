"""Recorded functions: on a GPU what they do is replayed, elsewhere they are the function itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tl_laai.recording import CALLS_BEFORE, Recorded, is_recording

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def test_on_a_cpu_a_function_is_called_each_time() -> None:
    calls: list[Tensor] = []

    def function(x: Tensor) -> tuple[Tensor]:
        calls.append(x)
        return (2 * x,)

    recorded = Recorded(function)
    for k in range(5):
        assert recorded(torch.full((2,), float(k)))[0].tolist() == [2.0 * k] * 2
    assert len(calls) == 5
    assert not recorded.is_recorded
    assert not is_recording()


@needs_gpu
def test_a_recording_is_replayed_and_its_results_are_kept() -> None:
    calls: list[bool] = []

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(is_recording())
        leaf = x.detach().requires_grad_()
        value = (leaf**3).sum(dim=1)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    recorded = Recorded(function, torch.cuda.graph_pool_handle())
    arguments = [torch.randn(3, 4, device="cuda") for _ in range(CALLS_BEFORE + 4)]
    results = [recorded(x) for x in arguments]
    assert recorded.is_recorded
    assert calls == [False] * (CALLS_BEFORE + 1) + [True]
    for x, (value, slope) in zip(arguments, results, strict=True):
        torch.testing.assert_close(value, (x**3).sum(dim=1))
        torch.testing.assert_close(slope, 3 * x**2)


@needs_gpu
def test_what_cannot_be_recorded_is_called_each_time() -> None:
    def function(x: Tensor) -> tuple[Tensor]:
        return (x * float(x.max()),)

    recorded = Recorded(function)
    stream = torch.cuda.current_stream()
    for k in range(1, CALLS_BEFORE + 4):
        assert recorded(torch.full((2,), float(k), device="cuda"))[0].tolist() == [float(k * k)] * 2
    assert not recorded.is_recorded
    assert torch.cuda.current_stream() == stream


@needs_gpu
def test_arguments_of_another_shape_or_dtype_are_not_replayed() -> None:
    recorded = Recorded(lambda x: (2 * x,))
    for _ in range(CALLS_BEFORE + 2):
        recorded(torch.ones(2, device="cuda"))
    assert recorded.is_recorded
    assert recorded(torch.ones(3, device="cuda"))[0].tolist() == [2.0] * 3
    assert recorded(torch.ones(2, dtype=torch.float64, device="cuda"))[0].dtype == torch.float64
