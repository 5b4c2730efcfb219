"""The images held out for evaluation: the first n of their shards, decoded as the tokenizer will see them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from pipeline.images import ImageSpec, SampleError, decode_image
from pipeline.records import ObjectInfo, RawSample
from pipeline.shards import read_samples

# N images, H W pixel rows and columns, C = 3 colours


@dataclass(frozen=True)
class HeldOut:
    """One worker's share: uint8 (N, size, size, 3), and how many of its images gave no pixels. `places_N` (int64) are
    their places among the samples held out, bad ones counted: the same for any number of workers."""

    pixels_NHWC: NDArray[np.uint8]
    places_N: NDArray[np.int64]
    num_bad: int

    def batches(self, batch_size: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        """Pixels and places, in order; the last may be smaller."""
        for start in range(0, len(self.pixels_NHWC), batch_size):
            batch = slice(start, start + batch_size)
            yield self.pixels_NHWC[batch], self.places_N[batch]


def held_out_images(
    shards: Sequence[ObjectInfo],
    spec: ImageSpec,
    num_images: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    decode_threads: int = 4,
) -> HeldOut:
    """The rank's share (every world_size-th) of the first `num_images` samples, in shard order. A bad image
    leaves a gap and is counted. Raises ShardError: the yardstick must not change without a word."""
    samples = islice(chain.from_iterable(map(read_samples, shards)), num_images)
    with ThreadPoolExecutor(decode_threads, "decode") as threads:
        decoded = list(threads.map(lambda s: _decode(s, spec), islice(samples, rank, None, world_size)))
    good = {
        rank + number * world_size: pixels_HWC for number, pixels_HWC in enumerate(decoded) if pixels_HWC is not None
    }
    pixels_NHWC = np.array(list(good.values()), dtype=np.uint8).reshape(-1, spec.size, spec.size, 3)
    return HeldOut(pixels_NHWC, np.array(list(good), dtype=np.int64), len(decoded) - len(good))


def _decode(sample: RawSample, spec: ImageSpec) -> NDArray[np.uint8] | None:
    if sample.image is None:
        return None
    try:
        return decode_image(sample.image, spec).pixels_HWC
    except SampleError:
        return None
