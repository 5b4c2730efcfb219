"""Shards -> endless streams of training pixels, the same at any number of workers (order: training_order.py).

A stream's whole state is a StreamCursor, and opening one window resumes any position. A bad image is skipped
and counted; a damaged shard gives no sample and is counted; what is too much is the caller's say.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.errors import PipelineError, ShardChanged, ShardDamaged, ShardError, ShardTruncated, StorageError
from pipeline.images import SampleError, training_crop
from pipeline.records import ObjectInfo, RawSample
from pipeline.shards import read_samples
from pipeline.training_order import StreamCursor, StreamOptions, augment_rng, sample_order, window_shards

# B images of this worker's share of a batch, H W pixel rows and columns, C = 3 colours

log = logging.getLogger(__name__)

READ_ATTEMPTS = 3
RETRY_PAUSE_S = 0.5
_MAX_READERS = 8
MOST_FRUITLESS = 100  # shards in a row, of however many
_LOGGED_IMAGES = 10  # a stream; the count goes on in the metrics

Crop = NDArray[np.uint8] | SampleError


class NoUsableImages(PipelineError):
    """Shard after shard gave not one usable image."""


class TrainingBatch(NamedTuple):
    """This worker's share of one global batch: uint8 (B, size, size, 3), and each image's global slot."""

    pixels_BHWC: NDArray[np.uint8]
    slots_B: NDArray[np.int64]


class TrainingSamples:
    """One worker's streams. Reads one window and decodes a few batches ahead, on threads.

    Memory: the undecoded images of up to two windows a stream (2 x shuffle_shards x a shard's bytes).
    """

    def __init__(
        self,
        shards: Sequence[ObjectInfo],
        options: StreamOptions,
        *,
        rank: int = 0,
        world_size: int = 1,
        cursors: Sequence[StreamCursor] | None = None,
        decode_threads: int = 4,
        prefetch_batches: int = 2,
    ) -> None:
        """`cursors`: one for each of all `num_streams` streams, whoever's they were."""
        self._options, self._mine = options, options.streams_of(rank, world_size)
        start = cursors or [StreamCursor()] * options.num_streams
        self._readers = ThreadPoolExecutor(min(len(self._mine), _MAX_READERS), "read-shards")
        self._decoders = ThreadPoolExecutor(decode_threads, "decode")
        ahead = max(options.per_stream * prefetch_batches, decode_threads)
        self._streams = [
            _Stream(_Source(shards, options, stream), start[stream], self._readers, self._decoders, ahead)
            for stream in self._mine
        ]

    def next_batch(self) -> TrainingBatch:
        """Raises NoUsableImages."""
        per_stream = self._options.per_stream
        crops = [stream.take() for stream in self._streams for _ in range(per_stream)]
        first = self._mine.start * per_stream
        return TrainingBatch(np.stack(crops), np.arange(first, first + len(crops), dtype=np.int64))

    def cursors(self) -> dict[int, StreamCursor]:
        """Where each of this worker's streams is after the last batch."""
        return {number: stream.cursor for number, stream in zip(self._mine, self._streams, strict=True)}

    def close(self) -> None:
        for pool in (self._readers, self._decoders):
            pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class _Opened:
    """Stands in a stream's queue before the samples of `window`."""

    window: int
    first: int
    shards: frozenset[int] = frozenset()
    failed: frozenset[int] = frozenset()


@dataclass(frozen=True)
class _Window:
    opened: _Opened
    samples: deque[tuple[int, RawSample]]  # by position; a sample leaves when its decoding is asked for


class _Stream:
    """Windows are read ahead, samples decoded ahead, both delivered in order; the cursor follows delivery."""

    def __init__(
        self,
        source: _Source,
        cursor: StreamCursor,
        readers: ThreadPoolExecutor,
        decoders: ThreadPoolExecutor,
        ahead: int,
    ) -> None:
        self.cursor = cursor
        self._source, self._readers, self._decoders, self._ahead = source, readers, decoders, ahead
        self._queue: deque[_Opened | Future[Crop]] = deque()
        self._window = _Window(_Opened(-1, 0), deque())
        self._next = readers.submit(source.read_window, cursor.window, cursor.taken)
        self._current: frozenset[int] = frozenset()
        self._fruitless: list[int] = []  # shards passed since the last usable image

    def take(self) -> NDArray[np.uint8]:
        while True:
            self._fill()
            head = self._queue.popleft()
            if isinstance(head, _Opened):
                self._enter(head)
            elif isinstance(crop := head.result(), SampleError):
                self._skip(crop)
            else:
                self._current, self._fruitless = frozenset(), []
                taken, num_used = self.cursor.taken + 1, self.cursor.num_used + 1
                self.cursor = replace(self.cursor, taken=taken, num_used=num_used)
                return crop

    def _fill(self) -> None:
        """Keep the queue full; wait for a window only when there is nothing else to deliver."""
        while len(self._queue) < self._ahead:
            if self._window.samples:
                position, sample = self._window.samples.popleft()
                window = self._window.opened.window
                self._queue.append(self._decoders.submit(self._source.crop, sample, window, position))
            elif self._queue and not self._next.done():
                return
            else:
                self._window = self._next.result()
                self._queue.append(self._window.opened)
                following = self._window.opened.window + 1
                self._next = self._readers.submit(self._source.read_window, following, 0)

    def _enter(self, opened: _Opened) -> None:
        self._fruitless.extend(self._current)
        num_passed, num_shards = len(set(self._fruitless)), self._source.num_shards
        if num_passed == num_shards or len(self._fruitless) >= MOST_FRUITLESS:
            raise NoUsableImages(
                f"not one of {num_passed} training shards in a row (of {num_shards}, data.train_shards) gives a usable "
                f"image: {self.cursor.num_bad} bad images, {len(self.cursor.failed_shards)} damaged shards"
            )
        self._current = opened.shards
        failed = tuple(sorted(opened.failed.union(self.cursor.failed_shards)))
        self.cursor = replace(self.cursor, window=opened.window, taken=opened.first, failed_shards=failed)

    def _skip(self, error: SampleError) -> None:
        if self.cursor.num_bad < _LOGGED_IMAGES:
            log.warning("skipping a bad image: %s: %s", error.reason, error.message)
        taken, num_bad = self.cursor.taken + 1, self.cursor.num_bad + 1
        self.cursor = replace(self.cursor, taken=taken, num_bad=num_bad)


@dataclass(frozen=True)
class _Source:
    """The reading of one stream: what its windows hold, and the pixels of a sample."""

    shards: Sequence[ObjectInfo]
    options: StreamOptions
    stream: int

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def read_window(self, window: int, first: int) -> _Window:
        places = window_shards(self.options, self.stream, window, self.num_shards)
        read = [_read_shard(self.shards[place]) for place in places]
        samples = [sample for shard_samples in read for sample in shard_samples or ()]
        order = sample_order(self.options, self.stream, window, len(samples))
        failed = frozenset(place for place, found in zip(places, read, strict=True) if found is None)
        return _Window(
            _Opened(window, first, frozenset(places), failed),
            deque((position, samples[order[position]]) for position in range(first, len(order))),
        )

    def crop(self, sample: RawSample, window: int, position: int) -> Crop:
        """A bad image is a value."""
        if sample.image is None:
            assert sample.failure is not None
            return SampleError(sample.failure, f"{sample.key}: {sample.detail}")
        rng = augment_rng(self.options, self.stream, window, position)
        try:
            return training_crop(sample.image, self.options.image_spec, self.options.augment, rng)
        except SampleError as error:
            return SampleError(error.reason, f"{sample.key}: {error.message}")


def _read_shard(shard: ObjectInfo) -> list[RawSample] | None:
    """All samples; None where the shard is damaged, or gone. Raises StorageError where its store fails, however often
    it is asked: what a run learns must not hang on a store's health."""
    last: Exception | None = None
    for attempt in range(1, READ_ATTEMPTS + 1):
        try:
            return list(read_samples(shard))
        except (ShardError, StorageError, OSError) as error:
            log.warning("training shard, attempt %d of %d: %s", attempt, READ_ATTEMPTS, error)
            if isinstance(error, ShardDamaged | FileNotFoundError):
                return None
            last = error
            if attempt < READ_ATTEMPTS:
                time.sleep(RETRY_PAUSE_S * 2 ** (attempt - 1))
    if isinstance(last, ShardTruncated | ShardChanged):
        return None
    raise StorageError(f"training shard {storage.public_url(shard.url)} cannot be read: {last}") from last
