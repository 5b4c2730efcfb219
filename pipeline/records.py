"""The frozen values that travel through the pipeline. No behaviour, no I/O. Those that a plan holds by the million
have slots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

# B batch, H W token rows and columns (in pixels_BHWC: pixel rows and columns), C channels


class FailureReason(StrEnum):
    """Why an image has no token row: a closed set, so that it can be grouped by."""

    NOT_AN_IMAGE = "not_an_image"
    TRUNCATED_IMAGE = "truncated_image"
    UNDECODABLE = "undecodable"
    UNSUPPORTED_MODE = "unsupported_mode"
    TOO_SMALL = "too_small"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_MANY_BYTES = "too_many_bytes"
    NO_IMAGE = "no_image"
    SEVERAL_IMAGES = "several_images"
    DUPLICATE_KEY = "duplicate_key"
    UNSUPPORTED_MEMBER = "unsupported_member"
    BAD_METADATA = "bad_metadata"
    SHARD_TRUNCATED = "shard_truncated"
    SHARD_DAMAGED = "shard_damaged"
    SHARD_UNREADABLE = "shard_unreadable"
    SHARD_CHANGED = "shard_changed"
    SHARD_CRASHED = "shard_crashed"
    SHARD_TIMED_OUT = "shard_timed_out"


class Stage(StrEnum):
    """Where a failure was found."""

    READ = "read"
    DECODE = "decode"
    METADATA = "metadata"
    SHARD = "shard"  # the whole shard is quarantined


class ShardState(StrEnum):
    """What the ledger says of a shard."""

    DONE = "done"
    QUARANTINED = "quarantined"
    REMOVED = "removed"  # the input has it no longer, and its part was dropped: nothing is left of it


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object as its store lists it. `etag` is the store's own mark of the content (mtime on a local disk)."""

    url: str
    size_bytes: int
    etag: str


@dataclass(frozen=True, slots=True)
class RawSample:
    """One sample as it lies in the tar: image bytes undecoded, chosen metadata members by extension."""

    key: str
    index: int  # position in the tar, counting samples
    offset: int | None  # of the image's bytes in the tar; None in a compressed tar
    size: int  # bytes of the image
    image: bytes | None
    members: Mapping[str, bytes] = field(default_factory=dict)
    failure: FailureReason | None = None  # found while reading: the sample has no single image
    detail: str = ""


@dataclass(frozen=True, slots=True)
class SampleFailure:
    """One image (or, at stage `shard`, a whole shard) that has no token row, and why."""

    key: str | None
    index: int | None
    offset: int | None
    size: int | None
    stage: Stage
    reason: FailureReason
    message: str


@dataclass(frozen=True, slots=True)
class DecodedSample:
    """All of a token row but its tokens."""

    key: str
    index: int
    offset: int | None
    size: int
    width: int
    height: int
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class PixelBatch:
    """`samples` decoded, in tar order. `pixels_BHWC` is uint8 and always a whole batch: rows past
    `len(samples)` are zeros, for another shape may pick another kernel and flip a near-tie. `failures` are those of the
    samples since the batch before, in tar order; the last batch of a shard may have nothing else, and no pixels then:
    (0, H, W, C)."""

    pixels_BHWC: NDArray[np.uint8]
    samples: tuple[DecodedSample, ...]
    failures: tuple[SampleFailure, ...] = ()
    reading_s: float = 0.0  # that its making waited for bytes


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What became of one shard: a row of the ledger."""

    shard: str
    size_bytes: int
    etag: str
    state: ShardState
    part: str | None = None  # file name under tokens/
    num_rows: int = 0
    num_failed: int = 0
    part_bytes: int = 0
    sha256: str | None = None
    seconds: float = 0.0
    attempts: int = 1
    reason: str | None = None  # of a quarantined shard
    message: str | None = None


class ImageTokenizer(Protocol):
    """The seam to the model, numpy on both sides."""

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) tokens per image."""

    @property
    def codebook_size(self) -> int:
        """Tokens lie in [0, codebook_size)."""

    @property
    def tokenizer_id(self) -> str:
        """Identifies the encoder's weights, architecture and image spec."""

    def encode(self, pixels_BHWC: NDArray[np.uint8]) -> NDArray[np.integer[Any]]:
        """uint8 (B, h, w, 3) -> tokens_BHW, any integer dtype. May be called from several threads at once: whoever
        must not be puts the callers in order. The array may be read-only, and is not to be kept."""
