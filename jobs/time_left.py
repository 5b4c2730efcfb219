"""How long a job will still take, by its pace of late. Pure bookkeeping: the clock is handed in, nothing is printed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

RECENT = 1 / 3  # of the time since the start: older than that says little of a cluster that changes
FINENESS = 1 / 32  # marks lie so far apart, as a share of the time since the start: there are never many


@dataclass(frozen=True, slots=True)
class _Mark:
    when: float  # seconds, of the clock
    done: float


class TimeLeft:
    """Of `total` in any unit (bytes, where units of work differ much in size). Shards that were begun together end
    together, so what is counted lies between the end of one such burst and now; the start counts only as long as there
    is nothing else to go by."""

    def __init__(self, total: float, now: Callable[[], float]) -> None:
        self._total, self._now = total, now
        self._marks: deque[_Mark] = deque()
        self._first_burst = 0.0
        self._begin(now())

    def _begin(self, when: float) -> None:
        self._start = self._bucket = when
        self._last = _Mark(when, 0.0)  # the state after the last note

    def note(self, amount: float, took_s: float | None = None) -> None:
        """So much more is done. `took_s`: what it took by itself; where that of the first is known, all before its
        beginning is left out: a cluster may take minutes to begin."""
        now = self._now()
        if took_s is not None and not self._marks:
            self._begin(max(self._start, now - took_s))
        if now - self._bucket >= FINENESS * (self._bucket - self._start):
            self._bucket = now
            self._mark(self._last)
        self._last = _Mark(now, self._last.done + amount)

    def skip(self, amount: float) -> None:
        """So much less is to be done; more, where it is negative. It says nothing of the pace."""
        self._total -= amount

    def _mark(self, mark: _Mark) -> None:
        self._marks.append(mark)
        self._first_burst = self._first_burst or mark.done
        while len(self._marks) > 1 and self._is_enough_since(self._marks[1]):
            self._marks.popleft()

    def _is_enough_since(self, mark: _Mark) -> bool:
        is_old = self._bucket - mark.when >= RECENT * (self._bucket - self._start)
        return is_old and self._last.done - mark.done >= self._first_burst

    @property
    def left_s(self) -> float | None:
        """None as long as nothing is known."""
        since = self._marks[0] if self._marks else self._last
        made = self._last.done - since.done
        return (self._now() - since.when) / made * (self._total - self._last.done) if made > 0 else None
