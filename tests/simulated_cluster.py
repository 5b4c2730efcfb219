"""A cluster of many GPUs in simulated time, in place of RayActors: thousands of actors, millions of shards, and nothing
is done for any of them. What a call costs here is the logarithm of the calls that are open, whatever else there is.

Each actor works its shards off one after another, at a pace of its own. Nodes of eight actors come and go. What differs
from simulated_actors.py: that one is for faults, one by one, and looks at everything at every step.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import random
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any, Concatenate, ParamSpec, TypeVar

from bench_driver import done
from jobs.ray_actors import Answer, Died, Outcome
from jobs.tokenize_actor import SignOfLife
from pipeline.plan import ShardTask

ACTORS_A_NODE = 8
LOAD_S = 60.0  # to start a process and load a model
WATCH_S = 30.0
BYTES_A_SECOND = 60e6  # of one actor: 1,700 images of 35 KB
UNEVEN_PACE = 0.1  # actors differ by so much
NEVER = math.inf
P, T = ParamSpec("P"), TypeVar("T")


@dataclass(eq=False, slots=True)
class Actor:
    number: int
    bytes_a_second: float
    alive: bool = True
    placed: bool = False
    free_at: float = 0.0
    calls: set[Call] = field(default_factory=set)


@dataclass(eq=False, slots=True)
class Call:
    actor: Actor
    ends: float
    outcome: Outcome


def _own_cost(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Counts the processor's time that the simulation takes for itself."""

    @functools.wraps(method)
    def counted(self: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        began = time.thread_time()
        try:
            return method(self, *args, **kwargs)
        finally:
            self.own_cpu_s += time.thread_time() - began

    return counted


class SimulatedCluster:
    """`room`: for how many actors there is place; others wait for it."""

    def __init__(self, room: int, seed: int = 0, bytes_a_second: float = BYTES_A_SECOND) -> None:
        self.time, self.own_cpu_s, self.room = 0.0, 0.0, room
        self._random, self._bytes_a_second = random.Random(seed), bytes_a_second
        self._numbers, self._order = itertools.count(), itertools.count()
        self._events: list[tuple[float, int, Call | Callable[[], None]]] = []
        self._placed: set[Actor] = set()
        self._homeless: deque[Actor] = deque()

    def now(self) -> float:
        return self.time

    def at(self, when: float, deed: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), deed))

    # what may happen

    def add(self, number: int) -> None:
        """There is room for so many more actors."""
        self.room += number
        self._place()

    def lose(self, number: int) -> None:
        """So many actors die, each with its node."""
        self.room -= number
        for actor in self._random.sample(sorted(self._placed, key=lambda actor: actor.number), number):
            self._die(actor, Died("its node has died", with_node=True))

    # what the pool asks for

    @_own_cost
    def start(self) -> Actor:
        pace = self._bytes_a_second * (1 + UNEVEN_PACE * self._random.uniform(-1, 1))
        return Actor(next(self._numbers), pace)

    @_own_cost
    def load(self, actor: Actor) -> Call:
        call = self._call(actor, NEVER, Answer(SignOfLife(self._node(actor), True, 0)))
        self._homeless.append(actor)
        self._place()
        return call

    @_own_cost
    def ping(self, actor: Actor) -> Call:
        return self._call(actor, self.time + 0.01, Answer(SignOfLife(self._node(actor), True, 0)))

    @_own_cost
    def watch(self, actor: Actor) -> Call:
        return self._call(actor, self.time + WATCH_S, Answer(SignOfLife(self._node(actor), True, 0)))

    @_own_cost
    def tokenize(self, actor: Actor, task: ShardTask, delay_s: float) -> Call:
        begins = max(actor.free_at, self.time + delay_s)
        actor.free_at = begins + task.shard.size_bytes / actor.bytes_a_second
        return self._call(actor, actor.free_at, Answer(replace(done(task), seconds=actor.free_at - begins)))

    @_own_cost
    def kill(self, actor: Actor) -> None:
        self._die(actor, Died("killed"))

    @_own_cost
    def wait(self, calls: Collection[Any], timeout_s: float) -> list[Call]:
        """One at a time, unless several end at the very same moment."""
        ended: list[Call] = []
        until = self.time + timeout_s
        while self._events and self._events[0][0] <= until:
            when, _, event = heapq.heappop(self._events)
            self.time = max(self.time, when)
            if not isinstance(event, Call):
                event()
            elif when == event.ends:  # else it was put off, or ended sooner
                event.actor.calls.discard(event)
                ended.append(event)
                until = self.time
        self.time = max(self.time, until)
        return ended

    def outcome(self, call: Call) -> Outcome:
        return call.outcome

    def draining_nodes(self) -> Collection[str]:
        return ()

    def fitting(self) -> int:
        return self.room

    def shards_in_flight(self, num_actors: int) -> int | None:
        return None

    def resources(self) -> str:
        return f"{self.room} GPUs"

    def _node(self, actor: Actor) -> str:
        return f"node-{actor.number // ACTORS_A_NODE}"

    def _call(self, actor: Actor, ends: float, outcome: Outcome) -> Call:
        call = Call(actor, ends, outcome) if actor.alive else Call(actor, self.time, Died("the actor is dead"))
        actor.calls.add(call)
        if call.ends < NEVER:
            heapq.heappush(self._events, (call.ends, next(self._order), call))
        return call

    def _place(self) -> None:
        """Who waits gets what room there is, and loads."""
        while self._homeless and len(self._placed) < self.room:
            actor = self._homeless.popleft()
            if actor.alive:
                self._placed.add(actor)
                loaded = LOAD_S * (1 + UNEVEN_PACE * self._random.random())
                for call in actor.calls:
                    self._ends(call, self.time + loaded)

    def _ends(self, call: Call, when: float) -> None:
        call.ends = when
        heapq.heappush(self._events, (when, next(self._order), call))

    def _die(self, actor: Actor, how: Died) -> None:
        actor.alive = False
        self._placed.discard(actor)
        for call in actor.calls:
            call.outcome = how
            self._ends(call, self.time)
        self._place()
