"""Which shard goes to which actor, and when one is given up. Pure bookkeeping: no Ray, no clock, no I/O.

A shard whose actor died is a *suspect* and is tried again alone, so that a poison shard doesn't burn the attempts
of the innocent one beside it. Only what is surely a shard's own fault is charged to it.

A straggler may be held by two actors, once in a run. Whoever finishes first wins; as long as one of the two holds
the shard, what befalls it at the other is of no account.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
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
    """The queue, and who holds what. Actors are known by any hashable name. `in_flight_limit` may change: an actor that
    holds more than that then gets nothing new."""

    def __init__(self, tasks: Sequence[ShardTask], *, attempts: int, in_flight_limit: int) -> None:
        self._tasks, self._next = tasks, 0  # a Work is made when a task's turn comes: there may be a million
        self._first: deque[Work] = deque()  # before the tasks that were never tried
        self._last: deque[Work] = deque()  # after them
        self._suspects: deque[Work] = deque()
        self._attempts, self.in_flight_limit = attempts, in_flight_limit
        self._held: dict[str, list[Work]] = {}  # of actors that hold something
        self._draining: str | None = None  # this actor gets nothing new until it is idle and takes a suspect
        self._tickets = 0
        self._holders: dict[str, list[str]] = {}  # of shards that two actors hold, by part
        self._handed_twice: set[str] = set()  # parts; once in a run, or a poison shard might go round for ever

    @property
    def finished(self) -> bool:
        return self.nothing_waits and not self._held

    @property
    def nothing_waits(self) -> bool:
        """All that is left is held."""
        return self.num_waiting == 0

    @property
    def num_waiting(self) -> int:
        return len(self._tasks) - self._next + len(self._first) + len(self._last) + len(self._suspects)

    @property
    def num_held(self) -> int:
        """Given out; a straggler that two actors hold counts twice."""
        return sum(map(len, self._held.values()))

    def has_room(self, actor: str) -> bool:
        """It might get another shard, if there is one for it."""
        held = self._held.get(actor, ())
        return len(held) < self.in_flight_limit and not any(work.alone for work in held)

    def holds(self, actor: str, work: Work) -> bool:
        return work in self._held.get(actor, ())

    def held_by(self, actor: str) -> list[Work]:
        return list(self._held.get(actor, ()))

    def next_for(self, actor: str) -> Work | None:
        """The next shard for this actor, which then holds it; None when it should get nothing now."""
        if not self.has_room(actor):
            return None
        if self._suspects and self._may_take_suspect(actor, busy=actor in self._held):
            return self._hold(actor, self._suspects.popleft())
        work = None if self._draining == actor else self._next_innocent()
        return None if work is None else self._hold(actor, work)

    def _next_innocent(self) -> Work | None:
        """The first of those that are no suspects."""
        if not self._first and self._next < len(self._tasks):
            self._next += 1
            return Work(self._tasks[self._next - 1])
        queue = self._first or self._last
        return queue.popleft() if queue else None

    def second_for(self, actor: str, stragglers: Iterable[Work]) -> Work | None:
        """One of these shards that others hold, for an actor that has nothing to do when nothing else is left. Not
        a suspect: it might take a second actor with it."""
        if not self.nothing_waits or actor in self._held:
            return None
        for work in stragglers:
            if not work.alone and work.task.part not in self._handed_twice:
                self._handed_twice.add(work.task.part)
                self._holders[work.task.part] = [*self._at(work.task.part), actor]
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
        holders = self._holders.pop(work.task.part, (actor,))
        for holder in holders:
            self._let_go(holder, work.task.part)

    def failed(self, actor: str, work: Work, reason: FailureReason, message: str) -> GivenUp | None:
        """The shard itself failed while its actor lives: charge it, and try again behind the others."""
        self._let_go(actor, work.task.part)
        if self._has_second_holder(work):
            return None
        return self._charge(work, reason, message, self._suspects if work.alone else self._last)

    def _at(self, part: str) -> list[str]:
        return [actor for actor, held in self._held.items() if any(work.task.part == part for work in held)]

    def _let_go(self, actor: str, part: str) -> None:
        left = [work for work in self._held[actor] if work.task.part != part]
        if left:
            self._held[actor] = left
        else:
            del self._held[actor]

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
        return self._holders.pop(work.task.part, None) is not None

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
            self._first.appendleft(work)
        return None
