"""`dvae retry`: try again what failed in a run, and only that, with the settings that the run left in plan.json."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from jobs.config import ConfigError, with_overrides
from jobs.tokenize_config import TokenizeConfig
from jobs.tokenize_dataset import Session
from jobs.tokenize_run import TokenizeRun, held
from pipeline import storage
from pipeline.errors import NoRun
from pipeline.output import OutputPrefix, require_run
from pipeline.plan import PlanRecord, read_plan_record
from pipeline.records import FailureReason, ShardResult, ShardState
from pipeline.retry import Finding, is_untouched, plan_retry, put_in_doubt

if TYPE_CHECKING:
    from jobs.dispatch import GivenUp
    from jobs.tokenize_actor import Source

log = logging.getLogger(__name__)
MAX_SHOWN = 50
ACTOR_LOST = (FailureReason.SHARD_TIMED_OUT, FailureReason.SHARD_CRASHED)
OWN_SETTINGS = ("output", "shards")


def run_retry(
    output_url: str,
    overrides: Sequence[str],
    command: str,
    source: Source | None = None,
    *,
    whole_shards: bool = False,
) -> int:
    """Exit codes and exceptions as `run_tokenize`. `whole_shards`: tokenise every shard with failed images again, also
    for what cannot be tried by fetching an image alone."""
    output = OutputPrefix(storage.normalize(output_url))
    record = _require_record(output)
    run = TokenizeRun.of(_config(output, record, overrides))
    with held(run) as ledger:
        plan, findings = plan_retry(output, ledger, run.table, record, whole_shards=whole_shards)
        _log(findings)
        put_in_doubt(output, ledger, findings)
        became: dict[str, ShardResult] = {}
        tell = lambda row: became.update({row.shard: row})  # noqa: E731
        session = Session(run, ledger, plan, _keeper(output, findings), tell)
        del plan
        try:
            return session.run(source or run.source, command)
        finally:
            _tell(findings, became)


def _log(findings: Sequence[Finding]) -> None:
    for finding in findings:
        log.info("%s: %s: %s", finding.row.shard, finding.failed, finding.outcome)
    num_again = sum(finding.task is not None for finding in findings)
    log.info("retry: %d shards with failures, %d to be tokenised again", len(findings), num_again)


def _require_record(output: OutputPrefix) -> PlanRecord:
    require_run(output)
    record = read_plan_record(output)
    if record is None or not record.settings:
        url = storage.public_url(output.file("plan.json"))
        raise NoRun(
            f"{url} holds no settings of a run: run `dvae tokenize CONFIG` once more, which tries again as well"
        )
    return record


def _config(output: OutputPrefix, record: PlanRecord, overrides: Sequence[str]) -> TokenizeConfig:
    if own := [text for text in overrides if text.partition("=")[0] in OWN_SETTINGS]:
        raise ConfigError(f"{own[0]!r}: dvae retry takes output and shards from the run")
    source = storage.public_url(output.file("plan.json"))
    return with_overrides(TokenizeConfig, {**record.settings, "output": output.url}, overrides, source)


def _keeper(output: OutputPrefix, findings: Sequence[Finding]) -> Callable[[GivenUp], ShardResult | None]:
    """A shard that has a good part and cannot be read now keeps that part, unless an actor that was lost may still be
    writing to it."""
    with_part = {one.row.shard: one for one in findings if one.task is not None and one.errors_etag is not None}

    def keep(given_up: GivenUp) -> ShardResult | None:
        finding = with_part.get(storage.public_url(given_up.work.task.shard.url))
        if finding is None or given_up.reason in ACTOR_LOST:
            return None
        return finding.row if is_untouched(output, finding) else None

    return keep


def _tell(findings: Sequence[Finding], became: Mapping[str, ShardResult]) -> None:
    """A line for each shard with failures: what failed, and what became of it."""
    say = Console(soft_wrap=True, highlight=False).print
    if not findings:
        say("[green]nothing failed[/]")
    for finding in findings[:MAX_SHOWN]:
        outcome = _outcome(finding, became.get(finding.row.shard))
        say(escape(f"{storage.base_name(finding.row.shard)} · {finding.failed} · {outcome}"))
    if (hidden := len(findings) - MAX_SHOWN) > 0:
        say(f"and {hidden:,} more shards: the log has them all")


def _outcome(finding: Finding, row: ShardResult | None) -> str:
    if finding.task is None:
        return finding.outcome
    if row is None:
        return "not done yet"
    if row.state is ShardState.QUARANTINED:
        return f"quarantined again: {row.reason}: {row.message}"
    if row is finding.row:
        return "could not be read again, and keeps its part"
    return f"done: {row.num_rows:,} images, {row.num_failed:,} failed"
