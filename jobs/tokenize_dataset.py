"""`dvae tokenize`: plan, hand the shards to actors, keep the ledger, account for every image."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from jobs.closing import Closing, named
from jobs.progress import JobProgress
from jobs.tokenize_config import TokenizeConfig
from jobs.tokenize_run import TokenizeRun, held
from pipeline import storage
from pipeline.errors import PipelineError, RunHeld
from pipeline.ledger import Ledger
from pipeline.manifest import Totals, write_manifest
from pipeline.plan import Plan, collector_paused, make_plan, record_plan
from pipeline.prune import drop_removed
from pipeline.records import ShardResult, ShardState
from pipeline.shard_patterns import expand
from pipeline.tokenize_shard import quarantine

if TYPE_CHECKING:
    from jobs.dispatch import GivenUp
    from jobs.tokenize_actor import Source

log = logging.getLogger(__name__)
LEDGER_EVERY_S = 10.0
LEDGER_EVERY_ROWS = 1000
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
        return session.run(source or run.source, command)


def _pruned(run: TokenizeRun, ledger: Ledger, plan: Plan) -> Plan:
    left = drop_removed(run.output, ledger, plan)
    if plan.removed:
        say = Console(soft_wrap=True, highlight=False).print
        say(f"dropped, no longer in the input: {escape(named(plan.removed))}")
    return left


class Session:
    """One driver's work on one output, from its plan to its manifest."""

    def __init__(self, run: TokenizeRun, ledger: Ledger, plan: Plan, keep: Keep = lambda given_up: None) -> None:
        """`keep`: the row that a shard has all the same when it is given up; None quarantines it."""
        self._run, self._config, self._output = run, run.config, run.output
        self._ledger, self._plan, self._keep = ledger, plan, keep
        self.rows = list(plan.done)
        self._totals = Totals.of(plan.done)
        self._unwritten = list(plan.adopted)
        self._written_at = time.monotonic()
        self._num_new = 0
        self._console = Console(soft_wrap=True, highlight=False)

    def run(self, source: Source, command: str) -> int:
        self._ledger.check()
        if self._plan.todo:
            storage.remove(self._output.file("manifest.json"))  # the plan is no longer complete
        record_plan(self._output, self._plan, self._config.public_settings())
        if not self._plan.todo:
            self._flush(force=True)
            whole = self._totals.num_done == self._plan.num_shards
            self._console.print("[green]nothing to do[/]" + (": every shard has its part" if whole else ""))
            return self._conclude(command)
        try:
            try:
                self._tokenize(source)
            finally:
                self._flush(force=True)
        except KeyboardInterrupt:
            self._say_stopped("stopped", command)
            return INTERRUPTED
        except PipelineError as error:
            if isinstance(error, RunHeld) or not self._num_new:
                raise  # exit 3; or nothing was started: exit 2
            self._say_stopped(f"stopped by an error ({error})", command)
            return 1
        return self._conclude(command)

    def _say_stopped(self, how: str, command: str) -> None:
        left = self._plan.num_shards - len(self.rows)
        say = self._console.print
        say(f"[yellow]{escape(how)}[/]: {len(self.rows):,} shards are done, {left:,} are left; go on with")
        say(f"  {escape(command)}")

    def _tokenize(self, source: Source) -> None:
        from jobs.actors import ActorPool  # Ray is imported only where there is work
        from jobs.cluster import connected
        from jobs.dispatch import Dispatch
        from jobs.pool_settings import decode_threads, pool_settings
        from jobs.ray_actors import RayActors

        config, started, rows_before = self._config, time.monotonic(), self._totals.num_rows
        dispatch = Dispatch(self._plan.todo, attempts=config.attempts, in_flight_limit=config.ray.shards_in_flight)
        with connected(config.ray.address):
            settings = pool_settings(config, len(self._plan.todo))
            threads = decode_threads(config, settings.num_actors)
            with (
                ActorPool(RayActors(source, self._run.job(threads), settings), settings) as pool,
                JobProgress("shards", self._plan.num_shards, len(self._plan.done)) as progress,
            ):
                for outcome in pool.run(dispatch, self._ledger.check):
                    progress.note(_line(self._record(outcome)))
                    progress.advance(1, self._speed(started, rows_before))

    def _record(self, outcome: ShardResult | GivenUp) -> ShardResult:
        self._ledger.check()
        if not isinstance(outcome, ShardResult):
            outcome = self._keep(outcome) or self._quarantine(outcome)
        self.rows.append(outcome)
        self._unwritten.append(outcome)
        self._totals, self._num_new = self._totals.plus(outcome), self._num_new + 1
        self._flush()
        return outcome

    def _quarantine(self, given_up: GivenUp) -> ShardResult:
        work = given_up.work
        return quarantine(self._output, work.task, given_up.reason, given_up.message, work.charged)

    def _flush(self, *, force: bool = False) -> None:
        """A kill before this costs one footer read a shard at the next plan, no work."""
        due = time.monotonic() - self._written_at > LEDGER_EVERY_S or len(self._unwritten) >= LEDGER_EVERY_ROWS
        if self._unwritten and (due or force):
            self._ledger.append(self._unwritten)
            self._unwritten, self._written_at = [], time.monotonic()

    def _speed(self, started: float, rows_before: int) -> str:
        totals = self._totals
        rate = (totals.num_rows - rows_before) / max(1e-9, time.monotonic() - started)
        return f"{totals.num_rows:,} images, {rate:,.0f} images/s, {totals.num_failed:,} failed"

    def _conclude(self, command: str) -> int:
        plan, rows = self._plan, self.rows
        closing = Closing(
            self._config, self._output.url, plan.num_shards, self._totals, rows, plan.removed, plan.num_left
        )
        if not closing.lost and not plan.num_left:
            self._ledger.check()
            write_manifest(self._output, self._run.table, rows, plan.removed)
        return closing.tell(self._console.print, command)


def _line(row: ShardResult) -> str:
    if row.state is ShardState.QUARANTINED:
        return f"{row.shard}: quarantined after {row.attempts} attempts, {row.reason}: {row.message}"
    return f"{row.shard}: {row.num_rows:,} rows, {row.num_failed:,} failed, {row.seconds:.1f} s"
