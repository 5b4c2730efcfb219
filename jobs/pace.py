"""How long a shard may take, by what was seen of others. Pure bookkeeping: no Ray, no clock of its own."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

FIRST_DEADLINE_S = 1800.0  # as long as nothing is known
LEAST_DEADLINE_S = 300.0  # longer than a store takes to answer when a request stalls and is asked again
DEADLINE_FACTOR = 10.0  # times the slowest seen
LEAST_LATE_S = 5.0
LATE_FACTOR = 4.0  # times the median seen
REMEMBERED = 500  # shards


@dataclass(frozen=True, slots=True)
class _Seen:
    size_bytes: int
    seconds: float


class Pace:
    """Notes finished shards; tells from them when another is late (worth a second try elsewhere) and when it is past
    its deadline (its actor is taken to hang)."""

    def __init__(self, deadline_s: float | None) -> None:
        """`deadline_s`: the same for every shard; None: derived from what was seen."""
        self._fixed_s = deadline_s
        self._seen: deque[_Seen] = deque(maxlen=REMEMBERED)
        self._largest_bytes = 0
        self._typical_bytes = 0.0
        self._median = self._slowest = math.nan  # seconds per byte
        self._is_stale = False  # something was noted that these do not know yet

    def note(self, size_bytes: int, seconds: float) -> None:
        """A shard was finished in so many seconds."""
        self._seen.append(_Seen(size_bytes, seconds))
        self._largest_bytes = max(self._largest_bytes, size_bytes)
        self._is_stale = True

    def _learn(self) -> None:
        """When asked, not with each shard that is noted: it sorts all that is remembered."""
        if self._is_stale:
            self._typical_bytes = max(1.0, statistics.median(one.size_bytes for one in self._seen))
            costs = [one.seconds / self._weight(one.size_bytes) for one in self._seen]
            self._median, self._slowest, self._is_stale = statistics.median(costs), max(costs), False

    def _weight(self, size_bytes: int) -> float:
        """A small shard counts as a typical one: what it takes is not for its bytes."""
        return max(self._typical_bytes, size_bytes)

    @property
    def least_deadline_s(self) -> float:
        """No deadline is shorter."""
        return LEAST_DEADLINE_S if self._fixed_s is None else self._fixed_s

    def deadline_s(self, size_bytes: int, attempt: int) -> float:
        """Twice as long with each further attempt (counted from 0), so that a deadline that was too short for a good
        shard does not quarantine it."""
        if self._fixed_s is not None:
            return self._fixed_s
        if not self._seen:
            return FIRST_DEADLINE_S * 2.0**attempt
        self._learn()
        least_s = LEAST_DEADLINE_S if size_bytes <= self._largest_bytes else FIRST_DEADLINE_S
        return max(least_s, DEADLINE_FACTOR * self._slowest * self._weight(size_bytes)) * 2.0**attempt

    def late_s(self, size_bytes: int) -> float:
        """Infinite as long as nothing is known."""
        if not self._seen:
            return math.inf
        self._learn()
        return max(LEAST_LATE_S, LATE_FACTOR * self._median * self._weight(size_bytes))
