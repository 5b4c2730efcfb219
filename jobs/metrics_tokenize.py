"""What a tokenising driver tells of its run, from sums that it keeps anyway: by the clock, so that a shard costs next
to nothing, and once more at the end, so that the counters are those of the run."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from types import TracebackType

from jobs.actors import ActorPool
from jobs.dispatch import Dispatch
from jobs.metrics import TELL_EVERY_S, Meters
from jobs.progress import JobProgress
from jobs.recording import Recording
from jobs.waiting import Every
from pipeline.records import ShardResult, ShardState


def tell_no_actor(meters: Meters, num_waiting: int) -> None:
    """Before there is a pool: so many shards wait for a node that can hold an actor."""
    meters.set("tokenize_shards", num_waiting, state="waiting")
    meters.set("tokenize_actors", 0, state="ready")


class TokenizeMetrics:
    """For a `with` block. `now` is the clock, in seconds."""

    def __init__(
        self,
        meters: Meters,
        pool: ActorPool,
        dispatch: Dispatch,
        recording: Recording,
        progress: JobProgress,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._meters, self._pool, self._dispatch = meters, pool, dispatch
        self._recording, self._progress, self._now = recording, progress, now
        self._is_due = Every(TELL_EVERY_S, now).is_due
        self._ended_at = now()  # the newest shard, or the start
        self._ended: Counter[str] = Counter()  # shards, by state
        self._sums: Counter[str] = Counter()  # of those that are done
        self._seconds: list[float] = []  # of those that were not told yet: many at once cost less
        self._told: defaultdict[tuple[str, ...], float] = defaultdict(float)

    def __enter__(self) -> TokenizeMetrics:
        self._tell()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tell()

    def ended(self, row: ShardResult) -> None:
        """A shard was recorded."""
        self._ended_at = self._now()
        self._ended[row.state.value] += 1
        if row.state is ShardState.DONE:
            self._sums["tokenize_images"] += row.num_rows
            self._sums["tokenize_input_bytes"] += row.size_bytes
            self._sums["tokenize_output_bytes"] += row.part_bytes
            self._seconds.append(row.seconds)

    def look(self) -> None:
        """As often as one likes."""
        if self._is_due():
            self._tell()

    def _tell(self) -> None:
        self._tell_shards()
        self._tell_pool()
        self._tell_progress()

    def _tell_shards(self) -> None:
        for name, total in self._sums.items():
            self._count(name, total)
        for state, number in self._ended.items():
            self._count("tokenize_ended_shards", number, state=state)
        seconds, self._seconds = self._seconds, []
        for one in seconds:
            self._meters.observe("tokenize_shard_seconds", one)

    def _tell_pool(self) -> None:
        pool, times = self._pool, self._pool.times
        for name, by_reason in (
            ("tokenize_failed_images", pool.failed_images),
            ("tokenize_failed_attempts", pool.failed_attempts),
            ("tokenize_lost_actors", pool.lost_actors),
        ):
            for reason, total in by_reason.items():
                self._count(name, total, reason=reason)
        for stage in ("read", "pixels", "encode", "write"):
            self._count("tokenize_stage_seconds", getattr(times, f"{stage}_s"), stage=stage)
        self._count("tokenize_encoder_busy_seconds", times.model_busy_s)
        self._count("tokenize_open_seconds", times.open_s)
        for state, number in pool.num_by_state().items():
            self._meters.set("tokenize_actors", number, state=state)

    def _tell_progress(self) -> None:
        meters, totals, dispatch = self._meters, self._recording.totals, self._dispatch
        numbers = {
            "done": totals.num_done,
            "quarantined": totals.num_quarantined,
            "waiting": dispatch.num_waiting,
            "in_flight": dispatch.num_held,
        }
        for state, number in numbers.items():
            meters.set("tokenize_shards", number, state=state)
        meters.set("tokenize_failed_share", totals.failed_share)
        meters.set("tokenize_unwritten_rows", self._recording.num_unwritten)
        meters.set("tokenize_left_seconds", self._progress.left_s)
        meters.set("tokenize_silent_seconds", self._now() - self._ended_at)

    def _count(self, name: str, total: float, **labels: str) -> None:
        """Bring a counter up to a total."""
        key = (name, *labels.values())
        self._meters.add(name, total - self._told[key], **labels)
        self._told[key] = total
