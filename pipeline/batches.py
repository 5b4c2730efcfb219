"""Samples -> fixed-size pixel batches, decoded ahead on threads. Owns the one decode iterator."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from pipeline.images import ImageSpec, SampleError, decode_image
from pipeline.metadata import MetadataColumn, MetadataError, read_metadata
from pipeline.records import DecodedSample, FailureReason, PixelBatch, RawSample, SampleFailure, Stage

# B batch, H W pixel rows and columns, C channels

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
    At most two batches of samples are decoded ahead, which bounds the memory."""
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
    waiting: deque[Future[Decoded | SampleFailure]] = deque()
    try:
        for sample in islice(samples, ahead):
            waiting.append(executor.submit(decode_sample, sample, spec, columns))
        while waiting:
            yield waiting.popleft().result()
            for sample in islice(samples, 1):
                waiting.append(executor.submit(decode_sample, sample, spec, columns))
    finally:
        for future in waiting:
            future.cancel()


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
