"""Samples -> fixed-size pixel batches, decoded ahead on threads. Owns the one decode iterator."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future

import numpy as np
from numpy.typing import NDArray

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
    failures: list[SampleFailure],
    executor: Executor,
    *,
    columns: Sequence[MetadataColumn] = (),
) -> Generator[PixelBatch, None, None]:
    """Batches in tar order; a sample that gives no pixels goes to `failures` instead (also in tar order).
    At most two batches of samples are decoded ahead, and fewer where they have more than AHEAD_BYTES."""
    batch: list[Decoded] = []
    for outcome in _decoded_in_order(iter(samples), spec, columns, executor, ahead=2 * batch_size):
        if isinstance(outcome, SampleFailure):
            failures.append(outcome)
            continue
        batch.append(outcome)
        if len(batch) == batch_size:
            yield _whole_batch(batch, batch_size)
            batch = []
    if batch:
        yield _whole_batch(batch, batch_size)


def _decoded_in_order(
    samples: Iterator[RawSample],
    spec: ImageSpec,
    columns: Sequence[MetadataColumn],
    executor: Executor,
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


def _whole_batch(batch: list[Decoded], batch_size: int) -> PixelBatch:
    pixels_BHWC = np.zeros((batch_size, *batch[0][1].shape), np.uint8)
    for row, (_, pixels_HWC) in enumerate(batch):
        pixels_BHWC[row] = pixels_HWC
    return PixelBatch(pixels_BHWC, tuple(sample for sample, _ in batch))
