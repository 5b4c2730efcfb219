"""The pool of tokenising actors: hand out shards, replace the dead, wait for the unreachable, stop the hung.

dispatch.py decides who gets what; this is the only place where tokenising meets Ray's handles and errors.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from jobs.cluster import SWITCH_INTERVAL_S, ClusterError, describe_resources
from jobs.dispatch import Dispatch, GivenUp, Work
from jobs.pool_settings import PoolSettings
from model.config import ModelError
from pipeline import storage
from pipeline.errors import PipelineError, ShardError, StorageError
from pipeline.plan import ShardTask
from pipeline.records import FailureReason, ImageTokenizer, ShardResult
from pipeline.tokenize_shard import TokenizeJob, TokenizeWorker

log = logging.getLogger(__name__)
POLL_S = 0.5
PROBE_EVERY_S = 1.0
SAY_WAITING_EVERY_S = 10.0
MAX_FAILED_STARTS = 3  # of one slot, in a row
MAX_START_PAUSE_S = 60.0
_REASONS = {
    "truncated": FailureReason.SHARD_TRUNCATED,
    "damaged": FailureReason.SHARD_DAMAGED,
    "unreadable": FailureReason.SHARD_UNREADABLE,
    "changed": FailureReason.SHARD_CHANGED,
}


class Source(Protocol):
    """Where an actor gets its tokenizer from."""

    def load(self) -> ImageTokenizer: ...


class TokenizeActor:
    """The worker, made remote. Loading is a call of its own, so that its errors arrive as they are."""

    def __init__(self, source: Source, job: TokenizeJob) -> None:
        self._source, self._job = source, job
        self._worker: TokenizeWorker | None = None

    def load(self) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._worker = TokenizeWorker(self._source.load(), self._job)

    def tokenize(self, task: ShardTask, delay_s: float) -> ShardResult:
        """`delay_s`: what failed just now is not tried again at once."""
        assert self._worker is not None, "load comes first"
        time.sleep(delay_s)
        return self._worker.tokenize(task)

    def ping(self) -> None:
        """Answers when the actor can be reached."""


@dataclass
class _Slot:
    """One place in the pool; its actor may be replaced. `ready` once loaded and while it can be reached. `deaths`:
    in a row, without a finished shard between; `failed_starts` likewise, without a load between."""

    name: str
    actor: Any = None
    ready: bool = False
    deaths: int = 0
    failed_starts: int = 0


@dataclass(frozen=True)
class _Call:
    slot: _Slot
    actor: Any
    work: Work | None  # None: a load or a ping
    started: float


class ActorPool:
    """Actors for a `with` block, in which any number of Dispatches may be run, one after another."""

    def __init__(self, source: Source, job: TokenizeJob, settings: PoolSettings) -> None:
        self._source, self._job, self._settings = source, job, settings
        self._dispatch = Dispatch((), attempts=1, in_flight_limit=1)
        self._calls: dict[Any, _Call] = {}
        self._probe_at: dict[str, float] = {}
        self._start_at: dict[str, float] = {}
        self._ever_ready = False
        self._remote = ray.remote(
            num_gpus=settings.gpus_per_actor,
            num_cpus=settings.cpus_per_actor,
            max_concurrency=settings.shards_in_flight + 1,
        )(TokenizeActor)
        self._slots = [_Slot(f"actor-{n}") for n in range(settings.num_actors)]
        self._waiting_since = time.monotonic()
        self._said_waiting = self._waiting_since

    def __enter__(self) -> ActorPool:
        for slot in self._slots:
            self._start(slot)
        return self

    def __exit__(self, *_: object) -> None:
        for slot in self._slots:
            if slot.actor is not None:
                ray.kill(slot.actor)

    @property
    def num_ready(self) -> int:
        return sum(slot.ready for slot in self._slots)

    def run(self, dispatch: Dispatch) -> Iterator[ShardResult | GivenUp]:
        """What became of each shard, as it becomes known. Raises ClusterError when no actor can be had, and what
        the tokenizer's loading raises."""
        self._dispatch = dispatch
        while not self._dispatch.finished:
            self._hand_out()
            done = self._wait()
            for ref in done:
                yield from self._finish(ref, self._calls.pop(ref))
            yield from self._stop_hung()
            self._start_again()
            self._probe_unreachable()
            self._check_waiting()

    def _wait(self) -> list[Any]:
        if not self._calls:  # every slot pauses before its next start
            time.sleep(POLL_S)
            return []
        done, _ = ray.wait(list(self._calls), timeout=POLL_S)
        return list(done)

    def _start(self, slot: _Slot) -> None:
        slot.actor, slot.ready = self._remote.remote(self._source, self._job), False
        self._call(slot, slot.actor.load.remote(), None)

    def _call(self, slot: _Slot, ref: Any, work: Work | None) -> None:
        self._calls[ref] = _Call(slot, slot.actor, work, time.monotonic())

    def _hand_out(self) -> None:
        given = True
        while given:  # a shard to each actor in turn, so that few shards spread over all
            given = False
            for slot in self._slots:
                if slot.ready and (work := self._dispatch.next_for(slot.name)) is not None:
                    delay_s = self._settings.retry_pause_s * 2 ** (work.charged - 1) if work.charged else 0.0
                    self._call(slot, slot.actor.tokenize.remote(work.task, delay_s), work)
                    given = True

    def _finish(self, ref: Any, call: _Call) -> Iterator[ShardResult | GivenUp]:
        if call.actor is not call.slot.actor or self._is_forgotten(call):
            return  # the last words of an actor that was replaced, or of a call that was given back
        try:
            result = ray.get(ref)
        except ActorUnavailableError as error:
            yield from self._unreachable(call, error)
        except RayTaskError as error:
            yield from self._raised(call, error)
        except RayError as error:
            yield from self._died(call.slot, _first_and_last_line(error))
        else:
            self._ever_ready = True
            call.slot.ready, call.slot.failed_starts = True, 0
            if call.work is not None:
                call.slot.deaths = 0
                self._dispatch.done(call.slot.name, call.work)
                yield _with_attempts(result, call.work)

    def _is_forgotten(self, call: _Call) -> bool:
        return call.work is not None and call.work not in self._dispatch.held_by(call.slot.name)

    def _raised(self, call: _Call, error: RayTaskError) -> Iterator[GivenUp]:
        """A shard or the store at fault is a failed attempt; anything else puts the actor itself in doubt (a CUDA
        error sticks to its process), so it is replaced, and its shards are tried again alone."""
        cause = error.cause
        message = f"{type(cause).__name__}: {cause}"
        if call.work is None:
            if not self._ever_ready and isinstance(cause, PipelineError | ModelError):
                raise cause  # no such checkpoint: all actors will say the same
            yield from self._replace(call.slot, f"it could not load its tokenizer: {message}")
        elif isinstance(cause, ShardError | StorageError | OSError):
            log.warning("%s failed (attempt %d): %s", _shown(call.work), call.work.charged + 1, message)
            given_up = self._dispatch.failed(call.slot.name, call.work, _reason(cause), message)
            if given_up is not None:
                yield given_up
        else:
            yield from self._replace(call.slot, message)

    def _replace(self, slot: _Slot, message: str) -> Iterator[GivenUp]:
        ray.kill(slot.actor)
        yield from self._died(slot, message)

    def _died(self, slot: _Slot, message: str, culprits: tuple[Work, ...] = ()) -> Iterator[GivenUp]:
        reason = FailureReason.SHARD_TIMED_OUT if culprits else FailureReason.SHARD_CRASHED
        held = ", ".join(_shown(work) for work in self._dispatch.held_by(slot.name)) or "no shard"
        log.warning("%s is replaced while it held %s: %s", slot.name, held, message)
        yield from self._dispatch.actor_lost(slot.name, reason, message, culprits)
        self._probe_at.pop(slot.name, None)
        slot.failed_starts += not slot.ready
        slot.actor, slot.ready, slot.deaths = None, False, slot.deaths + 1  # None: its last words are not heard
        if slot.failed_starts >= MAX_FAILED_STARTS:
            self._retire(slot, message)
        else:  # the first replacement at once, the next ones later and later
            self._start_at[slot.name] = time.monotonic() + min(MAX_START_PAUSE_S, 2.0 ** (slot.deaths - 1) - 1)

    def _retire(self, slot: _Slot, message: str) -> None:
        """The run goes on with the other slots, if there are any."""
        self._slots.remove(slot)
        if not self._slots:
            raise ClusterError(f"{slot.name} died {slot.failed_starts} times while it started: {message}")
        log.warning("%s is given up after %d failed starts", slot.name, slot.failed_starts)

    def _start_again(self) -> None:
        for slot in self._slots:
            if time.monotonic() >= self._start_at.get(slot.name, float("inf")):
                del self._start_at[slot.name]
                self._start(slot)

    def _unreachable(self, call: _Call, error: RayError) -> Iterator[GivenUp]:
        if call.slot.ready:
            log.warning("%s cannot be reached: %s", call.slot.name, str(error).splitlines()[0])
        call.slot.ready = False
        self._probe_at[call.slot.name] = time.monotonic() + PROBE_EVERY_S
        yield from self._dispatch.actor_away(call.slot.name)

    def _probe_unreachable(self) -> None:
        for slot in self._slots:
            if time.monotonic() >= self._probe_at.get(slot.name, float("inf")):
                del self._probe_at[slot.name]
                self._call(slot, slot.actor.ping.remote(), None)

    def _stop_hung(self) -> Iterator[GivenUp]:
        """Kill an actor that holds a shard past its deadline; the hung shard is charged, its neighbours are not."""
        before = time.monotonic() - self._settings.shard_deadline_s
        hung = [c for c in self._calls.values() if c.work is not None and c.started < before and not self._is_stale(c)]
        for slot in {call.slot.name: call.slot for call in hung}.values():
            culprits = tuple(call.work for call in hung if call.slot is slot and call.work is not None)
            ray.kill(slot.actor)
            yield from self._died(slot, f"no result after {self._settings.shard_deadline_s:.0f} s", culprits)

    def _is_stale(self, call: _Call) -> bool:
        return call.actor is not call.slot.actor or self._is_forgotten(call)

    def _check_waiting(self) -> None:
        """Say what is waited for, and give up after a stated time without a single actor."""
        now = time.monotonic()
        if self.num_ready:
            self._waiting_since = now
            return
        wanted = f"{self._settings.num_actors} actors of {self._settings.cpus_per_actor:g} CPU"
        wanted += f" and {self._settings.gpus_per_actor:g} GPU" if self._settings.gpus_per_actor else ""
        if now - self._waiting_since > self._settings.wait_s:
            raise ClusterError(
                f"no actor could start within {self._settings.wait_s:.0f} s (ray.wait_s): asked for {wanted}; the "
                f"cluster has {describe_resources()}; add nodes, or lower ray.gpus_per_actor or ray.cpus_per_actor"
            )
        if now - self._said_waiting > SAY_WAITING_EVERY_S:
            self._said_waiting = now
            log.warning("waiting for %s; the cluster has %s", wanted, describe_resources())


def _shown(work: Work) -> str:
    return storage.public_url(work.task.shard.url)


def _reason(cause: Exception) -> FailureReason:
    return _REASONS[cause.reason] if isinstance(cause, ShardError) else FailureReason.SHARD_UNREADABLE


def _with_attempts(result: ShardResult, work: Work) -> ShardResult:
    return replace(result, attempts=work.charged + 1)


def _first_and_last_line(error: Exception) -> str:
    """Ray says what happened in the first line, and the cause of a failed start in the last."""
    lines = str(error).strip().splitlines()
    return lines[0] if len(lines) < 2 else f"{lines[0]} … {lines[-1].strip()}"
