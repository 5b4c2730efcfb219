"""Where the benchmark's actors get their tokenizer: one that costs nothing, or the run's own, which leaves marks."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.records import ImageTokenizer

if TYPE_CHECKING:
    from jobs.tokenize_actor import Source

LOADED, ENCODED = "loaded", "encoded"


@dataclass(frozen=True)
class FreeSource:
    """Tokens of the right shape and range for nothing, so that what is left is the pipeline's own cost. As varied as
    the pixels, so that they compress like tokens and not like zeros."""

    tokenizer_id: str
    grid: tuple[int, int]
    codebook_size: int

    def load(self) -> FreeSource:
        return self

    def encode(self, pixels_BHWC: NDArray[np.uint8]) -> NDArray[np.integer[Any]]:
        rows, columns = (side // cells for side, cells in zip(pixels_BHWC.shape[1:3], self.grid, strict=True))
        cells_BHWC = pixels_BHWC[:, : rows * self.grid[0] : rows, : columns * self.grid[1] : columns]
        tokens_BHW: NDArray[np.int64] = (cells_BHWC.astype(np.int64) @ np.array([1, 31, 961])) % self.codebook_size
        return tokens_BHW


@dataclass(frozen=True)
class MarkedSource:
    """The tokenizer of `source`; files in `folder` say when it was loaded and when it first gave tokens. For actors of
    this machine, which share its disk and its clock."""

    source: Source
    folder: str

    def load(self) -> ImageTokenizer:
        tokenizer = _Marked(self.source.load(), self)
        self.mark(LOADED)
        return tokenizer

    def mark(self, what: str) -> None:
        (Path(self.folder) / f"{what}-{os.getpid()}").write_text(repr(time.time()))

    def times(self, what: str) -> list[float]:
        """Seconds since the epoch, of each process."""
        return sorted(float(path.read_text()) for path in Path(self.folder).glob(f"{what}-*"))


class _Marked:
    """The tokenizer, whose first answer is noted."""

    def __init__(self, tokenizer: ImageTokenizer, marks: MarkedSource) -> None:
        self.grid, self.codebook_size = tokenizer.grid, tokenizer.codebook_size
        self.tokenizer_id = tokenizer.tokenizer_id
        self._tokenizer, self._marks, self._first = tokenizer, marks, threading.Lock()

    def encode(self, pixels_BHWC: NDArray[np.uint8]) -> NDArray[np.integer[Any]]:
        tokens_BHW = self._tokenizer.encode(pixels_BHWC)
        if self._first.acquire(blocking=False):  # never released: once is enough
            self._marks.mark(ENCODED)
        return tokens_BHW
