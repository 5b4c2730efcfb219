"""`dvae status`: how far a run is, from storage alone. Imports neither torch nor Ray."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape

from pipeline import storage
from pipeline.lease import is_held
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix, listed, part_name, require_run
from pipeline.plan import PlanRecord, read_plan_record
from pipeline.records import ObjectInfo, ShardResult, ShardState
from pipeline.token_table import count_errors

MAX_QUARANTINED_SHOWN = 20
MAX_ERRORS_FILES = 1000  # read for the reasons of failed images


@dataclass(frozen=True)
class Status:
    """Counts come from the ledger, which the driver writes every ten seconds; `num_parts` from a listing, so a part
    that no ledger row knows yet shows. `num_shards` is what the last driver set out to do, with what was done.
    `removed`: shards of earlier runs that it did not list; they count in `num_parts` and `part_bytes` alone."""

    output: str
    tokenizer_id: str
    grid: list[int]
    codebook_size: int
    state: str  # complete, running, stopped
    num_shards: int | None
    num_parts: int
    num_done: int
    num_quarantined: int
    num_images: int
    num_failed: int
    part_bytes: int
    images_per_s: float | None  # since the running driver began
    left_s: float | None
    shard_seconds: float  # of all done shards together
    errors_by_reason: dict[str, int]
    num_errors_files: int  # of shards with failed images
    num_errors_files_read: int  # of those, for `errors_by_reason`
    quarantined: list[dict[str, Any]]
    removed: list[str]
    num_removed_images: int  # tokenised, and still in the table


def run_status(output_url: str, *, as_json: bool) -> int:
    """0 for a complete run, 1 for one that is not. Raises NoRun."""
    output = OutputPrefix(storage.normalize(output_url))
    if "compacted" in (run := require_run(output)):
        from jobs.compact import run_status_compacted

        return run_status_compacted(output, run, as_json=as_json)
    status = read_status(output)
    console = Console(soft_wrap=True, highlight=False)
    if as_json:
        console.print_json(json.dumps(asdict(status)))
    else:
        _print(status, console)
    return 0 if status.state == "complete" else 1


def read_status(output: OutputPrefix) -> Status:
    """One listing of tokens/ and errors/, the ledger, and the first MAX_ERRORS_FILES errors files."""
    run, plan = require_run(output), read_plan_record(output)
    rows = [row for row in Ledger(output).read().values() if row.state is not ShardState.REMOVED]
    parts, errors = listed(output.tokens_folder()), listed(output.errors_folder())
    gone = set(plan.removed) if plan else set()
    done = [row for row in rows if row.state is ShardState.DONE and row.shard not in gone]
    lost = [row for row in rows if row.state is ShardState.QUARANTINED and row.shard not in gone]
    removed = [row for row in rows if row.shard in gone]
    state = _state(output)
    images_per_s, left_s = _speed(plan, done, len(lost)) if plan and state == "running" else (None, None)
    with_errors = _with_failed_images(errors, [*lost, *removed])
    return Status(
        output=output.url,
        tokenizer_id=run["tokenizer_id"],
        grid=run["grid"],
        codebook_size=run["codebook_size"],
        state=state,
        num_shards=plan.num_shards if plan else None,
        num_parts=len(parts),
        num_done=len(done),
        num_quarantined=len(lost),
        num_images=sum(row.num_rows for row in done),
        num_failed=sum(row.num_failed for row in done),
        part_bytes=sum(info.size_bytes for info in parts.values()),
        images_per_s=images_per_s,
        left_s=left_s,
        shard_seconds=round(sum(row.seconds for row in done), 1),
        errors_by_reason=_errors_by_reason(with_errors[:MAX_ERRORS_FILES], lost),
        num_errors_files=len(with_errors),
        num_errors_files_read=min(len(with_errors), MAX_ERRORS_FILES),
        quarantined=[_quarantined(row) for row in lost],
        removed=[row.shard for row in removed],
        num_removed_images=sum(row.num_rows for row in removed),
    )


def _with_failed_images(errors: Mapping[str, ObjectInfo], others: Iterable[ShardResult]) -> list[str]:
    """The errors files of shards that were read to their end: what the others failed of is in the ledger."""
    not_these = {part_name(row.shard) for row in others}
    return [info.url for name, info in errors.items() if name not in not_these]


def _errors_by_reason(urls: Sequence[str], lost: Iterable[ShardResult]) -> dict[str, int]:
    counts = Counter(count_errors(urls))
    counts.update(str(row.reason) for row in lost)
    return dict(counts.most_common())


def _state(output: OutputPrefix) -> str:
    if storage.exists(output.file("manifest.json")):
        return "complete"
    return "running" if is_held(output) else "stopped"


def _speed(plan: PlanRecord, done: list[ShardResult], num_lost: int) -> tuple[float, float | None]:
    """(images a second, seconds left) of the driver at work; the latter unknown before its first shard."""
    since_s = max(1e-9, time.time() - plan.started)
    num_newly_lost = max(0, num_lost - plan.num_lost)
    num_new = len(done) - plan.num_done + num_newly_lost
    num_left = max(0, plan.num_shards - len(done) - num_newly_lost)
    images_per_s = (sum(row.num_rows for row in done) - plan.num_images) / since_s
    return round(images_per_s, 1), round(since_s / num_new * num_left, 1) if num_new > 0 else None


def _quarantined(row: ShardResult) -> dict[str, Any]:
    return {"shard": row.shard, "reason": row.reason, "attempts": row.attempts, "message": row.message}


def _print(status: Status, console: Console) -> None:
    for name, value in _lines(status):
        console.print(f"{name:<12}{escape(value)}")


def _lines(status: Status) -> Iterator[tuple[str, str]]:
    height, width = status.grid
    done = f"{status.num_done:,}" + (f" of {status.num_shards:,}" if status.num_shards else "")
    yield "run", status.output
    yield "state", status.state
    yield "tokenizer", f"{status.tokenizer_id} · {height}x{width} tokens of {status.codebook_size:,} codes"
    yield "shards", f"{done} done, {status.num_quarantined:,} quarantined"
    yield "parts", f"{status.num_parts:,}, {status.part_bytes / 1e6:,.1f} MB"
    yield "images", f"{status.num_images:,} tokenised, {status.num_failed:,} failed"
    yield "speed", _speed_text(status)
    for reason, count in status.errors_by_reason.items():
        yield "error", f"{count:,} × {reason}"
    if status.num_errors_files_read < status.num_errors_files:
        yield "", f"(images of the first {status.num_errors_files_read:,} of {status.num_errors_files:,} errors files)"
    for row in status.quarantined[:MAX_QUARANTINED_SHOWN]:
        yield "quarantined", f"{row['shard']}: {row['reason']}, {row['attempts']} attempts: {row['message']}"
    if (hidden := len(status.quarantined) - MAX_QUARANTINED_SHOWN) > 0:
        yield "", f"and {hidden:,} more: --json lists all"
    if status.removed:
        yield "removed", f"{len(status.removed):,} shards are no longer in the input"
        kept = f"{status.num_removed_images:,} images of theirs are still in the table"
        yield "", f"{kept}: --json lists the shards, dvae tokenize --prune drops them"


def _speed_text(status: Status) -> str:
    if status.images_per_s is not None:
        left = f"{status.left_s / 60:,.0f} min left" if status.left_s is not None else "time left unknown yet"
        return f"{status.images_per_s:,.1f} images/s, {left}"
    rate = status.num_images / status.shard_seconds if status.shard_seconds else 0.0
    return f"{rate:,.1f} images/s for each shard in flight, {status.shard_seconds:,.0f} s of work in all"
