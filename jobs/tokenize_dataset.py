"""`dvae tokenize`: plan, hand the shards to actors, keep the ledger, account for every image."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from jobs.bottleneck import in_full, in_short
from jobs.closing import Closing, named
from jobs.leaving import signals_later
from jobs.progress import JobProgress
from jobs.recording import Recording
from jobs.tokenize_config import TokenizeConfig
from jobs.tokenize_run import TokenizeRun, held
from pipeline import storage
from pipeline.errors import PipelineError, RunHeld
from pipeline.ledger import Ledger
from pipeline.manifest import write_manifest
from pipeline.plan import Plan, collector_paused, make_plan, record_plan
from pipeline.prune import drop_removed
from pipeline.records import ShardResult, ShardState
from pipeline.shard_patterns import expand
from pipeline.tokenize_shard import quarantine

if TYPE_CHECKING:
    from jobs.dispatch import GivenUp
    from jobs.metrics import Meters
    from jobs.metrics_tokenize import TokenizeMetrics
    from jobs.tokenize_actor import Source

log = logging.getLogger(__name__)
INTERRUPTED = 130
Keep = Callable[["GivenUp"], ShardResult | None]


def run_tokenize(config: TokenizeConfig, command: str, source: Source | None = None, *, prune: bool = False) -> int:
    """Tokenise what is not yet tokenised; the exit code (0 all accounted for, 1 incomplete or over a budget, 130
    interrupted). `command` is the line to run again. `source` stands in for the checkpoint's model, in tests.
    `prune`: drop what earlier runs made of shards that the input has no longer.
    Raises PipelineError or ModelError when nothing was started."""
    run = TokenizeRun.of(config)
    with collector_paused():
        shards = expand(config.shards)
    with held(run) as ledger:
        with collector_paused():
            plan = make_plan(shards, run.output, ledger, run.table)
        del shards  # the plan has them
        log.info("plan: %s", plan.describe())
        session = Session(run, ledger, _pruned(run, ledger, plan) if prune else plan)
        del plan  # the session lets go of what it needs no longer
        return session.run(source or run.source, command)


def _pruned(run: TokenizeRun, ledger: Ledger, plan: Plan) -> Plan:
    left = drop_removed(run.output, ledger, plan)
    if plan.removed:
        say = Console(soft_wrap=True, highlight=False).print
        say(f"dropped, no longer in the input: {escape(named(plan.removed))}")
    return left


class Session:
    """One driver's work on one output, from its plan to its manifest."""

    def __init__(
        self,
        run: TokenizeRun,
        ledger: Ledger,
        plan: Plan,
        keep: Keep = lambda given_up: None,
        tell: Callable[[ShardResult], None] = lambda row: None,
    ) -> None:
        """`keep`: the row that a shard has all the same when it is given up; None quarantines it. `tell` is called
        with the row of each shard that this run has brought to an end."""
        self._run, self._config, self._output = run, run.config, run.output
        self._ledger, self._plan, self._keep, self._tell = ledger, plan, keep, tell
        self._recording = Recording(ledger, plan)
        self._num_shards, self._num_before = plan.num_shards, len(plan.done)
        self._console = Console(soft_wrap=True, highlight=False)

    def run(self, source: Source, command: str) -> int:
        self._ledger.check()
        if self._plan.todo:
            storage.remove(self._output.file("manifest.json"))  # the plan is no longer complete
        record_plan(self._output, self._plan, self._config.public_settings())
        if not self._plan.todo:
            self._recording.close()
            whole = self._recording.totals.num_done == self._num_shards
            self._console.print("[green]nothing to do[/]" + (": every shard has its part" if whole else ""))
            return self._conclude(self._plan.done, command)
        self._plan = replace(self._plan, done=(), adopted=())  # the ledger has them
        try:
            try:
                self._tokenize(source)
            finally:
                self._recording.close()
            self._plan = replace(self._plan, todo=())
            return self._conclude(None, command)
        except KeyboardInterrupt:
            self._say_stopped("stopped", command)
            return INTERRUPTED
        except PipelineError as error:
            if isinstance(error, RunHeld) or not self._recording.num_new:
                raise  # exit 3; or nothing was started: exit 2
            self._say_stopped(f"stopped by an error ({error})", command)
            return 1
        except Exception as error:  # a fault of ours: its traceback is wanted, and the way on too
            self._say_stopped(f"stopped by an error ({type(error).__name__}: {error})", command)
            raise

    def _say_stopped(self, how: str, command: str) -> None:
        num_done, say = self._recording.num_shards, self._console.print
        left = self._num_shards - num_done
        say(f"[yellow]{escape(how)}[/]: {num_done:,} shards are done, {left:,} are left; go on with")
        say(f"  {escape(command)}")

    def _tokenize(self, source: Source) -> None:
        with signals_later():  # Ray is imported only where there is work
            from jobs.actors import ActorPool
            from jobs.cluster import connected
            from jobs.dispatch import Dispatch
            from jobs.metrics import RayMeters
            from jobs.metrics_tokenize import TokenizeMetrics
            from jobs.pool_settings import pool_settings, store_bytes
            from jobs.ray_actors import RayActors

        config, started, rows_before = self._config, time.monotonic(), self._recording.totals.num_rows
        with connected(config.ray.address, store_bytes(config, self._run.table.image_spec["size"])):
            meters = RayMeters(self._output.url)
            settings = pool_settings(config, len(self._plan.todo), lambda: self._look_for_actors(meters))
            job, in_flight = self._run.job(settings.decode_threads), settings.shards_in_flight
            left_bytes = sum(task.shard.size_bytes for task in self._plan.todo)
            dispatch = Dispatch(self._plan.todo, attempts=config.attempts, in_flight_limit=in_flight)
            with (
                ActorPool(RayActors(source, job, settings), settings) as pool,
                JobProgress("shards", self._num_shards, self._num_before, amount=left_bytes) as progress,
                TokenizeMetrics(meters, pool, dispatch, self._recording, progress) as metrics,
            ):
                for outcome in pool.run(dispatch, lambda: self._look(metrics)):
                    row = self._record(outcome)
                    metrics.ended(row)
                    progress.note(_line(row), always=row.state is ShardState.QUARANTINED)
                    _advance(progress, outcome, self._speed(started, rows_before, in_short(pool.times)))
            self._say_who_was_starved(
                in_full(pool.times, on_gpu=config.device == "cuda", in_tasks=bool(settings.decode))
            )

    def _look_for_actors(self, meters: Meters) -> None:
        from jobs.metrics_tokenize import tell_no_actor

        self._ledger.check()
        tell_no_actor(meters, len(self._plan.todo))

    def _look(self, metrics: TokenizeMetrics) -> None:
        self._ledger.check()
        metrics.look()

    def _record(self, outcome: ShardResult | GivenUp) -> ShardResult:
        self._ledger.check()
        if not isinstance(outcome, ShardResult):
            outcome = self._keep(outcome) or self._quarantine(outcome)
        self._recording.note(outcome)
        self._tell(outcome)
        return outcome

    def _quarantine(self, given_up: GivenUp) -> ShardResult:
        work = given_up.work
        return quarantine(self._output, work.task, given_up.reason, given_up.message, work.charged)

    def _say_who_was_starved(self, line: str) -> None:
        if line:
            self._console.print(line)

    def _speed(self, started: float, rows_before: int, busy: str) -> str:
        totals = self._recording.totals
        rate = (totals.num_rows - rows_before) / max(1e-9, time.monotonic() - started)
        return f"{totals.num_rows:,} images, {rate:,.0f} images/s, {totals.num_failed:,} failed" + (
            f", {busy}" if busy else ""
        )

    def _conclude(self, rows: Sequence[ShardResult] | None, command: str) -> int:
        """`rows`: of all shards, where they are known; else the ledger is asked."""
        plan, record = self._plan, self._recording
        closing = Closing(
            self._config, self._output.url, self._num_shards, record.totals, record.reasons, plan.removed, plan.num_left
        )
        if not closing.lost and not plan.num_left:
            self._ledger.check()
            rows = record.rows(plan.removed) if rows is None else rows
            write_manifest(self._output, self._run.table, rows, plan.removed)
        return closing.tell(self._console.print, command)


def _advance(progress: JobProgress, outcome: ShardResult | GivenUp, text: str) -> None:
    """A shard that came to nothing may have taken no time at all, or an hour: it is no measure for others."""
    if isinstance(outcome, ShardResult):
        progress.advance(1, text, outcome.size_bytes, outcome.seconds)
    else:
        progress.skip(1, text, outcome.work.task.shard.size_bytes)


def _line(row: ShardResult) -> str:
    if row.state is ShardState.QUARANTINED:
        return f"{row.shard}: quarantined after {row.attempts} attempts, {row.reason}: {row.message}"
    return f"{row.shard}: {row.num_rows:,} rows, {row.num_failed:,} failed, {row.seconds:.1f} s"
