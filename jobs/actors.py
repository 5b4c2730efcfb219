"""The pool of tokenising actors: hand out shards, judge what became of each call, stop the hung.

dispatch.py decides who gets what, lateness.py what is late, slots.py starts and replaces actors, calls.py keeps who is
at what, ray_actors.py is Ray. What is done for each shard costs the same however many actors there are; what looks at
all of them is done by the clock.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from jobs.calls import Call, Calls
from jobs.dispatch import Dispatch, GivenUp, Work
from jobs.lateness import Lateness
from jobs.pool_settings import PoolSettings
from jobs.ray_actors import Died, Outcome, Raised, Unreachable
from jobs.slots import Slot, Slots, Starter, State
from jobs.tokenize_actor import SignOfLife
from jobs.waiting import Every, Head, Waiting
from model.config import ModelError
from pipeline import storage
from pipeline.errors import PipelineError, PublishFailed, ShardError, StorageError
from pipeline.plan import ShardTask
from pipeline.records import FailureReason, ShardResult
from pipeline.stage_times import StageTimes

log = logging.getLogger(__name__)
POLL_S = 0.5
LOOK_EVERY_S = 1.0  # at all actors: who hangs, who is late, who is to leave
ASK_EVERY_S = 2.0  # the head: which nodes are about to go, what there is
GROW_EVERY_S = 10.0
LAST_WORDS_S = 5.0  # how long to wait for killed actors to be gone
AWAY = "actor_away"  # through no fault of a shard: its node went, or could not be reached
_REASONS = {
    "truncated": FailureReason.SHARD_TRUNCATED,
    "damaged": FailureReason.SHARD_DAMAGED,
    "unreadable": FailureReason.SHARD_UNREADABLE,
    "changed": FailureReason.SHARD_CHANGED,
    "crashed": FailureReason.SHARD_CRASHED,
}


class Actors(Starter, Protocol):
    """What the pool asks of Ray (RayActors)."""

    def tokenize(self, actor: Any, task: ShardTask, delay_s: float) -> Any: ...
    def kill(self, actor: Any) -> None: ...
    def wait(self, calls: Collection[Any], timeout_s: float) -> list[Any]: ...
    def outcome(self, call: Any) -> Outcome: ...
    def draining_nodes(self) -> Collection[str] | None: ...
    def fitting(self) -> int: ...
    def shards_in_flight(self, num_actors: int) -> int | None: ...
    def resources(self) -> str: ...


class ActorPool:
    """Actors for a `with` block, in which any number of Dispatches may be run, one after another."""

    def __init__(self, actors: Actors, settings: PoolSettings, now: Callable[[], float] = time.monotonic) -> None:
        self._actors, self._settings, self._now = actors, settings, now
        self._dispatch = Dispatch((), attempts=1, in_flight_limit=1)
        self._slots = Slots(settings.num_actors, actors, now)
        self._lateness = Lateness(settings, now)
        self._waiting = Waiting(settings, now, actors.resources)
        self.times = StageTimes()  # of all actors, in all runs; so are the next three, by reason
        self.failed_images: Counter[str] = Counter()  # of shards that are done
        self.failed_attempts: Counter[str] = Counter()
        self.lost_actors: Counter[str] = Counter()
        self._head = Head(now)
        self._calls = Calls()
        self._most_in_flight = settings.num_actors * settings.shards_in_flight  # of all actors together, so far
        self._roomy: dict[str, Slot] = {}  # those that may have room for a shard, by name
        self._ever_ready = False
        self._look, self._ask = Every(LOOK_EVERY_S, now), Every(ASK_EVERY_S, now)
        self._grow = Every(GROW_EVERY_S, now)

    def __enter__(self) -> ActorPool:
        self._act()
        return self

    def __exit__(self, *_: object) -> None:
        """Returns when the actors are gone, so that whoever tidies up after them has the last word."""
        for slot in self._slots:
            if slot.actor is not None:
                self._actors.kill(slot.actor)
        until = self._now() + LAST_WORDS_S
        while self._calls and self._now() < until:
            for ref in self._actors.wait(self._calls.refs(), POLL_S):
                self._calls.pop(ref)

    def num_by_state(self) -> Counter[str]:
        """Of the actors' places; every state is there."""
        numbers = Counter({state.value: 0 for state in State})
        numbers.update(slot.state.value for slot in self._slots)
        return numbers

    def run(self, dispatch: Dispatch, check: Callable[[], None] = lambda: None) -> Iterator[ShardResult | GivenUp]:
        """What became of each shard, as it becomes known. Raises ClusterError when no actor can be had, what the
        tokenizer's loading raises, and what `check` raises, which is called before anything is handed out."""
        self._dispatch, self._roomy = dispatch, {slot.name: slot for slot in self._slots}
        while not self._dispatch.finished:
            check()
            self._act()
            self._hand_out()
            for ref in self._actors.wait(self._calls.refs(), POLL_S):
                yield from self._hear(self._calls.pop(ref), self._actors.outcome(ref))
            if self._look.is_due():
                yield from self._look_at_all()

    def _act(self) -> None:
        if self._now() >= self._slots.due_at:
            for slot, ref in self._slots.act():
                self._calls.add(ref, Call(slot, slot.actor, self._now()))

    def _look_at_all(self) -> Iterator[GivenUp]:
        yield from self._stop_hung()
        if self._ask.is_due():
            self._ask_head()
        yield from self._leave_draining_nodes()
        self._help_stragglers()

    def _ask_head(self) -> None:
        """One question first, which has a time limit: all others wait for a head that is gone until Ray ends us."""
        draining = self._head.ask(self._actors.draining_nodes)
        if draining is None:
            return
        self._slots.leave(draining)
        if self._grow.is_due():
            self._follow_cluster()
        self._waiting.check(any(slot.state is State.READY for slot in self._slots), self._slots.last_loss)

    def _follow_cluster(self) -> None:
        """More actors where there is room for them, and more shards for each where more can be decoded."""
        if self._settings.elastic:
            self._slots.grow(self._actors.fitting(), self._dispatch.num_waiting)
        befits = self._actors.shards_in_flight(len(self._slots))
        if befits is not None and (limit := self._as_many_as_ever(befits)) != self._dispatch.in_flight_limit:
            log.info("the cluster that decodes has changed: %d shards in flight for each actor", limit)
            self._dispatch.in_flight_limit = limit
            self._roomy = {slot.name: slot for slot in self._slots}

    def _as_many_as_ever(self, befits: int) -> int:
        """For each actor, so that all together have no fewer than at any time: what a lost node worked at waits, and
        a cluster that can grow sees what is asked for, and brings another."""
        number = len(self._slots)
        self._most_in_flight = max(self._most_in_flight, befits * number)
        return min(self._most_in_flight // number, self._settings.most_in_flight)

    def _hand_out(self) -> None:
        """A shard to each actor in turn, so that few shards spread over all."""
        given = True
        while given and not self._dispatch.nothing_waits:
            given = False
            for slot in tuple(self._roomy.values()):
                if not self._is_free(slot):
                    del self._roomy[slot.name]  # until its next call ends
                elif (work := self._dispatch.next_for(slot.name)) is not None:
                    self._give(slot, work, self._pause_s(work))
                    given = True

    def _is_free(self, slot: Slot) -> bool:
        """An actor that is still at work on what nobody waits for gets nothing more: it may hang on it."""
        ready = slot.state is State.READY and not slot.leaving and self._dispatch.has_room(slot.name)
        return ready and all(map(self._is_awaited, self._calls.shards_of(slot)))

    def _help_stragglers(self) -> None:
        if not self._dispatch.nothing_waits:
            return
        if not (stragglers := self._lateness.late(filter(self._is_awaited, self._calls.shards()))):
            return
        for slot in filter(self._is_free, self._slots):
            if (work := self._dispatch.second_for(slot.name, stragglers)) is not None:
                log.info("%s takes long: %s tries it too", _shown(work), slot.name)
                self._give(slot, work, 0.0)

    def _give(self, slot: Slot, work: Work, delay_s: float) -> None:
        ref = self._actors.tokenize(slot.actor, work.task, delay_s)
        self._calls.add(ref, Call(slot, slot.actor, self._now(), work, delay_s))

    def _pause_s(self, work: Work) -> float:
        return self._settings.retry_pause_s * 2 ** (work.charged - 1) if work.charged else 0.0

    def _is_awaited(self, call: Call) -> bool:
        """Not when the shard was finished elsewhere, or went back to the queue."""
        return call.work is not None and call.is_current and self._dispatch.holds(call.slot.name, call.work)

    def _hear(self, call: Call, outcome: Outcome) -> Iterator[ShardResult | GivenUp]:
        if not call.is_current:
            return  # the last words of an actor that was replaced
        self._roomy[call.slot.name] = call.slot
        if isinstance(outcome, Raised):
            yield from self._raised(call, outcome.error)
        elif isinstance(outcome, Died):
            blameless = outcome.with_node or call.slot.leaving
            yield from self._lost(call.slot, outcome.message, blameless=blameless)
        elif isinstance(outcome, Unreachable):
            self._slots.away(call.slot, outcome.message)
            self.failed_attempts[AWAY] += len(self._dispatch.held_by(call.slot.name))
            yield from self._dispatch.actor_away(call.slot.name)
        elif isinstance(outcome.value, ShardResult):
            self.times += outcome.times
            self._say(call.slot.name, outcome.note)
            yield from self._finished(call, outcome.value, outcome.failed_images)
        else:
            yield from self._shows_life(call.slot, outcome.value)

    def _finished(self, call: Call, result: ShardResult, failed_images: Mapping[str, int]) -> Iterator[ShardResult]:
        if call.work is not None and self._is_awaited(call):
            self.failed_images.update(failed_images)
            call.slot.deaths = 0
            self._lateness.note(call)
            self._dispatch.done(call.slot.name, call.work)
            yield replace(result, attempts=call.work.charged + 1)

    def _say(self, name: str, note: str) -> None:
        if note:
            log.warning("%s: %s", name, note)

    def _shows_life(self, slot: Slot, sign: SignOfLife) -> Iterator[GivenUp]:
        """It has its tokenizer, or can be reached again, or is just still there."""
        self._ever_ready = True
        if slot.state is State.READY or (sign.loaded and not sign.num_open):
            self._slots.answered(slot, sign.node)
        else:  # what it was at when it went away is done elsewhere by now
            yield from self._lost(slot, "it was away, and is still busy", blameless=True)

    def _raised(self, call: Call, error: Exception) -> Iterator[GivenUp]:
        """A shard or the store at fault is a failed attempt; anything else puts the actor itself in doubt (a CUDA
        error sticks to its process), so it is replaced, and its shards are tried again alone."""
        message = storage.public_text(f"{type(error).__name__}: {error}")
        if call.work is None:
            if not self._ever_ready and isinstance(error, PipelineError | ModelError):
                raise error  # no such checkpoint: all actors will say the same
            yield from self._lost(call.slot, f"it could not load its tokenizer: {message}")
        elif not isinstance(error, ShardError | StorageError | OSError):
            yield from self._lost(call.slot, message)
        elif self._is_awaited(call):
            log.warning("%s failed (attempt %d): %s", _shown(call.work), call.work.charged + 1, message)
            self.failed_attempts[_reason(error).value] += 1
            given_up = self._dispatch.failed(call.slot.name, call.work, _reason(error), message)
            if given_up is not None and isinstance(error, PublishFailed):
                raise error  # it would quarantine every good shard, one after another: rather stop, and go on later
            yield from () if given_up is None else (given_up,)

    def _lost(
        self, slot: Slot, message: str, culprits: Sequence[Work] = (), *, blameless: bool = False
    ) -> Iterator[GivenUp]:
        held = self._dispatch.held_by(slot.name)
        log.warning(
            "%s is replaced while it held %s: %s", slot.name, ", ".join(map(_shown, held)) or "no shard", message
        )
        self._actors.kill(slot.actor)  # also one that Ray calls dead: its node may only be cut off
        reason = FailureReason.SHARD_TIMED_OUT if culprits else FailureReason.SHARD_CRASHED
        self.lost_actors[AWAY if blameless else reason.value] += 1
        for work in held:
            innocent = blameless or (culprits and work not in culprits)
            self.failed_attempts[AWAY if innocent else reason.value] += 1
        if blameless:
            yield from self._dispatch.actor_away(slot.name)
        else:
            yield from self._dispatch.actor_lost(slot.name, reason, message, culprits)
        self._slots.lost(slot, message, blameless=blameless)

    def _stop_hung(self) -> Iterator[GivenUp]:
        """Kill an actor that holds a shard past its deadline; the hung shard is charged, its neighbours are not."""
        for calls in self._lateness.hung(self._calls.shards()):
            culprits = [call.work for call in calls if call.work is not None and self._is_awaited(call)]
            message = f"no result after {self._lateness.age_s(calls[0]):.0f} s"
            yield from self._lost(calls[0].slot, message, culprits, blameless=not culprits)

    def _leave_draining_nodes(self) -> Iterator[GivenUp]:
        """Actors there get nothing new, finish what they hold, and are started again elsewhere."""
        for slot in self._slots:
            if slot.leaving and slot.state is State.READY and not self._dispatch.held_by(slot.name):
                yield from self._lost(slot, "its node is about to go", blameless=True)


def _shown(work: Work) -> str:
    return storage.public_url(work.task.shard.url)


def _reason(error: Exception) -> FailureReason:
    return _REASONS[error.reason] if isinstance(error, ShardError) else FailureReason.SHARD_UNREADABLE
