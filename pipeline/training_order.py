"""Which training sample comes when: pure functions of the seed and the shard list. Reads nothing.

The order does not depend on the number of workers or on threads:
- The endless shard sequence is, epoch after epoch, a permutation of the list by (seed, epoch).
- Each of `num_streams` streams takes every num_streams-th of it as its *turns*, and reads them in windows of
  `shuffle_shards` turns. A window's samples come in a permutation by (seed, stream, window).
- Stream s fills the slots [s*B/S, (s+1)*B/S) of each global batch. A worker owns whole streams.
- Augmentation is drawn by (seed, stream, window, position in it): the identity of the sample's turn. (By
  (step, slot) it would hang on how many bad images came before, which decoding ahead does not know.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.images import Augment, ImageSpec
from pipeline.permutations import permutation

_SHARD_ORDER, _SAMPLE_ORDER, _AUGMENT = 1, 2, 3  # keep the random streams apart


@dataclass(frozen=True)
class StreamOptions:
    """What, beside the shard list, decides which pixels come in which order."""

    image_spec: ImageSpec
    seed: int
    batch_size: int  # of the global batch
    num_streams: int
    shuffle_shards: int = 1
    augment: Augment = "none"

    def __post_init__(self) -> None:
        if self.batch_size % self.num_streams:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of data.num_streams {self.num_streams}")

    @property
    def per_stream(self) -> int:
        """Images that each stream gives to a global batch."""
        return self.batch_size // self.num_streams

    def streams_of(self, rank: int, world_size: int) -> range:
        """Whole streams, shared out as evenly as can be: shares differ by one stream at most."""
        if world_size > self.num_streams:
            raise ValueError(f"{world_size} workers are more than data.num_streams {self.num_streams}")
        first, end = (self.num_streams * number // world_size for number in (rank, rank + 1))
        return range(first, end)


@dataclass(frozen=True)
class StreamCursor:
    """How far one stream is: `taken` samples of `window`, the bad ones included; counts go back to step 0."""

    window: int = 0
    taken: int = 0
    num_used: int = 0
    num_bad: int = 0
    failed_shards: tuple[int, ...] = ()  # places in the shard list, each once, rising

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "failed_shards": list(self.failed_shards)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> StreamCursor:
        return cls(**{**value, "failed_shards": tuple(value["failed_shards"])})


def window_shards(options: StreamOptions, stream: int, window: int, num_shards: int) -> list[int]:
    """The places in the shard list of the turns of one window."""
    turns = range(window * options.shuffle_shards, (window + 1) * options.shuffle_shards)
    places = (divmod(turn * options.num_streams + stream, num_shards) for turn in turns)
    return [int(_shard_order(options.seed, epoch, num_shards)[place]) for epoch, place in places]


def sample_order(options: StreamOptions, stream: int, window: int, num_samples: int) -> list[int]:
    """The order in which the samples of one window are taken."""
    order: list[int] = permutation(num_samples, options.seed, _SAMPLE_ORDER, stream, window).tolist()
    return order


def augment_rng(options: StreamOptions, stream: int, window: int, position: int) -> np.random.Generator:
    key = (options.seed, _AUGMENT, stream, window, position)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


@lru_cache(maxsize=4)
def _shard_order(seed: int, epoch: int, num_shards: int) -> NDArray[np.int64]:
    return permutation(num_shards, seed, _SHARD_ORDER, epoch)
