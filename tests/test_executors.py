"""Calls spread over executors of every make: what comes back, and what is left after a failure."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ThreadPoolExecutor
from typing import Any

import pytest

from tl_laai.executors import Submits, spread


class Job:
    """A job as submitit's are: no `concurrent.futures.Future`. It has ended when asked twice."""

    def __init__(self, call: Callable[[], Any], begun: bool) -> None:
        self.call, self.asked, self.cancelled = call, int(begun), False

    def done(self) -> bool:
        self.asked += 1
        return self.asked > 1 or self.cancelled

    def exception(self) -> BaseException | None:
        if self.cancelled:
            raise CancelledError
        try:
            self.call()
        except ZeroDivisionError as error:
            return error
        return None

    def result(self) -> Any:
        return self.call()

    def cancel(self) -> None:
        self.cancelled = True


class Cluster:
    """An executor of such jobs, of which the first so many have begun."""

    def __init__(self, begun: int = 0) -> None:
        self.begun = begun
        self.jobs: list[Job] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Job:
        self.jobs.append(Job(functools.partial(fn, *args), len(self.jobs) < self.begun))
        return self.jobs[-1]


class Broken(Executor):
    """An executor that has lost its workers after so many calls."""

    def __init__(self, n_good: int) -> None:
        self.n_good = n_good

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if not self.n_good:
            raise BrokenExecutor("the workers are gone.")
        self.n_good -= 1
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


CALLS = [(abs, -1), (abs, -2), (abs, -3), (divmod, 7, 2)]


def test_every_result_is_handed_over_once() -> None:
    kept: list[Any] = []
    with ThreadPoolExecutor(2) as pool:
        spread(pool, CALLS, kept.append, remedy="")
        spread(pool, [], kept.append, remedy="")
    assert sorted(kept, key=str) == [(3, 1), 1, 2, 3]


def test_an_executor_needs_no_more_than_submit() -> None:
    kept: list[Any] = []
    assert isinstance(Cluster(), Submits)
    spread(Cluster(), CALLS, kept.append, remedy="")
    assert kept == [1, 2, 3, (3, 1)]


def test_a_result_is_handed_over_while_others_still_run() -> None:
    first_is_kept = threading.Event()

    def keep(result: bool | None) -> None:
        first_is_kept.set()

    with ThreadPoolExecutor(2) as pool:
        # The first call ends only after the second one's result was kept.
        spread(pool, [(first_is_kept.wait, 60), (bool, 1)], keep, remedy="")
        assert first_is_kept.is_set()


def test_after_a_failure_nothing_new_begins_and_what_has_begun_is_kept() -> None:
    cluster, kept = Cluster(begun=3), []
    with pytest.raises(ZeroDivisionError):
        spread(cluster, [(abs, -1), (divmod, 1, 0), (abs, -2), (abs, -3)], kept.append, remedy="")
    assert kept == [1, 2]
    assert [job.cancelled for job in cluster.jobs] == [False, False, False, True]


def test_where_results_cannot_be_kept_nothing_new_begins() -> None:
    cluster = Cluster(begun=2)

    def full_disk(result: Any) -> None:
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        spread(cluster, CALLS, full_disk, remedy="")
    assert [job.cancelled for job in cluster.jobs] == [False, False, True, True]


def test_a_broken_executor_is_an_error_that_names_the_remedy() -> None:
    kept: list[Any] = []
    with pytest.raises(RuntimeError, match=r"a worker died: the workers are gone\. Call again\."):
        spread(Broken(2), CALLS, kept.append, remedy="Call again.")
    assert kept == [1, 2]


def test_calls_that_another_has_cancelled_are_not_passed_over() -> None:
    cluster = Cluster()
    with pytest.raises(CancelledError):
        spread(cluster, CALLS, lambda _: cluster.jobs[-1].cancel(), remedy="")
