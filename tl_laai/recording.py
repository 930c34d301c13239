"""Computations recorded once as a CUDA graph, and replayed.

An evaluation on a GPU is hundreds of small kernels, and to start them one by one takes longer than
they run. A recorded one is started whole. It must do the same work at every call: shapes, and the
tensors that it reads besides its argument, stay where they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CALLS_BEFORE = 2
"""Calls that run as they are: what changes at once is not worth a recording."""

_LOG = logging.getLogger("tl_laai")


class Recorded:
    """A function of one tensor, recorded at its third call on a GPU and replayed from then on.

    Elsewhere, and where something in it cannot be recorded (a number read back from the GPU, say),
    it is the function itself.

    Example:
        >>> double = Recorded(lambda x: (2 * x,))
        >>> double(torch.ones(2))
        (tensor([2., 2.]),)

    Args:
        function: its results are tensors of the same shapes at every call.
        pool: memory shared with other recordings, of which no two run at once.
    """

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, ...]], pool: Any = None) -> None:
        self._function, self._pool = function, pool
        self._calls = 0
        self._replay: Callable[[Tensor], tuple[Tensor, ...]] = function

    @property
    def is_recorded(self) -> bool:
        """Whether calls are replayed."""
        return self._replay is not self._function

    def __call__(self, argument: Tensor) -> tuple[Tensor, ...]:
        """The function's results, in memory of their own."""
        self._calls += 1
        if argument.device.type == "cuda" and self._calls == CALLS_BEFORE + 1:
            try:
                self._replay = _recorded(self._function, argument, self._pool)
            except RuntimeError as error:
                _LOG.info("not recorded as a CUDA graph: %s", str(error).splitlines()[0])
        return self._replay(argument)


def pool_of(model: Any) -> Any:
    """Memory for what is recorded of a model that stands on one GPU; None of any other."""
    roots = (model, getattr(model, "original_model", model))
    devices = {parameter.device for root in roots for parameter in root.parameters()}
    if len(devices) == 1 and next(iter(devices)).type == "cuda":
        return torch.cuda.graph_pool_handle()
    return None


def is_recording() -> bool:
    """Whether kernels are being recorded, so that no number can be read back from the GPU."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _recorded(
    function: Callable[[Tensor], tuple[Tensor, ...]], argument: Tensor, pool: Any
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The function as a CUDA graph. RuntimeError: it cannot be one."""
    place = argument.detach().clone()
    with torch.cuda.device(argument.device):
        # Libraries set themselves up at their first use on a stream, which cannot be recorded.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(place)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            results = function(place)

    def replay(argument: Tensor) -> tuple[Tensor, ...]:
        place.copy_(argument)
        graph.replay()
        return tuple(result.clone() for result in results)

    return replay
