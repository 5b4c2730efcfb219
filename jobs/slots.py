"""The places of the pool, whose actors come and go: started, loaded, lost, probed, given up. Knows no shards."""

from __future__ import annotations

import heapq
import itertools
import logging
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from jobs.cluster import ClusterError

log = logging.getLogger(__name__)
PROBE_EVERY_S = 1.0
MAX_FAILED_STARTS = 3  # of a slot that never had an actor that loaded
MAX_START_PAUSE_S = 60.0


class State(Enum):
    EMPTY = "empty"  # an actor is to be started
    STARTING = "starting"
    READY = "ready"
    AWAY = "away"  # cannot be reached just now


class Starter(Protocol):
    def start(self) -> Any: ...
    def load(self, actor: Any) -> Any: ...
    def ping(self, actor: Any) -> Any: ...
    def watch(self, actor: Any) -> Any: ...


@dataclass
class Slot:
    """One place in the pool; its actor may be replaced. `node`: where its last loaded actor was. `leaving`: that node
    will be gone soon. `deaths`: in a row, without a finished shard between."""

    name: str
    state: State = State.EMPTY
    actor: Any = None
    node: str = ""
    leaving: bool = False
    deaths: int = 0
    failed_starts: int = 0
    has_loaded: bool = False
    act_at: float = math.inf  # when to start, probe or watch; infinite while an answer is awaited


class Slots:
    """All of them. `now` is the clock, in seconds."""

    def __init__(self, number: int, actors: Starter, now: Callable[[], float]) -> None:
        self._slots: list[Slot] = []
        self._actors, self._now, self._num_made = actors, now, 0
        # A heap of (when, number of the entry, slot), the nearest first: of a thousand slots a few are due. An entry
        # whose slot is to act at another time by now counts no more.
        self._acts: list[tuple[float, int, Slot]] = []
        self._entries = itertools.count()
        self.last_loss = ""  # why
        self._add(number)

    def __iter__(self) -> Iterator[Slot]:
        return iter(tuple(self._slots))

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def due_at(self) -> float:
        """When `act` has something to do."""
        return self._acts[0][0] if self._acts else math.inf

    def act(self) -> list[tuple[Slot, Any]]:
        """Start, probe and watch what is due; the slots, each with its call."""
        due = []
        while self._now() >= self.due_at:
            when, _, slot = heapq.heappop(self._acts)
            if when == slot.act_at:
                slot.act_at = math.inf
                due.append(slot)
        return [(slot, self._call(slot)) for slot in due]

    def grow(self, fitting: int, at_most: int) -> None:
        """To as many as fit on the cluster now, if those are more; one that was given up is not made again."""
        number = min(fitting - self._num_made, at_most)
        if number > 0:
            log.info("the cluster has room for more actors now, asked for: %d", number)
            self._add(number)

    def _add(self, number: int) -> None:
        for n in range(self._num_made, self._num_made + number):
            self._slots.append(slot := Slot(f"actor-{n}"))
            self._act_at(slot, self._now())
        self._num_made += number

    def _act_at(self, slot: Slot, when: float) -> None:
        slot.act_at = when
        heapq.heappush(self._acts, (when, next(self._entries), slot))

    def _call(self, slot: Slot) -> Any:
        if slot.state is State.READY:
            return self._actors.watch(slot.actor)
        return self._actors.ping(slot.actor) if slot.state is State.AWAY else self._start(slot)

    def _start(self, slot: Slot) -> Any:
        slot.actor, slot.state, slot.leaving = self._actors.start(), State.STARTING, False
        return self._actors.load(slot.actor)

    def answered(self, slot: Slot, node: str) -> None:
        slot.state, slot.node, slot.has_loaded = State.READY, node, True
        self._act_at(slot, self._now())

    def away(self, slot: Slot, message: str) -> None:
        if slot.state is not State.AWAY:
            log.warning("%s cannot be reached: %s", slot.name, message)
        slot.state = State.AWAY
        self._act_at(slot, self._now() + PROBE_EVERY_S)

    def leave(self, nodes: Collection[str]) -> None:
        """These nodes are about to go."""
        for slot in self._slots:
            if slot.state is State.READY and slot.node in nodes and not slot.leaving:
                log.warning("%s gets no more shards: its node is about to go", slot.name)
                slot.leaving = True

    def lost(self, slot: Slot, message: str, *, blameless: bool) -> None:
        """Its actor is gone. Another is started: at once the first time, then later and later. Raises ClusterError
        when no slot is left that has not been given up."""
        self.last_loss = message
        slot.failed_starts += slot.state is State.STARTING and not blameless
        slot.deaths += not blameless
        slot.actor, slot.state, slot.leaving = None, State.EMPTY, False  # None: its last words are not heard
        self._act_at(slot, self._now() + (0.0 if blameless else _pause_s(slot.deaths)))
        if slot.failed_starts >= MAX_FAILED_STARTS and not slot.has_loaded:
            self._retire(slot, message)

    def _retire(self, slot: Slot, message: str) -> None:
        """The run goes on with the other slots, if there are any."""
        self._slots.remove(slot)
        slot.act_at = math.inf
        if not self._slots:
            raise ClusterError(f"{slot.name} died {slot.failed_starts} times while it started: {message}")
        log.warning("%s is given up after %d failed starts", slot.name, slot.failed_starts)


def _pause_s(deaths: int) -> float:
    return min(MAX_START_PAUSE_S, 2.0 ** min(deaths - 1, 10) - 1)
