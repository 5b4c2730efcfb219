"""How fast one encoder is with other batch sizes. Knows no torch: a tokenizer is loaded for each size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from jobs.bench_figures import BatchRate
from jobs.checkpoints import TokenizerSource
from pipeline.records import ImageTokenizer

SIZES = (16, 32, 64, 128, 256)
TURNS = 3
TURN_S = 0.3  # of one size; one batch at least
MOST_BATCH_S = 3.0  # a size that would take longer isn't tried


@dataclass(frozen=True)
class _Tried:
    tokenizer: ImageTokenizer
    pixels_BHWC: NDArray[np.uint8]

    def rate(self) -> float:
        """Images a second of one turn."""
        started, num_images = time.perf_counter(), 0
        while not num_images or time.perf_counter() - started < TURN_S:
            num_images += len(self.tokenizer.encode(self.pixels_BHWC))
        return num_images / (time.perf_counter() - started)


def sweep(source: TokenizerSource, batches: Sequence[NDArray[np.uint8]], image_s: float) -> tuple[BatchRate, ...]:
    """The median of a few turns for SIZES and the source's own; the sizes take turns, so that a passing disturbance
    hits all. `image_s`: what an image takes, about."""
    sizes = sorted({*SIZES, source.batch_size})
    tried = {size: _try(source, batches, size) for size in sizes if size * image_s <= MOST_BATCH_S}
    there = {size: one for size, one in tried.items() if one is not None}
    turns = [{size: one.rate() for size, one in there.items()} for _ in range(TURNS)]
    return tuple(
        BatchRate(size, statistics.median(turn[size] for turn in turns) if size in there else None) for size in sizes
    )


def _try(source: TokenizerSource, batches: Sequence[NDArray[np.uint8]], size: int) -> _Tried | None:
    """None where it doesn't fit into the device's memory."""
    number = -(-size // len(batches[0]))
    pixels_BHWC = np.concatenate([batches[n % len(batches)] for n in range(number)])[:size]
    try:
        tokenizer = replace(source, batch_size=size).load()
        tokenizer.encode(pixels_BHWC)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in f"{type(error).__name__} {error}".lower():
            raise
        return None
    return _Tried(tokenizer, pixels_BHWC)
