"""Which calls for shards take long: the late ones, worth a second try elsewhere, and those past their deadline, whose
actor is taken to hang. pace.py knows how long shards take. Pure bookkeeping: no Ray; the clock is handed in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from jobs.calls import Call
from jobs.dispatch import Work
from jobs.pace import Pace
from jobs.pool_settings import PoolSettings


class Lateness:
    """`now` is the clock, in seconds. All calls here are for shards."""

    def __init__(self, settings: PoolSettings, now: Callable[[], float]) -> None:
        self._pace, self._now = Pace(settings.shard_deadline_s), now
        # An actor may first wait for its decode task to begin: that is no fault of the shard.
        self._wait_s = settings.decode.wait_s if settings.decode else 0.0

    def note(self, call: Call) -> None:
        """It has just ended well."""
        self._pace.note(_size(_work(call)), self.age_s(call))

    def age_s(self, call: Call) -> float:
        return self._now() - call.began - call.delay_s

    def late(self, calls: Iterable[Call]) -> list[Work]:
        """What those are at that are late, the oldest first."""
        works = [(call, _work(call)) for call in sorted(calls, key=lambda call: call.began)]
        return [work for call, work in works if self.age_s(call) > self._pace.late_s(_size(work))]

    def hung(self, calls: Iterable[Call]) -> list[list[Call]]:
        """Those past their deadline, together for each actor."""
        before = self._now() - self._pace.least_deadline_s  # few are so old: that is asked first, of thousands
        by_actor: defaultdict[str, list[Call]] = defaultdict(list)
        for call in calls:
            if call.began < before and self.age_s(call) > self._deadline_s(_work(call)):
                by_actor[call.slot.name].append(call)
        return list(by_actor.values())

    def _deadline_s(self, work: Work) -> float:
        return self._pace.deadline_s(_size(work), work.charged) + self._wait_s


def _work(call: Call) -> Work:
    assert call.work is not None
    return call.work


def _size(work: Work) -> int:
    return work.task.shard.size_bytes
