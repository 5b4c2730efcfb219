"""What runs in an actor's process: the worker, its loading apart from its making, and a sign of life."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from jobs.cluster import SWITCH_INTERVAL_S, this_node
from jobs.decode_place import DecodeTasks
from jobs.decode_tasks import TaskDecoder
from pipeline.plan import ShardTask
from pipeline.records import ImageTokenizer, ShardResult
from pipeline.stage_times import StageTimes
from pipeline.tokenize_shard import TokenizeJob, TokenizeWorker


class Source(Protocol):
    """Where an actor gets its tokenizer from."""

    def load(self) -> ImageTokenizer: ...


@dataclass(frozen=True)
class SignOfLife:
    """What an actor answers: on which node it is, whether it has its tokenizer, and how many shards it has open."""

    node: str
    loaded: bool
    num_open: int


@dataclass(frozen=True)
class Tokenized:
    """What an actor answers for a shard. `times`: spent since its last such answer, by all its shards."""

    result: ShardResult
    times: StageTimes
    note: str = ""  # what a person should know of it


class TokenizeActor:
    """The worker, to be made remote. Loading is a call of its own, so that its errors arrive as they are."""

    def __init__(self, source: Source, job: TokenizeJob, decode: DecodeTasks | None = None) -> None:
        """`decode`: where decoding is done elsewhere; None: on threads here."""
        self._source, self._job = source, job
        self._tasks = TaskDecoder(job.decoding, decode) if decode else None
        self._worker: TokenizeWorker | None = None
        self._num_open, self._lock = 0, threading.Lock()

    def load(self) -> SignOfLife:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._worker = TokenizeWorker(self._source.load(), self._job, self._tasks)
        return self.ping()

    def tokenize(self, task: ShardTask, delay_s: float) -> Tokenized:
        """`delay_s`: what failed just now is not tried again at once."""
        assert self._worker is not None, "load comes first"
        with self._open():
            time.sleep(delay_s)
            result = self._worker.tokenize(task)
            return Tokenized(result, self._worker.take_times(), self._tasks.take_note() if self._tasks else "")

    def watch(self, seconds: float) -> SignOfLife:
        """Answers after so long; an actor that dies meanwhile is missed at once, also when it has nothing to do."""
        time.sleep(seconds)
        return self.ping()

    def ping(self) -> SignOfLife:
        return SignOfLife(this_node(), self._worker is not None, self._num_open)

    @contextmanager
    def _open(self) -> Iterator[None]:
        with self._lock:
            self._num_open += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_open -= 1
