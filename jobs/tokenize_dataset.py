"""`dvae tokenize`: plan, hand the shards to actors, keep the ledger, account for every image."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from jobs.checkpoints import CheckpointHead, TokenizerSource, read_head
from jobs.progress import JobProgress
from jobs.tokenize_config import TokenizeConfig
from pipeline import storage
from pipeline.errors import PipelineError
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix, RunDescription, check_run, claim, read_manifest
from pipeline.plan import Plan, make_plan, record_plan
from pipeline.records import ShardResult, ShardState
from pipeline.shard_patterns import expand
from pipeline.token_table import TableSpec
from pipeline.tokenize_shard import TokenizeJob, quarantine

if TYPE_CHECKING:
    from jobs.actors import Source
    from jobs.dispatch import GivenUp

log = logging.getLogger(__name__)
LEDGER_EVERY_S = 10.0
LEDGER_EVERY_ROWS = 1000
INTERRUPTED = 130


def run_tokenize(config: TokenizeConfig, command: str, source: Source | None = None) -> int:
    """Tokenise what is not yet tokenised; the exit code (0 all accounted for, 1 incomplete or over a budget, 130
    interrupted). `command` is the line to run again. `source` stands in for the checkpoint's model, in tests.
    Raises PipelineError or ModelError when nothing was started."""
    head = read_head(config.checkpoint)
    numerics = TokenizerSource(head.url, config.device, config.precision, config.batch_size, config.threads)
    run = RunDescription(_table(head, config), config.options(), numerics.numerics())
    shards = expand(config.shards)
    output = OutputPrefix(storage.normalize(config.output))
    check_run(output, run, accept_numerics=config.accept_numerics)  # before anything is written, the lease included
    with Lease(output):
        claim(output, run, accept_numerics=config.accept_numerics)
        storage.remove_temporaries(output.url)
        ledger = Ledger(output)
        ledger.compact()
        plan = make_plan(shards, output, ledger)
        session = Session(config, output, run.table, ledger, plan)
        return session.run(source or numerics, command)


def _table(head: CheckpointHead, config: TokenizeConfig) -> TableSpec:
    return TableSpec(head.tokenizer_id, head.grid, head.codebook_size, head.image_spec, config.columns())


@dataclass(frozen=True)
class Totals:
    """Sums over ledger rows."""

    num_done: int
    num_quarantined: int
    num_rows: int
    num_failed: int

    @classmethod
    def of(cls, rows: Iterable[ShardResult]) -> Totals:
        return reduce(Totals.plus, rows, cls(0, 0, 0, 0))

    def plus(self, row: ShardResult) -> Totals:
        done = row.state is ShardState.DONE
        return Totals(
            self.num_done + done,
            self.num_quarantined + (not done),
            self.num_rows + row.num_rows,
            self.num_failed + row.num_failed,
        )

    @property
    def failed_share(self) -> float:
        return self.num_failed / max(1, self.num_rows + self.num_failed)


class Session:
    """One driver's work on one output, from its plan to its manifest."""

    def __init__(
        self, config: TokenizeConfig, output: OutputPrefix, table: TableSpec, ledger: Ledger, plan: Plan
    ) -> None:
        self._config, self._output, self._table, self._ledger, self._plan = config, output, table, ledger, plan
        self._rows = list(plan.done)
        self._totals = Totals.of(plan.done)
        self._unwritten = list(plan.adopted)
        self._written_at = time.monotonic()
        self._num_new = 0
        self._console = Console(soft_wrap=True, highlight=False)

    def run(self, source: Source, command: str) -> int:
        if not self._plan.todo:
            self._flush(force=True)
            return self._conclude(command, nothing_to_do=True)
        storage.remove(self._output.file("manifest.json"))  # the plan is no longer complete
        record_plan(self._output, self._plan)
        try:
            try:
                self._tokenize(source)
            finally:
                self._flush(force=True)
        except KeyboardInterrupt:
            self._say_stopped("stopped", command)
            return INTERRUPTED
        except PipelineError as error:
            if not self._num_new:
                raise  # nothing was started: exit 2
            self._say_stopped(f"stopped by an error ({error})", command)
            return 1
        return self._conclude(command)

    def _say_stopped(self, how: str, command: str) -> None:
        left = self._plan.num_shards - len(self._rows)
        say = self._console.print
        say(f"[yellow]{escape(how)}[/]: {len(self._rows):,} shards are done, {left:,} are left; go on with")
        say(f"  {escape(command)}")

    def _tokenize(self, source: Source) -> None:
        from jobs.actors import ActorPool  # Ray is imported only where there is work
        from jobs.cluster import connected
        from jobs.dispatch import Dispatch
        from jobs.pool_settings import decode_threads, pool_settings

        config, started, rows_before = self._config, time.monotonic(), self._totals.num_rows
        dispatch = Dispatch(self._plan.todo, attempts=config.attempts, in_flight_limit=config.ray.shards_in_flight)
        with connected(config.ray.address):
            settings = pool_settings(config, len(self._plan.todo))
            job = self._job(decode_threads(config, settings.num_actors))
            with (
                ActorPool(source, job, settings) as pool,
                JobProgress("shards", self._plan.num_shards, len(self._plan.done)) as progress,
            ):
                for outcome in pool.run(dispatch):
                    progress.note(_line(self._record(outcome)))
                    progress.advance(1, self._speed(started, rows_before))

    def _job(self, threads: int) -> TokenizeJob:
        return TokenizeJob(
            self._output, self._table, self._config.batch_size, threads,
            tuple(self._config.options()["image_extensions"]), self._config.require_end_marker,
        )  # fmt: skip

    def _record(self, outcome: ShardResult | GivenUp) -> ShardResult:
        if not isinstance(outcome, ShardResult):
            work = outcome.work
            outcome = quarantine(self._output, work.task, outcome.reason, outcome.message, work.charged)
        self._rows.append(outcome)
        self._unwritten.append(outcome)
        self._totals, self._num_new = self._totals.plus(outcome), self._num_new + 1
        self._flush()
        return outcome

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

    def _conclude(self, command: str, *, nothing_to_do: bool = False) -> int:
        totals = self._totals
        lost, failed = self._too_many_lost(totals), self._too_many_failed(totals)
        if not lost:
            self._write_manifest(totals)
        say = self._console.print
        if nothing_to_do:
            say("[green]nothing to do[/]: every shard has its part")
        say(
            f"{totals.num_done:,} of {self._plan.num_shards:,} shards · {totals.num_rows:,} images tokenised · "
            f"{totals.num_failed:,} failed · {escape(self._output.url)}"
        )
        if failed:
            say(f"[red]over budget[/]: {escape(failed)}; accept that with max_failed_samples={totals.failed_share:.4f}")
        if lost:
            say(f"[red]incomplete[/]: {escape(lost)}; to try those again:\n  {escape(command)}")
        if lost or failed:
            say(f"what failed and why: dvae status {escape(self._output.url)}")
        return 1 if lost or failed else 0

    def _too_many_lost(self, totals: Totals) -> str | None:
        if totals.num_quarantined <= self._config.max_failed_shards:
            return None
        reasons = Counter(row.reason for row in self._rows if row.state is ShardState.QUARANTINED)
        named = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        allowed = f"max_failed_shards allows {self._config.max_failed_shards}"
        return f"{totals.num_quarantined} shards are quarantined ({named}), {allowed}"

    def _too_many_failed(self, totals: Totals) -> str | None:
        if totals.failed_share <= self._config.max_failed_samples:
            return None
        allowed = f"max_failed_samples allows {self._config.max_failed_samples:.2%}"
        return f"{totals.num_failed:,} images failed, {totals.failed_share:.2%} of all, {allowed}"

    def _write_manifest(self, totals: Totals) -> None:
        rows = sorted(self._rows, key=lambda row: row.shard)
        parts = [_manifest_part(row) for row in rows if row.state is ShardState.DONE]
        lost = [{"shard": r.shard, "reason": r.reason} for r in rows if r.state is ShardState.QUARANTINED]
        manifest = {**self._table.to_json(), **totals.__dict__, "parts": parts, "quarantined": lost}
        data = json.dumps(manifest, indent=1, sort_keys=True).encode()
        if read_manifest(self._output) != json.loads(data):
            storage.publish(self._output.file("manifest.json"), data)


def _manifest_part(row: ShardResult) -> dict[str, Any]:
    return {
        "part": row.part, "shard": row.shard, "num_rows": row.num_rows, "num_failed": row.num_failed,
        "bytes": row.part_bytes, "sha256": row.sha256,
    }  # fmt: skip


def _line(row: ShardResult) -> str:
    if row.state is ShardState.QUARANTINED:
        return f"{row.shard}: quarantined after {row.attempts} attempts, {row.reason}: {row.message}"
    return f"{row.shard}: {row.num_rows:,} rows, {row.num_failed:,} failed, {row.seconds:.1f} s"
