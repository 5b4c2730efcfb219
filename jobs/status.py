"""`dvae status`: how far a run is, from storage alone. Imports neither torch nor Ray."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline import storage
from pipeline.errors import PipelineError
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix, listed, read_manifest, read_run
from pipeline.records import ShardResult, ShardState
from pipeline.token_table import count_errors

MAX_QUARANTINED_SHOWN = 20


class NoRun(PipelineError):
    """The prefix holds no run."""


@dataclass(frozen=True)
class Status:
    """Counts come from the ledger; `num_parts` from a listing, so a part that no ledger row knows yet shows."""

    output: str
    tokenizer_id: str
    grid: list[int]
    codebook_size: int
    state: str  # complete, running, stopped
    num_parts: int
    num_done: int
    num_quarantined: int
    num_images: int
    num_failed: int
    part_bytes: int
    images_per_actor_second: float
    errors_by_reason: dict[str, int]
    quarantined: list[dict[str, Any]]


def run_status(output_url: str, *, as_json: bool) -> int:
    """0 for a complete run, 1 for one that is not. Raises NoRun."""
    status = read_status(OutputPrefix(storage.normalize(output_url)))
    console = Console(soft_wrap=True, highlight=False)
    if as_json:
        console.print_json(json.dumps(asdict(status)))
    else:
        _print(status, console)
    return 0 if status.state == "complete" else 1


def read_status(output: OutputPrefix) -> Status:
    """One listing of tokens/ and errors/, the ledger and the errors files."""
    run = read_run(output)
    if run is None:
        raise NoRun(f"{output.url} holds no run (no run.json); name the output of `dvae tokenize`")
    rows = list(Ledger(output).read().values())
    parts, errors = listed(output.tokens_folder()), listed(output.errors_folder())
    done = [row for row in rows if row.state is ShardState.DONE]
    lost = [row for row in rows if row.state is ShardState.QUARANTINED]
    seconds = sum(row.seconds for row in done)
    return Status(
        output.url, run["tokenizer_id"], run["grid"], run["codebook_size"], _state(output),
        len(parts), len(done), len(lost), sum(row.num_rows for row in done), sum(row.num_failed for row in done),
        sum(info.size_bytes for info in parts.values()),
        round(sum(row.num_rows for row in done if row.seconds) / seconds, 1) if seconds else 0.0,
        dict(Counter(count_errors([info.url for info in errors.values()])).most_common()),
        [_quarantined(row) for row in lost],
    )  # fmt: skip


def _state(output: OutputPrefix) -> str:
    if read_manifest(output) is not None:
        return "complete"
    return "running" if storage.exists(output.file("lease.json")) else "stopped"


def _quarantined(row: ShardResult) -> dict[str, Any]:
    return {"shard": row.shard, "reason": row.reason, "attempts": row.attempts, "message": row.message}


def _print(status: Status, console: Console) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    height, width = status.grid
    table.add_row("run", status.output)
    table.add_row("state", status.state)
    table.add_row("tokenizer", f"{status.tokenizer_id} · {height}x{width} tokens of {status.codebook_size:,} codes")
    table.add_row(
        "shards", f"{status.num_done:,} done, {status.num_quarantined:,} quarantined, {status.num_parts:,} parts"
    )
    table.add_row("images", f"{status.num_images:,} tokenised, {status.num_failed:,} failed")
    table.add_row("speed", f"{status.images_per_actor_second:,.1f} images a second for each shard in flight")
    for reason, count in status.errors_by_reason.items():
        table.add_row("error", f"{count:,} × {reason}")
    for row in status.quarantined[:MAX_QUARANTINED_SHOWN]:
        table.add_row(
            "quarantined", f"{row['shard']}: {row['reason']} after {row['attempts']} attempts: {row['message']}"
        )
    if hidden := len(status.quarantined) - MAX_QUARANTINED_SHOWN:
        table.add_row("", f"and {hidden} more: --json lists all") if hidden > 0 else None
    console.print(table)
