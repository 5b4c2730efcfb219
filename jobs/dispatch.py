"""Which shard goes to which actor, and when one is given up. Pure bookkeeping: no Ray, no clock, no I/O.

A shard whose actor died is a *suspect* and is tried again alone, so that a poison shard doesn't burn the attempts
of the innocent one beside it. Only what is surely a shard's own fault is charged to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from pipeline.plan import ShardTask
from pipeline.records import FailureReason

MAX_UNCHARGED = 20  # times that a shard may come back without its own fault before it is charged all the same


@dataclass(frozen=True)
class Work:
    """A shard on its way, and what has befallen it."""

    task: ShardTask
    charged: int = 0
    uncharged: int = 0
    alone: bool = False


@dataclass(frozen=True)
class GivenUp:
    """A shard to be quarantined."""

    work: Work
    reason: FailureReason
    message: str


class Dispatch:
    """The queue, and who holds what. Actors are known by any hashable name."""

    def __init__(self, tasks: Iterable[ShardTask], *, attempts: int, in_flight_limit: int) -> None:
        self._queue = deque(Work(task) for task in tasks)
        self._suspects: deque[Work] = deque()
        self._attempts, self._limit = attempts, in_flight_limit
        self._held: dict[str, list[Work]] = {}
        self._draining: str | None = None  # this actor gets nothing new until it is idle and takes a suspect

    @property
    def finished(self) -> bool:
        return not self._queue and not self._suspects and not any(self._held.values())

    def held_by(self, actor: str) -> list[Work]:
        return list(self._held.get(actor, ()))

    def next_for(self, actor: str) -> Work | None:
        """The next shard for this actor, which then holds it; None when it should get nothing now."""
        held = self._held.setdefault(actor, [])
        if any(work.alone for work in held) or len(held) >= self._limit:
            return None
        if self._suspects and self._may_take_suspect(actor, busy=bool(held)):
            return self._hold(actor, self._suspects.popleft())
        if self._draining == actor or not self._queue:
            return None
        return self._hold(actor, self._queue.popleft())

    def _may_take_suspect(self, actor: str, *, busy: bool) -> bool:
        if busy:
            self._draining = self._draining or actor
            return False
        self._draining = None  # also when it was another: it would wait for ever for a suspect that is gone
        return True

    def _hold(self, actor: str, work: Work) -> Work:
        self._held[actor].append(work)
        return work

    def done(self, actor: str, work: Work) -> None:
        self._held[actor].remove(work)

    def failed(self, actor: str, work: Work, reason: FailureReason, message: str) -> GivenUp | None:
        """The shard itself failed while its actor lives: charge it, and try again behind the others."""
        self._held[actor].remove(work)
        return self._charge(work, reason, message, self._suspects if work.alone else self._queue)

    def actor_lost(
        self, actor: str, reason: FailureReason, message: str, culprits: Iterable[Work] = ()
    ) -> list[GivenUp]:
        """The actor died with all that it held. Alone, or named a culprit, a shard is charged; the others are not,
        and become suspects unless a culprit is known."""
        held, named = self._held.pop(actor, []), list(culprits)
        self._draining = None if self._draining == actor else self._draining
        guilty = named or (held if len(held) == 1 else [])
        given_up = [self._charge(replace(w, alone=True), reason, message, self._suspects) for w in held if w in guilty]
        for work in (w for w in held if w not in guilty):
            given_up.append(self._return(work, suspect=not named, reason=reason, message=message))
        return [one for one in given_up if one is not None]

    def actor_away(self, actor: str) -> list[GivenUp]:
        """The actor cannot be reached just now: its shards go back to the front, and nothing is charged."""
        held = self._held.pop(actor, [])
        self._draining = None if self._draining == actor else self._draining
        reason, message = FailureReason.SHARD_CRASHED, "its actors went away again and again"
        returned = (self._return(work, suspect=False, reason=reason, message=message) for work in held)
        return [one for one in returned if one is not None]

    def _charge(self, work: Work, reason: FailureReason, message: str, queue: deque[Work]) -> GivenUp | None:
        work = replace(work, charged=work.charged + 1)
        if work.charged >= self._attempts:
            return GivenUp(work, reason, message)
        queue.append(work)
        return None

    def _return(self, work: Work, *, suspect: bool, reason: FailureReason, message: str) -> GivenUp | None:
        if work.uncharged >= MAX_UNCHARGED:
            return self._charge(replace(work, alone=True), reason, message, self._suspects)
        work = replace(work, uncharged=work.uncharged + 1, alone=work.alone or suspect)
        if work.alone:
            self._suspects.append(work)
        else:
            self._queue.appendleft(work)
        return None
