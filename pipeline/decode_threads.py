"""Threads that several shards share, the oldest first: so shards come to their ends one after another, and while one
is written and the next is opened, another's pixels are there. In turns they would all end, and begin, at once."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
_LAST_WORD = -1  # before every shard


class Submits(Protocol):
    """What decoding asks of those who do it: concurrent.futures' executors have it too."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]: ...


@dataclass(order=True, slots=True)
class _Job:
    shard: int
    number: int
    work: Callable[[], Any] | None = field(compare=False)  # None ends the thread
    future: Future[Any] = field(compare=False)


class DecodeThreads:
    """`close` lets what is under way end, and cancels the rest."""

    def __init__(self, num_threads: int) -> None:
        self._jobs: queue.PriorityQueue[_Job] = queue.PriorityQueue()
        self._shards, self._numbers = itertools.count(), itertools.count()
        self._closed, self._lock = False, threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, name=f"decode_{n}", daemon=True) for n in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def next_shard(self) -> Submits:
        """What this is given waits for what all shards before it gave."""
        return _OfOneShard(self, next(self._shards))

    def put(self, shard: int, work: Callable[[], T] | None) -> Future[T]:
        job = _Job(shard, next(self._numbers), work, Future())
        with self._lock:
            if self._closed and work is not None:
                raise RuntimeError("these threads were told to end")
            self._jobs.put(job)
        return job.future

    def close(self) -> None:
        with self._lock:
            self._closed = True
        for _ in self._threads:
            self.put(_LAST_WORD, None)
        for thread in self._threads:
            thread.join()
        while not self._jobs.empty():
            self._jobs.get().future.cancel()

    def _work(self) -> None:
        while (job := self._jobs.get()).work is not None:
            if job.future.set_running_or_notify_cancel():
                _settle(job.future, job.work)
            del job  # its pixels are not held while the next is awaited


@dataclass(frozen=True)
class _OfOneShard:
    threads: DecodeThreads
    shard: int

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        return self.threads.put(self.shard, partial(fn, *args, **kwargs))


def _settle(future: Future[T], work: Callable[[], T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised where the result is wanted
        future.set_exception(error)
