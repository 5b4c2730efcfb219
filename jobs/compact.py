"""`dvae compact`: a finished run as fewer, larger files in another place, and what status and verify say of those."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape

from jobs.command_line import say, typed_command
from jobs.progress import JobProgress
from jobs.wording import counted, size
from pipeline import storage
from pipeline.compact import Compaction, Group
from pipeline.compacted import FileDone, shards_folder
from pipeline.errors import StorageError
from pipeline.lease import Lease, is_held
from pipeline.output import OutputPrefix, listed, read_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompactReport:
    """`num_bytes` and `part_bytes` are of tokens/ alone, here and there."""

    source: str
    dest: str
    num_shards: int
    num_quarantined: int
    num_rows: int
    num_failed: int
    num_parts: int
    part_bytes: int
    num_files: int
    num_bytes: int
    num_files_before: int  # that an earlier start had made, and that are right


def run_compact(output_url: str, dest_url: str, *, target_bytes: int, as_json: bool) -> int:
    """0 when every row is in its place and was read back, 1 when it ended before. Raises PipelineError when nothing
    was begun, RunHeld."""
    source, dest = OutputPrefix(storage.normalize(output_url)), OutputPrefix(storage.normalize(dest_url))
    compaction = Compaction(source, dest, target_bytes)
    with Lease(dest) as lease:
        compaction.begin()
        try:
            files, num_kept = _files(compaction, lease)
            manifest = compaction.finish(files)
        except StorageError as error:
            say(f"dvae: {error}\nnot complete; {source.url} is untouched. To go on:\n  {typed_command()}")
            return 1
    _say(_report(compaction, manifest, num_kept), as_json=as_json)
    return 0


def _files(compaction: Compaction, lease: Lease) -> tuple[list[FileDone], int]:
    """All of them, in their order, and how many of them an earlier start had made."""
    files, num_kept = [], 0
    with JobProgress("files", len(compaction.groups)) as progress:
        for group in compaction.groups:
            lease.check()
            kept = compaction.kept(group)
            num_kept += kept is not None
            files.append(kept or compaction.copy(group))
            progress.advance(1, _line(group))
    return files, num_kept


def _line(group: Group) -> str:
    return f"{counted(len(group.rows), 'shard')}, {size(group.part_bytes)}"


def _report(compaction: Compaction, manifest: dict[str, Any], num_kept: int) -> CompactReport:
    rows = [row for group in compaction.groups for row in group.rows]
    return CompactReport(
        compaction.source.url, compaction.dest.url, len(rows), manifest["num_quarantined"], manifest["num_rows"],
        manifest["num_failed"], manifest["num_done"], sum(row.part_bytes for row in rows), len(manifest["parts"]),
        sum(part["bytes"] for part in manifest["parts"]), num_kept,
    )  # fmt: skip


def _say(report: CompactReport, *, as_json: bool) -> None:
    console = Console(soft_wrap=True, highlight=False)
    if as_json:
        console.print_json(json.dumps(asdict(report)))
        return
    files = f"{counted(report.num_files, 'file')}, {size(report.num_bytes)}"
    parts = f"{counted(report.num_parts, 'part')}, {size(report.part_bytes)}"
    kept = f" ({report.num_files_before:,} were there)" if report.num_files_before else ""
    rows = f"{report.num_rows:,}, of {counted(report.num_shards, 'shard')}; {counted(report.num_failed, 'error')}"
    for name, value in (
        ("compacted", f"{parts} -> {files}{kept}"),
        ("rows", rows),
        ("verified", "each file was read back, and has the rows of its parts"),
        ("read", f"{report.dest} (the map of shards: {report.dest}/shards)"),
        ("untouched", f"{report.source}: to be removed by you, if at all"),
    ):
        console.print(f"{name:<12}{escape(value)}")


# What `dvae status` says of a compacted run


def run_status_compacted(output: OutputPrefix, run: dict[str, Any], *, as_json: bool) -> int:
    """0 for a complete one, 1 for one that is not."""
    manifest = read_json(output.file("manifest.json"))
    state = "running" if is_held(output) else "complete" if manifest else "stopped"
    done = listed(shards_folder(output))
    files = [info for name, info in listed(output.tokens_folder()).items() if name in done]
    totals = {name: value for name, value in (manifest or {}).items() if name.startswith("num_")}
    status = {
        "output": output.url, "state": state, "tokenizer_id": run["tokenizer_id"], "compacted": run["compacted"],
        **totals, "num_files": len(files), "file_bytes": sum(info.size_bytes for info in files),
    }  # fmt: skip
    console = Console(soft_wrap=True, highlight=False)
    if as_json:
        console.print_json(json.dumps(status))
    else:
        for line in _status_lines(status):
            console.print(line, markup=False)
    return 0 if state == "complete" else 1


def _status_lines(status: dict[str, Any]) -> Iterator[str]:
    yield f"run         {status['output']}"
    yield f"state       {status['state']}"
    yield f"tokenizer   {status['tokenizer_id']}"
    yield f"compacted   from {status['compacted']['source']}"
    yield f"files       {status['num_files']:,}, {size(status['file_bytes'])}"
    if "num_rows" in status:
        yield f"images      {status['num_rows']:,} tokenised, {status['num_failed']:,} failed"
    else:
        yield "images      counted when all files are there: the same dvae compact goes on"
