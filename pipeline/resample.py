"""A random sample of a run's images, fetched again one by one: what their tokens are now is the caller's to say."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.images import ImageSpec, SampleError, decode_image
from pipeline.map_ahead import map_ahead
from pipeline.output import OutputPrefix
from pipeline.records import ShardResult
from pipeline.token_table import read_tokens_at

# N = H * W tokens of one image, C channels

PART_READERS = 4
FETCHERS = 16
COLUMNS = ("key", "index", "offset", "size")


class Skipped(StrEnum):
    """Why an image of the sample is not compared: a closed set."""

    FAILED = "failed"  # then, so that it has no tokens
    COMPRESSED = "compressed"  # shards: no byte range of them can be fetched
    CHANGED = "changed"  # shards, since they were tokenised
    GONE = "gone"  # shards


@dataclass(frozen=True)
class SampledImage:
    """One image of the sample. `pixels_HWC` is None where it was skipped, or where its bytes give no pixels now
    (`problem` says why)."""

    shard: str
    index: int
    key: str | None = None
    tokens_N: NDArray[np.signedinteger[Any]] | None = None  # as stored
    pixels_HWC: NDArray[np.uint8] | None = None
    skipped: Skipped | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Choice:
    """The samples of one shard that fell into the sample, failed ones too."""

    row: ShardResult
    indexes: tuple[int, ...]


def choose(rows: Iterable[ShardResult], share: float, seed: int) -> list[Choice]:
    """By `seed`, the shard's URL and the sample's index alone; a larger share if it gave too few, so that at least
    one image with tokens is chosen where there is one. `rows`: of shards that are done."""
    done = [row for row in rows if row.num_rows]
    while True:
        chosen = [choice for row in done if (choice := Choice(row, _indexes(row, share, seed))).indexes]
        # which ones failed, only the parts know: where more are chosen than failed, one of them has tokens
        if any(len(choice.indexes) > choice.row.num_failed for choice in chosen) or not done or share >= 1.0:
            return chosen
        share = min(1.0, max(share, 1e-9) * 2)


def _indexes(row: ShardResult, share: float, seed: int) -> tuple[int, ...]:
    key = int.from_bytes(hashlib.sha256(row.shard.encode()).digest()[:8], "big")
    # numpy promises raw bits for all versions, and what is drawn from them not
    bits = np.random.PCG64(np.random.SeedSequence((seed, key))).random_raw(row.num_rows + row.num_failed)
    return tuple(np.flatnonzero((bits >> np.uint64(11)) * 2.0**-53 < share).tolist())


def fetch(output: OutputPrefix, spec: ImageSpec, choices: Sequence[Choice]) -> Generator[SampledImage, None, None]:
    """One for each sample of `choices`, in their order. Raises StorageError."""
    stored = map_ahead(partial(_stored, output), choices, threads=PART_READERS)
    rows = (image for images in stored for image in images)
    return map_ahead(partial(_with_pixels, spec), rows, threads=FETCHERS)


@dataclass(frozen=True)
class _Stored:
    """A sample as its part has it, and where its bytes are."""

    image: SampledImage
    offset: int | None = None
    size: int = 0


def _stored(output: OutputPrefix, choice: Choice) -> list[_Stored]:
    row = choice.row
    assert row.part is not None
    shard_problem = _shard_problem(row)
    rows = {one["index"]: one for one in read_tokens_at(output.part(row.part), choice.indexes, COLUMNS)}
    images = []
    for index in choice.indexes:
        if (one := rows.get(index)) is None:
            images.append(_Stored(SampledImage(row.shard, index, skipped=Skipped.FAILED)))
            continue
        skipped = Skipped.COMPRESSED if one["offset"] is None else shard_problem
        image = SampledImage(row.shard, index, one["key"], one["tokens"], skipped=skipped)
        images.append(_Stored(image, one["offset"], one["size"]))
    return images


def _shard_problem(row: ShardResult) -> Skipped | None:
    now = storage.stat(row.shard)
    if now is None:
        return Skipped.GONE
    return None if (now.size_bytes, now.etag) == (row.size_bytes, row.etag) else Skipped.CHANGED


def _with_pixels(spec: ImageSpec, stored: _Stored) -> SampledImage:
    image = stored.image
    if image.skipped is not None or stored.offset is None:
        return image
    data = storage.read_range(image.shard, stored.offset, stored.size)
    try:
        pixels_HWC = decode_image(data, spec).pixels_HWC
    except SampleError as error:
        return SampledImage(image.shard, image.index, image.key, image.tokens_N, problem=error.message)
    return SampledImage(image.shard, image.index, image.key, image.tokens_N, pixels_HWC)
