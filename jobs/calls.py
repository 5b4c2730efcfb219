"""The calls that are on their way, and which shards each actor is at. Pure bookkeeping: no Ray, no clock."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from jobs.dispatch import Work
from jobs.slots import Slot


@dataclass(frozen=True, eq=False)
class Call:
    """Made at `began`; `work` is None in a load, a ping or a watch. An actor waits `delay_s` before it begins."""

    slot: Slot
    actor: Any
    began: float
    work: Work | None = None
    delay_s: float = 0.0

    @property
    def is_current(self) -> bool:
        """Not one of an actor that was replaced since."""
        return self.actor is self.slot.actor


class Calls:
    """By Ray's reference, and those for shards by slot too, so that what concerns one slot costs the same however many
    there are."""

    def __init__(self) -> None:
        self._by_ref: dict[Any, Call] = {}
        self._shards: dict[str, dict[Any, Call]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_ref)

    def refs(self) -> Collection[Any]:
        return self._by_ref.keys()

    def add(self, ref: Any, call: Call) -> None:
        self._by_ref[ref] = call
        if call.work is not None:
            self._shards.setdefault(call.slot.name, {})[ref] = call

    def pop(self, ref: Any) -> Call:
        call = self._by_ref.pop(ref)
        if call.work is not None:
            self._shards[call.slot.name].pop(ref)
        return call

    def shards_of(self, slot: Slot) -> list[Call]:
        """Those that its actor is at."""
        return [call for call in self._shards.get(slot.name, {}).values() if call.is_current]

    def shards(self) -> list[Call]:
        """Of all actors."""
        return [call for calls in self._shards.values() for call in calls.values() if call.is_current]
