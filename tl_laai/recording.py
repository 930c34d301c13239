"""Computations recorded once as a CUDA graph, and replayed.

An evaluation on a GPU is hundreds of small kernels, and to start them one by one takes longer than
they run. A recorded one is started whole. It must do the same work at every call: shapes, and the
tensors that it reads besides its argument, stay where they are.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Function: TypeAlias = Callable[[Tensor], tuple[Tensor, ...]]

CALLS_BEFORE = 2
"""Calls that run as they are: what changes at once is not worth a recording."""

_LOG = logging.getLogger("tl_laai")
_ONE_AT_A_TIME = threading.RLock()


class Recorded:
    """A function of one tensor, recorded at its third call on a GPU and replayed from then on.

    Elsewhere, for arguments of another shape or dtype, and where something in it cannot be
    recorded (a number read back from the GPU, say), it is the function itself.

    Example:
        >>> double = Recorded(lambda x: (2 * x,))
        >>> double(torch.ones(2))
        (tensor([2., 2.]),)

    Args:
        function: its results are tensors of the same shapes at every call.
        pool: memory shared with other recordings.
        reads: tells what tensors it reads that others may replace: a recording reads on where they
            stood, so it keeps them.
    """

    def __init__(
        self,
        function: Function,
        pool: Any = None,
        reads: Callable[[], Iterable[Tensor]] = tuple,
    ) -> None:
        self._function, self._pool, self._reads = function, pool, reads
        self._calls = 0
        self._recording: _Recording | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether calls are replayed."""
        return self._recording is not None

    def __call__(self, argument: Tensor) -> tuple[Tensor, ...]:
        """The function's results, in memory of their own."""
        self._calls += 1
        if argument.device.type == "cuda" and self._calls == CALLS_BEFORE + 1:
            try:
                self._recording = _Recording(self._function, argument, self._pool, self._reads)
            except RuntimeError as error:
                _LOG.info("not recorded as a CUDA graph: %s", str(error).splitlines()[0])
        if self._recording is None or not self._recording.takes(argument):
            return self._function(argument)
        return self._recording.replay(argument)


class _Recording:
    """A function's kernels as a CUDA graph. RuntimeError: it cannot be one."""

    def __init__(
        self,
        function: Function,
        argument: Tensor,
        pool: Any,
        reads: Callable[[], Iterable[Tensor]],
    ) -> None:
        self._place = argument.detach().clone()
        self._graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(argument.device)
        stream = _stream(argument.device)
        # The outer context puts the current stream back where a recording fails half-way.
        with _ONE_AT_A_TIME, torch.cuda.device(argument.device), torch.cuda.stream(current):
            # Libraries set themselves up at their first use on a stream, which cannot be recorded.
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                function(self._place)
            current.wait_stream(stream)
            with torch.cuda.graph(
                self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                self._results = function(self._place)
        self._kept = tuple(tensor.detach() for tensor in reads())

    def takes(self, argument: Tensor) -> bool:
        place = self._place
        alike = argument.shape == place.shape and argument.dtype == place.dtype
        return alike and argument.device == place.device

    def replay(self, argument: Tensor) -> tuple[Tensor, ...]:
        with _ONE_AT_A_TIME:
            self._place.copy_(argument)
            self._graph.replay()
            return tuple(result.clone() for result in self._results)


@functools.cache
def _stream(device: torch.device) -> Any:
    """The stream of a device on which everything is recorded: each keeps memory of its own."""
    return torch.cuda.Stream(device)


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
