"""How a run uses its codes: token rows counted once, in memory that does not grow with them.

What the counts of shards say of each other is drift.py's; which parts are read, and where, is the caller's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.drift import divergence_bits, entropy_bits
from pipeline.errors import Damaged, StorageError
from pipeline.map_ahead import map_ahead
from pipeline.token_run import Part, TokenRun
from pipeline.token_table import TableSpec

# B images, N tokens of an image, K codes, P parts, G groups of codes
Tokens = NDArray[np.signedinteger[Any]]

COUNTERS = 64 << 20  # of four bytes each: at most so many for positions, and so many for parts
LEAST_GROUPS = 16
TOKENS_A_GROUP = 16  # of an average part; with fewer chance is all there is to see
TOKENS_AT_ONCE = 1 << 20  # become indexes of eight bytes each
READERS = 4  # parts at once
MOST_UNREAD, UNREAD_SHARE = 100, 0.01  # more than both: it is the store that fails


def number_of_groups(table: TableSpec, num_parts: int, num_rows: int) -> int:
    """Into how many groups codes are put to hold parts against each other: one for each code where that fits."""
    tokens_a_part = num_rows * table.num_tokens // max(1, num_parts)
    wanted = min(COUNTERS // max(1, num_parts), tokens_a_part // TOKENS_A_GROUP)
    return min(table.codebook_size, max(LEAST_GROUPS, wanted))


class TokenCounts:
    """Counts of neighbouring parts of a run; several parts may be counted at once, each on its own thread.

    `uses_K` int64; `positions_NK` uint32, None where that would be too many counters. By part: `num_rows_P` int64,
    `groups_PG` uint32 (code k is in group k mod G) and `halves_P`, the divergence of its even rows from its odd ones in
    bits, NaN where it has not both."""

    def __init__(self, table: TableSpec, num_parts: int, num_groups: int) -> None:
        self._lock, size = Lock(), table.codebook_size
        self.uses_K = np.zeros(size, np.int64)
        has_room = table.num_tokens * size <= COUNTERS
        self.positions_NK = np.zeros((table.num_tokens, size), np.uint32) if has_room else None
        self.num_rows_P = np.zeros(num_parts, np.int64)
        self.groups_PG = np.zeros((num_parts, num_groups), np.uint32)
        self.halves_P = np.full(num_parts, np.nan)

    @property
    def num_bytes(self) -> int:
        """Of all counters."""
        arrays = (self.uses_K, self.positions_NK, self.num_rows_P, self.groups_PG, self.halves_P)
        return sum(array.nbytes for array in arrays if array is not None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=Lock())

    def count_part(self, number: int, batches: Iterable[Tokens]) -> None:
        """Count the tokens_BN of one part. Raises ValueError for a token that is no code, and whatever `batches`
        raises: what came before that is counted."""
        halves_2K = np.zeros((2, len(self.uses_K)), np.int64)
        try:
            for tokens_BN in _pieces(batches):
                _require_codes(tokens_BN, len(self.uses_K))
                first_row = int(self.num_rows_P[number])
                for half_K, start in zip(halves_2K, (first_row % 2, 1 - first_row % 2), strict=True):
                    half_K += np.bincount(tokens_BN[start::2].reshape(-1), minlength=len(half_K))
                self._count_positions(tokens_BN)
                self.num_rows_P[number] += len(tokens_BN)
        finally:
            with self._lock:
                self.uses_K += halves_2K.sum(axis=0)
            halves_2G = self._grouped(halves_2K)
            self.groups_PG[number] = halves_2G.sum(axis=0)
            self.halves_P[number] = divergence_bits(halves_2G[:1], halves_2G[1:])[0]

    def put(self, first: int, other: TokenCounts) -> None:
        """Add what was counted elsewhere of the parts from number `first` on."""
        here = slice(first, first + len(other.num_rows_P))
        self.uses_K += other.uses_K
        if self.positions_NK is not None and other.positions_NK is not None:
            self.positions_NK += other.positions_NK
        self.num_rows_P[here], self.groups_PG[here] = other.num_rows_P, other.groups_PG
        self.halves_P[here] = other.halves_P

    def position_entropy_bits(self) -> NDArray[np.float64] | None:
        """(N,) order-0 entropy of each place in the grid; None where places were not counted, or so many images that a
        counter may have begun again at zero."""
        if self.positions_NK is None or int(self.num_rows_P.sum()) > np.iinfo(self.positions_NK.dtype).max:
            return None
        return entropy_bits(self.positions_NK)

    def _count_positions(self, tokens_BN: Tokens) -> None:
        if self.positions_NK is not None:
            starts_N = np.arange(tokens_BN.shape[1]) * len(self.uses_K)
            places = (tokens_BN + starts_N).reshape(-1)
            with self._lock:
                np.add.at(self.positions_NK.reshape(-1), places, np.uint32(1))

    def _grouped(self, halves_2K: NDArray[np.int64]) -> NDArray[np.int64]:
        num_groups = self.groups_PG.shape[1]
        padded_2K = np.pad(halves_2K, ((0, 0), (0, -halves_2K.shape[1] % num_groups)))
        halves_2G: NDArray[np.int64] = padded_2K.reshape(2, -1, num_groups).sum(axis=1)
        return halves_2G


def _pieces(batches: Iterable[Tokens]) -> Iterator[Tokens]:
    for tokens_BN in batches:
        rows = max(1, TOKENS_AT_ONCE // max(1, tokens_BN.shape[1]))
        for start in range(0, len(tokens_BN), rows):
            yield tokens_BN[start : start + rows]


def _require_codes(tokens_BN: Tokens, codebook_size: int) -> None:
    if tokens_BN.size and not 0 <= tokens_BN.min() <= tokens_BN.max() < codebook_size:
        raise ValueError(f"it has tokens {tokens_BN.min()}..{tokens_BN.max()}, outside [0, {codebook_size})")


def count_parts(run: TokenRun, parts: Sequence[Part], counts: TokenCounts) -> Iterator[tuple[int, str]]:
    """Count these parts; gives each one's number and, where it could not be read to its end, why. Raises StorageError
    when too many cannot be fetched. Damaged ones never are: that a whole run is damaged is an answer."""
    batch_rows = max(1, TOKENS_AT_ONCE // run.table.num_tokens)

    def count(place: tuple[int, Part]) -> StorageError | ValueError | None:
        try:
            counts.count_part(place[0], (batch.tokens_BN for batch in run.batches([place[1]], rows=batch_rows)))
        except (StorageError, ValueError) as error:
            return error
        return None

    num_unread, most = 0, max(MOST_UNREAD, int(UNREAD_SHARE * len(parts)))
    for number, problem in enumerate(map_ahead(count, enumerate(parts), threads=READERS)):
        num_unread += isinstance(problem, StorageError) and not isinstance(problem, Damaged)
        if num_unread > most:
            raise StorageError(f"more than {most} parts cannot be read, the last one because {problem}")
        yield number, str(problem or "")
