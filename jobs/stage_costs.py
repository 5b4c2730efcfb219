"""What each stage of tokenising costs by itself: the same functions as in a run, one after another, on one thread.

From the sums follows the ideal of a machine whose cores do everything: cores ÷ CPU seconds an image. Knows neither Ray
nor torch: a tokenizer is given.
"""

from __future__ import annotations

import hashlib
import math
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.batches import decode_sample
from pipeline.errors import PipelineError
from pipeline.images import ImageSpec
from pipeline.memory_budget import keep_large_blocks_apart
from pipeline.output import OutputPrefix
from pipeline.records import DecodedSample, ImageTokenizer, ObjectInfo, RawSample, SampleFailure
from pipeline.shards import read_samples
from pipeline.token_table import narrow_tokens, part_bytes
from pipeline.tokenize_shard import TokenizeJob

# B images of one batch, N tokens of an image, H W pixel rows and columns, C channels

KEPT_RAW_BYTES = 512 << 20  # of undecoded images: the sample ends where it has more
KEPT_PIXEL_BYTES = 256 << 20  # of batches for the encoder
TAR_BLOCK = 512
STAGE_FOR_S = 5.0  # a stage that takes longer has seen enough, be it a second an image
Made = TypeVar("Made")
Progress = Callable[[str], None]
Raw = list[tuple[ObjectInfo, list[RawSample]]]


class NothingToMeasure(PipelineError):
    """None of the first images can be decoded."""


@dataclass(frozen=True)
class StageCosts:
    """Seconds an image, each stage measured alone on one thread. `write_s`: making a shard's part, its checksum, and
    the PUT. `num_images` were decoded, `num_encoded` encoded (whole batches, their filling included)."""

    read_s: float
    decode_s: float
    encode_s: float
    write_s: float
    num_images: int = 0
    num_encoded: int = 0

    @property
    def total_s(self) -> float:
        return self.read_s + self.decode_s + self.encode_s + self.write_s


@dataclass(frozen=True)
class StageSample:
    """`cpu` of this process, all its threads together; `wall` by the clock. `image_bytes`, `shard_bytes` and
    `part_bytes` are means of an image: of its file, of its share of the tar, and of its row. `batches` are whole ones,
    decoded."""

    cpu: StageCosts
    wall: StageCosts
    image_bytes: float
    shard_bytes: float
    part_bytes: float
    num_failed: int
    batches: tuple[NDArray[np.uint8], ...]


@dataclass(frozen=True)
class _Spent:
    cpu_s: float
    wall_s: float


@dataclass(frozen=True)
class _Decoded:
    """The rows of each shard that has any; and whole batches of pixels, as many as are kept."""

    shards: list[tuple[ObjectInfo, list[DecodedSample]]]
    batches: list[NDArray[np.uint8]]
    num_rows: int
    num_failed: int


def stage_costs(
    shards: Sequence[ObjectInfo], spec: ImageSpec, tokenizer: ImageTokenizer, job: TokenizeJob, num_images: int
) -> StageCosts:
    """CPU seconds an image of the first `num_images` of these shards; see `measure_stages`."""
    return measure_stages(shards, spec, tokenizer, job, num_images).cpu


def measure_stages(
    shards: Sequence[ObjectInfo],
    spec: ImageSpec,
    tokenizer: ImageTokenizer,
    job: TokenizeJob,
    num_images: int,
    progress: Progress = lambda stage: None,
) -> StageSample:
    """The first images of the shards through one stage after another, each for STAGE_FOR_S at most. Parts go to a
    folder of their own below the job's output, which is removed again. Raises ShardError, StorageError,
    NothingToMeasure."""
    keep_large_blocks_apart()  # as the worker does: it decides what a large array costs
    progress("read")
    _decode(read_first(shards, job, 1), spec, job)  # connections are made, modules imported, kernels compiled
    raw, reading = _timed(lambda: read_first(shards, job, num_images))
    progress("decode")
    decoded, decoding = _timed(lambda: _decode(raw, spec, job))
    num_read, num_decoded = _count(raw), decoded.num_rows + decoded.num_failed
    if not decoded.num_rows:
        raise NothingToMeasure(f"none of the first {num_decoded:,} images of the shards can be decoded")
    progress("encode")
    tokens_BN, encoding = _encode(decoded, tokenizer, job)
    progress("write")
    num_bytes, writing = _write(decoded, _for_all(tokens_BN, decoded.num_rows), job)
    num_encoded = len(tokens_BN)

    def costs(spent: Callable[[_Spent], float]) -> StageCosts:
        read_s, decode_s = spent(reading) / num_read, spent(decoding) / num_decoded
        encode_s, write_s = spent(encoding) / num_encoded, spent(writing) / decoded.num_rows
        return StageCosts(read_s, decode_s, encode_s, write_s, num_decoded, num_encoded)

    image_bytes = sum(sample.size for _, samples in raw for sample in samples) / num_read
    shard_bytes = sum(_bytes_up_to(samples) for _, samples in raw) / num_read
    return StageSample(
        costs(lambda s: s.cpu_s), costs(lambda s: s.wall_s), image_bytes, shard_bytes, num_bytes / decoded.num_rows,
        decoded.num_failed, tuple(decoded.batches),
    )  # fmt: skip


def _timed(work: Callable[[], Made]) -> tuple[Made, _Spent]:
    cpu, wall = time.process_time(), time.perf_counter()
    made = work()
    return made, _Spent(time.process_time() - cpu, time.perf_counter() - wall)


def _count(raw: Raw) -> int:
    return sum(len(samples) for _, samples in raw)


