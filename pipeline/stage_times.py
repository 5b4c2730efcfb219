"""Where a worker's time goes: wall seconds of each stage, and of how long its encoder and it had work at all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StageTimes:
    """The first four add up over the shards that are open at once; the last two are unions: time in which at least
    one of them was at it. Sums of these over workers and shards mean the same again."""

    read_s: float = 0.0  # waiting for bytes
    pixels_s: float = 0.0  # waiting for pixels, reading excluded
    encode_s: float = 0.0  # inside the encoder, waiting for other callers included
    write_s: float = 0.0  # making the part, and its PUTs
    model_busy_s: float = 0.0  # at least one call was inside the encoder
    open_s: float = 0.0  # at least one shard was open

    def __add__(self, other: StageTimes) -> StageTimes:
        # Field by field: `astuple` copies deeply, which took half of what a shard costs a driver.
        return StageTimes(
            self.read_s + other.read_s, self.pixels_s + other.pixels_s, self.encode_s + other.encode_s,
            self.write_s + other.write_s, self.model_busy_s + other.model_busy_s, self.open_s + other.open_s,
        )  # fmt: skip

    @property
    def encoder_busy(self) -> float:
        """The share of the time with open shards in which the encoder had work; 0 where there was none."""
        return self.model_busy_s / self.open_s if self.open_s else 0.0


class StageClock:
    """What the threads of one worker spend. `take` gives what came since the last `take`, so that any number of
    answers add up to all of it, also when a shard between them failed."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._lock = now, threading.Lock()
        self._sum = StageTimes()
        self._open, self._encoding = _Union(), _Union()

    @contextmanager
    def shard(self) -> Iterator[None]:
        """For the block, a shard is open."""
        with self._within(self._open):
            yield

    @contextmanager
    def encode(self) -> Iterator[None]:
        started = self._now()
        try:
            with self._within(self._encoding):
                yield
        finally:
            self.add(StageTimes(encode_s=self._now() - started))

    @contextmanager
    def write(self) -> Iterator[None]:
        started = self._now()
        try:
            yield
        finally:
            self.add(StageTimes(write_s=self._now() - started))

    def waited(self, seconds: float, reading_s: float) -> None:
        """For a batch; `reading_s`: how long whoever made it waited for bytes, perhaps while nobody waited for it."""
        read_s = min(seconds, reading_s)
        self.add(StageTimes(read_s=read_s, pixels_s=seconds - read_s))

    def add(self, times: StageTimes) -> None:
        with self._lock:
            self._sum += times

    def take(self) -> StageTimes:
        with self._lock:
            now, times = self._now(), self._sum
            self._sum = StageTimes()
            return times + StageTimes(model_busy_s=self._encoding.take(now), open_s=self._open.take(now))

    @contextmanager
    def _within(self, union: _Union) -> Iterator[None]:
        with self._lock:
            union.count(+1, self._now())
        try:
            yield
        finally:
            with self._lock:
                union.count(-1, self._now())


class _Union:
    """Seconds in which at least one was inside. Not for several threads by itself."""

    def __init__(self) -> None:
        self._inside, self._since, self._seconds = 0, 0.0, 0.0

    def count(self, change: int, now: float) -> None:
        self._settle(now)
        self._inside += change

    def take(self, now: float) -> float:
        self._settle(now)
        taken, self._seconds = self._seconds, 0.0
        return taken

    def _settle(self, now: float) -> None:
        self._seconds += now - self._since if self._inside else 0.0
        self._since = now
