"""What runs in an actor's process: the worker, its loading apart from its making, and a sign of life."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from jobs.cluster import SWITCH_INTERVAL_S, this_node
from jobs.decode_place import DecodeTasks
from jobs.decode_tasks import TaskDecoder
from jobs.metrics import Meters, RayMeters
from pipeline.decode_shard import Decoder, ThreadDecoder
from pipeline.plan import ShardTask
from pipeline.records import ImageTokenizer, ObjectInfo, PixelBatch, ShardResult
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
    failed_images: Mapping[str, int] = field(default_factory=dict)  # of the shard, by reason


class CountedDecoder:
    """A Decoder whose batches are counted as they come to the encoder: its images for Prometheus, so that a long shard
    shows that it gets on, and its failures for whoever takes them."""

    def __init__(self, decoder: Decoder, meters: Meters) -> None:
        self._decoder, self._meters = decoder, meters
        self._failed: dict[str, Counter[str]] = {}  # by reason, of open shards by URL

    def batches(self, shard: ObjectInfo) -> Generator[PixelBatch, None, None]:
        failed = self._failed[shard.url] = Counter()
        with closing(self._decoder.batches(shard)) as batches:
            for batch in batches:
                self._meters.add("tokenize_decoded_images", len(batch.samples))
                failed.update(failure.reason.value for failure in batch.failures)
                yield batch
                del batch  # not held while the next is awaited: it may be a place in the object store

    def take_failed(self, shard: ObjectInfo) -> Mapping[str, int]:
        """How many of its images failed, by reason, in the newest attempt."""
        return self._failed.pop(shard.url, Counter())

    def close(self) -> None:
        self._decoder.close()


class TokenizeActor:
    """The worker, to be made remote. Loading is a call of its own, so that its errors arrive as they are."""

    def __init__(self, source: Source, job: TokenizeJob, decode: DecodeTasks | None = None) -> None:
        """`decode`: where decoding is done elsewhere; None: on threads here."""
        self._source, self._job = source, job
        self._tasks = TaskDecoder(job.decoding, decode) if decode else None
        self._decoder: CountedDecoder | None = None
        self._worker: TokenizeWorker | None = None
        self._num_open, self._lock = 0, threading.Lock()

    def load(self) -> SignOfLife:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        decoder = self._tasks or ThreadDecoder(self._job.decoding)
        self._decoder = CountedDecoder(decoder, RayMeters(self._job.output.url))
        self._worker = TokenizeWorker(self._source.load(), self._job, self._decoder)
        return self.ping()

    def tokenize(self, task: ShardTask, delay_s: float) -> Tokenized:
        """`delay_s`: what failed just now is not tried again at once."""
        assert self._worker is not None and self._decoder is not None, "load comes first"
        with self._open():
            time.sleep(delay_s)
            try:
                result = self._worker.tokenize(task)
            finally:
                failed_images = self._decoder.take_failed(task.shard)
            note = self._tasks.take_note() if self._tasks else ""
            return Tokenized(result, self._worker.take_times(), note, failed_images)

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
