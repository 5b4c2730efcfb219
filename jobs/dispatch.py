"""Which shard goes to which actor, and when one is given up. Pure bookkeeping: no Ray, no clock, no I/O.

A shard whose actor died is a *suspect* and is tried again alone, so that a poison shard doesn't burn the attempts
of the innocent one beside it. Only what is surely a shard's own fault is charged to it.

A straggler may be held by two actors, once in a run. Whoever finishes first wins; as long as one of the two holds
the shard, what befalls it at the other is of no account.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from pipeline.plan import ShardTask
from pipeline.records import FailureReason

MAX_UNCHARGED = 20  # times that a shard may come back without its own fault before it is charged all the same


@dataclass(frozen=True, slots=True)
class Work:
    """A shard on its way, and what has befallen it. `ticket`: a new one each time that it is handed out."""

    task: ShardTask
    charged: int = 0
    uncharged: int = 0
    alone: bool = False
    ticket: int = 0


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
        self._tickets = 0
        self._held_twice: set[str] = set()  # parts whose shard two actors hold
        self._handed_twice: set[str] = set()  # parts; once in a run, or a poison shard might go round for ever

    @property
    def finished(self) -> bool:
        return self.nothing_waits and not any(self._held.values())

    @property
    def nothing_waits(self) -> bool:
        """All that is left is held."""
        return not self._queue and not self._suspects

    def holds(self, actor: str, work: Work) -> bool:
        return work in self._held.get(actor, ())

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

    def second_for(self, actor: str, stragglers: Iterable[Work]) -> Work | None:
        """One of these shards that others hold, for an actor that has nothing to do when nothing else is left. Not
        a suspect: it might take a second actor with it."""
        if not self.nothing_waits or self._held.get(actor):
            return None
        for work in stragglers:
            if not work.alone and work.task.part not in self._handed_twice:
                self._handed_twice.add(work.task.part)
                self._held_twice.add(work.task.part)
                return self._hold(actor, work)
        return None

    def _may_take_suspect(self, actor: str, *, busy: bool) -> bool:
        if busy:
            self._draining = self._draining or actor
            return False
        self._draining = None  # also when it was another: it would wait for ever for a suspect that is gone
        return True

    def _hold(self, actor: str, work: Work) -> Work:
        self._tickets += 1
        work = replace(work, ticket=self._tickets)
        self._held.setdefault(actor, []).append(work)
        return work

    def done(self, actor: str, work: Work) -> None:
        self._held[actor].remove(work)
        if self._has_second_holder(work):
            for held in self._held.values():
                held[:] = [other for other in held if other.task.part != work.task.part]

    def failed(self, actor: str, work: Work, reason: FailureReason, message: str) -> GivenUp | None:
        """The shard itself failed while its actor lives: charge it, and try again behind the others."""
        self._held[actor].remove(work)
        if self._has_second_holder(work):
            return None
        return self._charge(work, reason, message, self._suspects if work.alone else self._queue)

    def actor_lost(
        self, actor: str, reason: FailureReason, message: str, culprits: Iterable[Work] = ()
    ) -> list[GivenUp]:
        """The actor died with all that it held. Alone, or named a culprit, a shard is charged; the others are not,
        and become suspects unless a culprit is known."""
        named = list(culprits)
        guilty = named or (self.held_by(actor) if len(self.held_by(actor)) == 1 else [])
        held = self._take_all(actor)
        given_up = [self._charge(replace(w, alone=True), reason, message, self._suspects) for w in held if w in guilty]
        for work in (w for w in held if w not in guilty):
            given_up.append(self._return(work, suspect=not named, reason=reason, message=message))
        return [one for one in given_up if one is not None]

    def actor_away(self, actor: str) -> list[GivenUp]:
        """The actor cannot be reached just now, or went through no fault of a shard's: its shards go back to the
        front, and nothing is charged."""
        held = self._take_all(actor)
        reason, message = FailureReason.SHARD_CRASHED, "its actors went away again and again"
        returned = (self._return(work, suspect=False, reason=reason, message=message) for work in held)
        return [one for one in returned if one is not None]

    def _take_all(self, actor: str) -> list[Work]:
        """What the actor held and nobody else does."""
        self._draining = None if self._draining == actor else self._draining
        return [work for work in self._held.pop(actor, []) if not self._has_second_holder(work)]

    def _has_second_holder(self, work: Work) -> bool:
        """Asked when one has let go of it, so that from now on there is one at most."""
        twice = work.task.part in self._held_twice
        self._held_twice.discard(work.task.part)
        return twice

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
