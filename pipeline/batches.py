"""Samples -> fixed-size pixel batches, decoded ahead on threads. Owns the one decode iterator."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from pipeline.decode_threads import Submits
from pipeline.images import ImageSpec, SampleError, decode_image
from pipeline.metadata import MetadataColumn, MetadataError, read_metadata
from pipeline.records import DecodedSample, FailureReason, PixelBatch, RawSample, SampleFailure, Stage

# B batch, H W pixel rows and columns, C channels

AHEAD_BYTES = 64 << 20  # undecoded; one sample more may be in hand, however large

Decoded = tuple[DecodedSample, NDArray[np.uint8]]


def pixel_batches(
    samples: Iterable[RawSample],
    spec: ImageSpec,
    batch_size: int,
    executor: Submits,
    *,
    columns: Sequence[MetadataColumn] = (),
) -> Generator[PixelBatch, None, None]:
    """Batches in tar order, each with the failures of the samples that gave no pixels (also in tar order).
    At most two batches of samples are decoded ahead, and fewer where they have more than AHEAD_BYTES."""
    reading = _Timed(iter(samples))
    batch = _NewBatch(spec, batch_size)
    for outcome in _decoded_in_order(reading, spec, columns, executor, ahead=2 * batch_size):
        batch.add(outcome)
        if batch.is_full:
            whole, batch = batch.whole(reading.take_s()), _NewBatch(spec, batch_size)
            yield whole
            del whole
    if not batch.is_empty:
        yield batch.whole(reading.take_s())


class _NewBatch:
    """A batch that fills up."""

    def __init__(self, spec: ImageSpec, batch_size: int) -> None:
        self._size, self._batch_size = spec.size, batch_size
        self._decoded: list[Decoded] = []
        self._failures: list[SampleFailure] = []

    def add(self, outcome: Decoded | SampleFailure) -> None:
        if isinstance(outcome, SampleFailure):
            self._failures.append(outcome)
        else:
            self._decoded.append(outcome)

    @property
    def is_full(self) -> bool:
        return len(self._decoded) == self._batch_size

    @property
    def is_empty(self) -> bool:
        return not self._decoded and not self._failures

    def whole(self, reading_s: float) -> PixelBatch:
        rows = self._batch_size if self._decoded else 0
        pixels_BHWC = np.zeros((rows, self._size, self._size, 3), np.uint8)
        for row, (_, pixels_HWC) in enumerate(self._decoded):
            pixels_BHWC[row] = pixels_HWC
        samples = tuple(sample for sample, _ in self._decoded)
        return PixelBatch(pixels_BHWC, samples, tuple(self._failures), reading_s)


class _Timed(Iterator[RawSample]):
    """Counts the seconds that are spent waiting for the next."""

    def __init__(self, samples: Iterator[RawSample]) -> None:
        self._samples, self._seconds = samples, 0.0

    def __next__(self) -> RawSample:
        started = time.monotonic()
        try:
            return next(self._samples)
        finally:
            self._seconds += time.monotonic() - started

    def take_s(self) -> float:
        taken, self._seconds = self._seconds, 0.0
        return taken


def _decoded_in_order(
    samples: Iterator[RawSample],
    spec: ImageSpec,
    columns: Sequence[MetadataColumn],
    executor: Submits,
    ahead: int,
) -> Iterator[Decoded | SampleFailure]:
    waiting: deque[tuple[Future[Decoded | SampleFailure], int]] = deque()
    bytes_ahead = 0
    try:
        while True:
            while not waiting or (len(waiting) < ahead and bytes_ahead < AHEAD_BYTES):
                sample = next(samples, None)
                if sample is None:
                    break
                waiting.append((executor.submit(decode_sample, sample, spec, columns), _num_bytes(sample)))
                bytes_ahead += waiting[-1][1]
            if not waiting:
                return
            future, num_bytes = waiting.popleft()
            yield future.result()
            bytes_ahead -= num_bytes
    finally:
        for future, _ in waiting:
            future.cancel()


def _num_bytes(sample: RawSample) -> int:
    return len(sample.image or b"") + sum(len(member) for member in sample.members.values())


def decode_sample(sample: RawSample, spec: ImageSpec, columns: Sequence[MetadataColumn]) -> Decoded | SampleFailure:
    """The sample's row and pixels (H, W, 3), or why it has none. Bad data is a value here."""
    if sample.failure is not None or sample.image is None:
        return _failure(sample, Stage.READ, sample.failure or FailureReason.NO_IMAGE, sample.detail)
    try:
        metadata = read_metadata(sample.members, columns)
        decoded = decode_image(sample.image, spec)
    except MetadataError as error:
        return _failure(sample, Stage.METADATA, FailureReason.BAD_METADATA, str(error))
    except SampleError as error:
        return _failure(sample, Stage.DECODE, error.reason, error.message)
    row = DecodedSample(sample.key, sample.index, sample.offset, sample.size, decoded.width, decoded.height, metadata)
    return row, decoded.pixels_HWC


def _failure(sample: RawSample, stage: Stage, reason: FailureReason, message: str) -> SampleFailure:
    return SampleFailure(sample.key, sample.index, sample.offset, sample.size, stage, reason, message[:500])
