"""Which token row comes when in training: pure functions of the parts' rows, the seed and the epoch. Reads nothing.

- The parts are cut into chunks of CHUNK_ROWS rows, which come in a permutation by (seed, epoch).
- The rows in that order are shared out: share s of n has one stretch of them, and no two differ by more than a row.
- Each share is read in equal windows of whole chunks, about `shuffle_rows` rows at most, and the rows of a window come
  in a permutation by (seed, epoch, where the window begins).
So each row comes once an epoch whatever the number of shares, and any place can be resumed by opening one window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.permutations import permutation
from pipeline.token_table import ROW_GROUP_ROWS

# P parts, M chunks, S spans of a share

ORDER_VERSION = 1  # another order needs another number, so that no state is taken up in it
CHUNK_ROWS = ROW_GROUP_ROWS  # a row group is decoded whole
_CHUNK_ORDER, _ROW_ORDER = 1, 2  # keep the random streams apart


@dataclass(frozen=True)
class Share:
    """The rows of one of `count` readers."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count:
            raise ValueError(f"share {self.number} is not one of {self.count}")

    def stretch(self, num_rows: int) -> tuple[int, int]:
        """First and end; the first shares have the rows that are left over."""
        size, left = divmod(num_rows, self.count)
        first, end = (number * size + min(number, left) for number in (self.number, self.number + 1))
        return first, end


@dataclass(frozen=True)
class Span:
    """Rows `start` to `stop` of the part at `part` in the list."""

    part: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class ShareOrder:
    """One share's rows of one epoch. With `shuffle_rows` 0 all come as they are stored."""

    def __init__(self, rows_P: NDArray[np.int64], *, seed: int, epoch: int, shuffle_rows: int, share: Share) -> None:
        self._seed, self._epoch, self._shuffled = seed, epoch, shuffle_rows > 0
        part_M, start_M, stop_M = _chunks(rows_P)
        order_M = permutation(len(part_M), seed, _CHUNK_ORDER, epoch) if self._shuffled else np.arange(len(part_M))
        end_M = np.cumsum((stop_M - start_M)[order_M])
        first, end = share.stretch(int(rows_P.sum()))
        mine = slice(int(np.searchsorted(end_M, first, "right")), int(np.searchsorted(end_M, end, "left")) + 1)
        chunks_S, end_S = order_M[mine] if end > first else order_M[:0], end_M[mine]
        self._part_S, self._start_S, self._stop_S = part_M[chunks_S], start_M[chunks_S], stop_M[chunks_S]
        if len(chunks_S):  # the neighbours' rows of the chunks that are cut
            self._start_S[0] += first - (end_S[0] - (self._stop_S[0] - self._start_S[0]))
            self._stop_S[-1] -= end_S[-1] - end
        self.num_rows = end - first
        self._bounds = self._windows(shuffle_rows or CHUNK_ROWS)

    def _windows(self, rows: int) -> NDArray[np.int64]:
        """The first span of each window, and the end."""
        self._first_row_S = np.concatenate([[0], np.cumsum(self._stop_S - self._start_S)])
        num_windows = -(-self.num_rows // rows)  # of equal length: a short one would hold few parts
        window_S = self._first_row_S[:-1] * num_windows // max(1, self.num_rows)
        return np.concatenate([np.flatnonzero(np.diff(window_S, prepend=-1)), [len(window_S)]])

    @property
    def num_windows(self) -> int:
        return len(self._bounds) - 1

    def window_of(self, row: int) -> int:
        """The window that holds the row-th row of the share; `num_windows` behind the last."""
        return int(np.searchsorted(self._first_row_S[self._bounds[1:]], row, "right"))

    def first_row(self, window: int) -> int:
        return int(self._first_row_S[self._bounds[window]])

    def spans(self, window: int) -> list[Span]:
        """What is to be read for a window, in this order."""
        which = slice(int(self._bounds[window]), int(self._bounds[window + 1]))
        columns = (self._part_S[which], self._start_S[which], self._stop_S[which])
        return [Span(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]

    def row_order(self, window: int) -> NDArray[np.int64]:
        """The order in which the rows of a window come: places in its spans laid end to end."""
        first, end = (int(self._first_row_S[self._bounds[number]]) for number in (window, window + 1))
        return (
            permutation(end - first, self._seed, _ROW_ORDER, self._epoch, first)
            if self._shuffled
            else np.arange(end - first)
        )


def _chunks(rows_P: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Part, start and stop of each chunk, as they are stored."""
    chunks_P = -(-rows_P // CHUNK_ROWS)
    part_M = np.repeat(np.arange(len(rows_P)), chunks_P)
    number_M = np.arange(len(part_M)) - np.repeat(np.cumsum(chunks_P) - chunks_P, chunks_P)
    start_M = number_M * CHUNK_ROWS
    return part_M, start_M, np.minimum(start_M + CHUNK_ROWS, rows_P[part_M])