def _bytes_up_to(samples: Sequence[RawSample]) -> int:
    """Of the tar, up to the last image's end; in a compressed tar, which tells no offsets, about what they take."""
    last = samples[-1] if samples else None
    if last is None or last.offset is None:
        return sum(sample.size + 2 * TAR_BLOCK for sample in samples)
    return last.offset + last.size + TAR_BLOCK


def read_first(shards: Sequence[ObjectInfo], job: TokenizeJob, num_images: int) -> Raw:
    """The first samples, good or bad, of these shards: as many as asked for, as KEPT_RAW_BYTES hold, or as STAGE_FOR_S
    allow; at least one. Raises ShardError, StorageError."""
    found: Raw = []
    left, left_bytes, until = num_images, KEPT_RAW_BYTES, time.monotonic() + STAGE_FOR_S
    for shard in shards:
        samples: list[RawSample] = []
        found.append((shard, samples))
        with closing(_samples(shard, job)) as all_samples:
            for sample in all_samples:
                samples.append(sample)
                left, left_bytes = left - 1, left_bytes - sample.size
                if left <= 0 or left_bytes <= 0 or time.monotonic() > until:
                    return found
    return found


def _samples(shard: ObjectInfo, job: TokenizeJob) -> Generator[RawSample, None, None]:
    return read_samples(
        shard,
        metadata_extensions=frozenset(column.extension for column in job.table.columns),
        image_extensions=job.image_extensions,
        require_end_marker=job.require_end_marker,
    )


def _decode(raw: Raw, spec: ImageSpec, job: TokenizeJob) -> _Decoded:
    """Copying each image into its batch belongs to it."""
    until, batches = time.monotonic() + STAGE_FOR_S, _Batches((job.batch_size, spec.size, spec.size, 3))
    shards: list[tuple[ObjectInfo, list[DecodedSample]]] = []
    num_failed = 0
    for shard, samples in raw:
        rows: list[DecodedSample] = []
        for sample in samples:
            outcome = decode_sample(sample, spec, job.table.columns)
            if isinstance(outcome, SampleFailure):
                num_failed += 1
            else:
                rows.append(outcome[0])
                batches.add(outcome[1])
            if time.monotonic() > until:
                break
        shards.append((shard, rows))
    return _Decoded([one for one in shards if one[1]], batches.kept, sum(len(rows) for _, rows in shards), num_failed)


class _Batches:
    """Fills batches of one shape, one after another, and keeps the first of them."""

    def __init__(self, shape_BHWC: tuple[int, int, int, int]) -> None:
        self.kept: list[NDArray[np.uint8]] = []
        self._shape = shape_BHWC
        self._most = max(1, KEPT_PIXEL_BYTES // math.prod(shape_BHWC))
        self._batch_BHWC, self._filled = np.zeros(shape_BHWC, np.uint8), 0

    def add(self, pixels_HWC: NDArray[np.uint8]) -> None:
        if self._filled == len(self._batch_BHWC):
            self._batch_BHWC, self._filled = np.zeros(self._shape, np.uint8), 0
        if not self._filled and len(self.kept) < self._most:
            self.kept.append(self._batch_BHWC)
        self._batch_BHWC[self._filled] = pixels_HWC
        self._filled += 1


def _encode(decoded: _Decoded, tokenizer: ImageTokenizer, job: TokenizeJob) -> tuple[NDArray[Any], _Spent]:
    """The tokens of as many batches as STAGE_FOR_S allows. The first batch is encoded once before: it may compile."""
    tokenizer.encode(decoded.batches[0])

    def encode() -> NDArray[Any]:
        until, tokens = time.perf_counter() + STAGE_FOR_S, []
        for batch_BHWC in decoded.batches:
            tokens.append(narrow_tokens(tokenizer.encode(batch_BHWC), job.table))
            if time.perf_counter() > until:
                break
        return np.concatenate(tokens)

    return _timed(encode)


def _for_all(tokens_BN: NDArray[Any], num_rows: int) -> NDArray[Any]:
    """Tokens for every row. Those of images that were not encoded are drawn from the others': as frequent each, so
    that they compress alike, and never a row for the second time."""
    if (missing := num_rows - len(tokens_BN)) <= 0:
        return tokens_BN[:num_rows]
    drawn = np.random.default_rng(0).choice(tokens_BN.reshape(-1), (missing, tokens_BN.shape[1]))
    return np.concatenate([tokens_BN, drawn])


def _write(decoded: _Decoded, tokens_BN: NDArray[Any], job: TokenizeJob) -> tuple[int, _Spent]:
    """One part for each shard; the bytes of all."""

    def write(output: OutputPrefix, shard: ObjectInfo, rows: list[DecodedSample], tokens_bN: NDArray[Any]) -> int:
        part = part_bytes(job.table, shard, rows, tokens_bN, 0)
        hashlib.sha256(part).hexdigest()
        storage.publish(output.part(f"{uuid.uuid4().hex}.parquet"), part)
        return len(part)

    def write_all(output: OutputPrefix) -> int:
        num_bytes = first = 0
        for shard, rows in decoded.shards:
            num_bytes += write(output, shard, rows, tokens_BN[first : first + len(rows)])
            first += len(rows)
        return num_bytes

    with scratch(storage.join(job.output.url, "stages")) as output:
        shard, rows = decoded.shards[0]
        write(output, shard, rows[:1], tokens_BN[:1])  # connections are made, modules imported
        return _timed(lambda: write_all(output))


@contextmanager
def scratch(url: str) -> Iterator[OutputPrefix]:
    """A prefix that begins with `url` and is nobody else's, for the block."""
    output = OutputPrefix(f"{storage.normalize(url)}.bench-{uuid.uuid4().hex[:12]}")
    try:
        yield output
    finally:
        storage.remove_folder(output.url)
