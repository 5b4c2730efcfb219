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
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix, RunDescription, check_run, claim, read_manifest, read_run
from pipeline.plan import Plan, make_plan, record_plan
from pipeline.records import ShardResult, ShardState
from pipeline.token_table import TableSpec
from pipeline.tokenize_shard import TokenizeJob, quarantine

if TYPE_CHECKING:
    from jobs.actors import PoolSettings, Source
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
    shards = storage.expand(config.shards)
    output = OutputPrefix(storage.normalize(config.output))
    if (stored := read_run(output)) is not None:  # before anything is written, the lease included
        check_run(output, stored, run, accept_numerics=config.accept_numerics)
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
        self._console = Console(soft_wrap=True, highlight=False)

    def run(self, source: Source, command: str) -> int:
        if not self._plan.todo:
            self._flush(force=True)
            return self._conclude(command, nothing_to_do=True)
        storage.remove(self._output.file("manifest.json"))  # the plan is no longer complete
        record_plan(self._output, self._plan)
        try:
            self._tokenize(source)
        except KeyboardInterrupt:
            left = self._plan.num_shards - len(self._rows)
            self._console.print(f"[yellow]stopped[/]: {len(self._rows)} shards are done, {left} are left; go on with")
            self._console.print(f"  {escape(command)}")
            return INTERRUPTED
        finally:
            self._flush(force=True)
        return self._conclude(command)

    def _tokenize(self, source: Source) -> None:
        from jobs.actors import ActorPool  # Ray is imported only where there is work
        from jobs.cluster import connected
        from jobs.dispatch import Dispatch

        config, started, rows_before = self._config, time.monotonic(), self._totals.num_rows
        dispatch = Dispatch(self._plan.todo, attempts=config.attempts, in_flight_limit=config.ray.shards_in_flight)
        with connected(config.ray.address):
            settings = pool_settings(config, len(self._plan.todo))
            job = self._job(settings)
            with (
                ActorPool(source, job, settings) as pool,
                JobProgress("shards", self._plan.num_shards, len(self._plan.done)) as progress,
            ):
                for outcome in pool.run(dispatch):
                    self._record(outcome)
                    progress.advance(1, self._speed(started, rows_before))

    def _job(self, settings: PoolSettings) -> TokenizeJob:
        threads = self._config.ray.decode_threads or decode_threads(settings)
        return TokenizeJob(
            self._output, self._table, self._config.batch_size, threads,
            tuple(self._config.options()["image_extensions"]), self._config.require_end_marker,
        )  # fmt: skip

    def _record(self, outcome: ShardResult | GivenUp) -> None:
        if not isinstance(outcome, ShardResult):
            work = outcome.work
            url = storage.public_url(work.task.shard.url)
            log.error("%s is quarantined (%s): %s", url, outcome.reason, outcome.message)
            outcome = quarantine(self._output, work.task, outcome.reason, outcome.message, work.charged)
        self._rows.append(outcome)
        self._totals = self._totals.plus(outcome)
        self._unwritten.append(outcome)
        self._flush()

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
        problems = self._problems(totals)
        if not problems:
            self._write_manifest(totals)
        say = self._console.print
        if nothing_to_do:
            say("[green]nothing to do[/]: every shard has its part")
        say(
            f"{totals.num_done:,} of {self._plan.num_shards:,} shards · {totals.num_rows:,} images tokenised · "
            f"{totals.num_failed:,} failed · {escape(self._output.url)}"
        )
        for problem in problems:
            say(f"[red]incomplete[/]: {escape(problem)}")
        if problems:
            say(f"what failed and why: dvae status {escape(self._output.url)}; to try again:\n  {escape(command)}")
        return 1 if problems else 0

    def _problems(self, totals: Totals) -> list[str]:
        config, problems = self._config, []
        if totals.num_quarantined > config.max_failed_shards:
            reasons = Counter(row.reason for row in self._rows if row.state is ShardState.QUARANTINED)
            named = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            allowed = f"max_failed_shards allows {config.max_failed_shards}"
            problems.append(f"{totals.num_quarantined} shards are quarantined ({named}), {allowed}")
        if totals.failed_share > config.max_failed_samples:
            allowed = f"max_failed_samples allows {config.max_failed_samples:.2%}"
            problems.append(f"{totals.num_failed:,} images failed, {totals.failed_share:.2%} of all; {allowed}")
        return problems

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


def pool_settings(config: TokenizeConfig, num_shards: int) -> PoolSettings:
    """As configured; where it says nothing, an actor for each GPU (or for each CPU, where none is asked for)."""
    import ray

    from jobs.actors import PoolSettings

    settings, cluster = config.ray, ray.cluster_resources()
    per_actor = {"GPU": settings.gpus_per_actor, "CPU": settings.cpus_per_actor}
    name = "GPU" if settings.gpus_per_actor else "CPU"
    fitting = int(cluster.get(name, 0) / per_actor[name]) if per_actor[name] else 1
    num_actors = settings.num_actors or max(1, min(fitting, num_shards))
    return PoolSettings(
        num_actors, settings.gpus_per_actor, settings.cpus_per_actor, settings.shards_in_flight, settings.wait_s,
        config.shard_deadline_s,
    )  # fmt: skip


def decode_threads(settings: PoolSettings) -> int:
    """An actor's share of the cluster's CPUs."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1) / settings.num_actors))
