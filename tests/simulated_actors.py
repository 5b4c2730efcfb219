"""Actors in simulated time: what RayActors is to the pool, without Ray and without waiting. Each shard has a nature,
actors can be killed, cut off, or be told that their node will go, at any moment."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from jobs.cluster import GCS_TIMEOUT_S
from jobs.pool_settings import PoolSettings
from jobs.ray_actors import Answer, Died, Outcome, Raised, Unreachable
from jobs.tokenize_actor import SignOfLife
from pipeline.errors import PublishFailed, ShardTruncated
from pipeline.plan import ShardTask
from pipeline.records import ShardResult, ShardState

LOAD_S = 3.0
NEVER = math.inf


@dataclass(eq=False)
class Actor:
    name: str
    node: str
    alive: bool = True
    loaded: bool = False
    away_until: float = 0.0
    calls: list[Call] = field(default_factory=list)


@dataclass(eq=False)
class Call:
    actor: Actor
    ends: float
    outcome: Outcome
    effect: Callable[[], None] = lambda: None
    is_shard: bool = False
    heard: bool = False


def settings(num_actors: int, in_flight: int = 2, deadline_s: float | None = None) -> PoolSettings:
    return PoolSettings(num_actors, 0, 1, in_flight, wait_s=300, shard_deadline_s=deadline_s, retry_pause_s=1)


class SimulatedActors:
    """`seconds(task, attempt)` says how long a shard takes; `nature(task)`: good, raises, poison, breaks, hangs,
    cannot publish."""

    def __init__(
        self,
        nature: Callable[[ShardTask], str] = lambda task: "good",
        seconds: Callable[[ShardTask, int], float] = lambda task, attempt: 1.0,
        seed: int = 0,
    ) -> None:
        self.time = 0.0
        self.rng = random.Random(seed)
        self.actors: list[Actor] = []
        self.draining: set[str] = set()
        self.headless_until = -NEVER
        self.accidents: list[tuple[float, Callable[[SimulatedActors], None]]] = []
        self.given: list[tuple[float, str, str]] = []  # when, shard, actor
        self.killed: list[str] = []
        self.most_open = 0
        self.room = 0  # how many actors fit on the cluster
        self.each: int | None = None  # how many shards for each actor befit it; None: it does not change
        self._nature, self._seconds = nature, seconds
        self._numbers = itertools.count()

    def now(self) -> float:
        return self.time

    # what the pool asks for

    def start(self) -> Actor:
        number = next(self._numbers)
        nodes = [node for node in ("n0", "n1", "n2") if node not in self.draining]
        actor = Actor(f"process-{number}", nodes[number % len(nodes)])
        self.actors.append(actor)
        return actor

    def load(self, actor: Actor) -> Call:
        def loaded() -> None:
            actor.loaded = True

        return self._call(actor, LOAD_S, Answer(SignOfLife(actor.node, True, 0)), loaded)

    def ping(self, actor: Actor) -> Call:
        return self._call(actor, 0.01, Answer(SignOfLife(actor.node, actor.loaded, self.num_open(actor))))

    def watch(self, actor: Actor) -> Call:
        return self._call(actor, 30.0, Answer(SignOfLife(actor.node, actor.loaded, self.num_open(actor))))

    def tokenize(self, actor: Actor, task: ShardTask, delay_s: float) -> Call:
        attempt = sum(shard == task.shard.url for _, shard, _ in self.given)
        self.given.append((self.time, task.shard.url, actor.name))
        call = self._call(actor, delay_s + self._seconds(task, attempt), Answer(_result(task)), is_shard=True)
        match self._nature(task):
            case "raises":
                call.outcome = Raised(ShardTruncated(task.shard.url, "cut"))
            case "cannot publish":
                call.outcome = Raised(PublishFailed("cannot write memory://full/tokens: no space is left"))
            case "breaks":
                call.outcome = Raised(RuntimeError("CUDA error: an illegal memory access was encountered"))
            case "poison":
                call.effect = lambda: self.die(actor, "The actor died unexpectedly")
            case "hangs":
                call.ends = NEVER
        self.most_open = max(self.most_open, self.num_open(actor))
        return call

    def kill(self, actor: Actor) -> None:
        self.killed.append(actor.name)
        self.die(actor, "killed")

    def wait(self, calls: Collection[Call], timeout_s: float) -> list[Call]:
        until = min([self.time + timeout_s, *(max(call.ends, self.time) for call in calls)])
        while self.accidents and self.accidents[0][0] <= until:
            self.time, accident = self.accidents.pop(0)
            accident(self)
        self.time = max(self.time, until)
        for call in [call for actor in self.actors for call in actor.calls if call.ends <= self.time]:
            if call.actor.alive:
                call.effect()
            call.actor.calls.remove(call)
        return [call for call in calls if call.ends <= self.time]

    def outcome(self, call: Call) -> Outcome:
        assert call.ends <= self.time and not call.heard
        call.heard = True
        return call.outcome

    def draining_nodes(self) -> Collection[str] | None:
        if self.time < self.headless_until:
            self.time += GCS_TIMEOUT_S
            return None
        return self.draining

    def fitting(self) -> int:
        return self.room

    def shards_in_flight(self, num_actors: int) -> int | None:
        assert self.time >= self.headless_until, "this would never come back"
        return self.each

    def resources(self) -> str:
        assert self.time >= self.headless_until, "this would never come back"
        return "8 CPUs"

    # what may happen

    def living(self) -> list[Actor]:
        return [actor for actor in self.actors if actor.alive]

    def num_open(self, actor: Actor) -> int:
        return sum(call.is_shard for call in actor.calls)

    def die(self, actor: Actor, message: str, *, with_node: bool = False) -> None:
        actor.alive = False
        for call in actor.calls:
            call.ends, call.outcome = self.time, Died(message, with_node)

    def cut_off(self, actor: Actor, seconds: float) -> None:
        """What it is at goes on, but nobody hears of it."""
        actor.away_until = self.time + seconds
        for call in tuple(actor.calls):
            unheard = Call(actor, call.ends, call.outcome, is_shard=call.is_shard)
            actor.calls.remove(call)
            actor.calls.append(unheard)
            call.ends, call.outcome = self.time, Unreachable("connection reset")

    def _call(
        self, actor: Actor, seconds: float, outcome: Outcome, effect: Callable[[], None] = lambda: None,
        is_shard: bool = False,
    ) -> Call:  # fmt: skip
        if not actor.alive:
            return Call(actor, self.time, Died("The actor is dead"))
        if self.time < actor.away_until:
            return Call(actor, self.time, Unreachable("connection refused"))
        call = Call(actor, self.time + seconds, outcome, effect, is_shard)
        actor.calls.append(call)
        return call


def _result(task: ShardTask) -> ShardResult:
    return ShardResult(task.shard.url, task.shard.size_bytes, task.shard.etag, ShardState.DONE, task.part)
