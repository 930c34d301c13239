"""Runs calls on any executor and hands each result over as soon as it is there.

Executors are those of `concurrent.futures`, Dask's `client.get_executor()`, and submitit's, whose
jobs are no `concurrent.futures.Future`, so that they are asked one by one whether they have ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError
from typing import Any, Protocol, runtime_checkable

_ASK_AGAIN = 0.1  # seconds


@runtime_checkable
class Submits(Protocol):
    """What is needed of an executor."""

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Any:
        """Start a call; what comes back has `done`, `exception`, `result` and `cancel`."""


def spread(
    executor: Submits,
    calls: Sequence[tuple[Any, ...]],
    keep: Callable[[Any], None],
    *,
    remedy: str,
) -> None:
    """Run calls on an executor; after a failure, those that run already are waited for and kept.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> with ThreadPoolExecutor(1) as pool:
        ...     spread(pool, [(abs, -2)], print, remedy="Call again.")
        2

    Args:
        executor: where to run; it is not shut down.
        calls: functions with their arguments, picklable where the executor is another process.
        keep: told each result, here, in the order in which calls end.
        remedy: what to do after a worker has died; ends the error's message.

    Raises:
        RuntimeError: a worker died, so that the executor is broken.
        BaseException: what the first call to fail has raised.
    """
    jobs: list[Any] = []
    failure: BaseException | None = None
    try:
        try:
            for call in calls:
                jobs.append(executor.submit(*call))
        except BrokenExecutor as broken:
            failure = broken
        for job in _as_they_end(jobs):
            raised = _raised(job)
            if raised is None:
                keep(job.result())
            elif failure is None:
                failure = raised
                _cancel(jobs)
    finally:
        _cancel(jobs)  # also after Ctrl-C
    if isinstance(failure, BrokenExecutor):
        raise RuntimeError(f"a worker died: {failure} {remedy}") from failure
    if failure is not None:
        raise failure


def _raised(job: Any) -> BaseException | None:
    """What an ended call has raised."""
    try:
        raised: BaseException | None = job.exception()
    except CancelledError as cancelled:
        raised = cancelled
    return raised


def _cancel(jobs: Sequence[Any]) -> None:
    """Take back the calls that have not begun."""
    for job in jobs:
        if not job.done():
            job.cancel()


def _as_they_end(jobs: Sequence[Any]) -> Iterator[Any]:
    running = list(jobs)
    while running:
        still = []
        for job in running:
            if job.done():
                yield job
            else:
                still.append(job)
        if len(still) == len(running):
            time.sleep(_ASK_AGAIN)
        running = still
