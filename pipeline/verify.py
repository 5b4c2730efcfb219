"""A whole output against its ledger: every shard accounted for, every file accounted for by a shard.

Reads storage only, several shards at once; what one shard's files say is verify_shard.py's.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import local_disk, storage
from pipeline.errors import Damaged
from pipeline.ledger import Ledger
from pipeline.map_ahead import map_ahead
from pipeline.output import OutputPrefix, part_name, read_json, require_run, table_of
from pipeline.plan import read_plan_record
from pipeline.problems import Problem, ProblemKind
from pipeline.records import ObjectInfo, ShardResult, ShardState
from pipeline.token_table import TableSpec
from pipeline.verify_shard import ShardCheck, ShardFiles, check_shard

UNLISTED_REMEDY = "its shard is in the input no longer: dvae tokenize --prune drops what is left of it"
READERS = 8  # whole parts in memory at once: twice as many
FOOTER_READERS = 16


class Verification:
    """What there is to check in one output. The ledger is read first and the files are listed then, so that what a
    driver at work adds meanwhile is not recorded, and never missing. Raises NoRun, RunMismatch, StorageError."""

    def __init__(self, output: OutputPrefix, *, without_ledger: bool = False) -> None:
        self.output, self.run = output, require_run(output)
        self.table = table_of(output, self.run)
        self.ledger_problem: Problem | None = None
        self.rows = [] if without_ledger else self._read_ledger()
        self._by_name = {part_name(row.shard): row for row in self.rows}
        self._parts, self._errors = _files(output.tokens_folder()), _files(output.errors_folder())
        self._unlisted = _unlisted(output)
        self.names = sorted({*self._by_name, *self._parts, *self._errors})

    def _read_ledger(self) -> list[ShardResult]:
        try:
            return list(Ledger(self.output).read().values())
        except Damaged as error:
            message = f"{error}; or make the ledger again with --rebuild-ledger"
            self.ledger_problem = Problem(ProblemKind.TORN, "ledger", message)
            return []

    def checks(self, *, quick: bool) -> Generator[ShardCheck, None, None]:
        """One for each name, in their order."""
        check = partial(self._check, quick=quick)
        return map_ahead(check, self.names, threads=FOOTER_READERS if quick else READERS)

    def _check(self, name: str, *, quick: bool) -> ShardCheck:
        check = check_shard(self._files_of(name), self.table, quick=quick)
        if not check.problems or name not in self._unlisted:
            return check
        told = (replace(p, message=f"{p.message}; {UNLISTED_REMEDY}") for p in check.problems)
        return replace(check, problems=tuple(told))

    def _files_of(self, name: str) -> ShardFiles:
        return ShardFiles(name, self._parts.get(name), self._errors.get(name), self._by_name.get(name))


def run_problems(output: OutputPrefix, table: TableSpec, rows: Sequence[ShardResult]) -> Iterator[Problem]:
    """What is wrong with the run as a whole, by the rows of its ledger."""
    yield from _plan_problems(output, rows)
    yield from _manifest_problems(output, table, rows)


def left_behind(output: OutputPrefix) -> Iterator[Problem]:
    """What killed writers left. (A driver at work has such files too.)"""
    if storage.is_local(output.url):
        root = Path(output.url)
        for path in local_disk.temporaries(root):
            message = "a killed writer left it; the next run removes it"
            yield Problem(ProblemKind.FOREIGN, path.relative_to(root).as_posix(), message)


def _unlisted(output: OutputPrefix) -> set[str]:
    """Names of what is left of shards that the last driver did not list."""
    try:
        plan = read_plan_record(output)
    except Damaged:  # said by run_problems
        return set()
    return {part_name(shard) for shard in plan.removed} if plan else set()


def _files(folder_url: str) -> dict[str, ObjectInfo]:
    """By their names below the folder: those of sub-folders have a slash in it."""
    start = len(folder_url) + 1
    return {info.url[start:]: info for info in storage.list_files(folder_url)}


def _plan_problems(output: OutputPrefix, rows: Sequence[ShardResult]) -> Iterator[Problem]:
    try:
        plan = read_plan_record(output)
    except Damaged as error:
        yield Problem(ProblemKind.TORN, "plan.json", str(error))
        return
    if plan is None:
        return
    removed = set(plan.removed)
    num_accounted = sum(row.state is not ShardState.REMOVED and row.shard not in removed for row in rows)
    if num_accounted < plan.num_shards:
        message = f"the ledger accounts for {num_accounted:,} of the {plan.num_shards:,} shards that were to be done"
        yield Problem(ProblemKind.INCOMPLETE, "plan.json", message)


def _manifest_problems(output: OutputPrefix, table: TableSpec, rows: Sequence[ShardResult]) -> Iterator[Problem]:
    try:
        manifest = read_json(output.file("manifest.json"))
        faults = [] if manifest is None else list(_manifest_faults(manifest, table, rows))
    except Damaged as error:
        yield Problem(ProblemKind.TORN, "manifest.json", str(error))
        return
    if manifest is None:
        message = "it is not there: the last run did not come to its end, or lost more than it may"
        yield Problem(ProblemKind.INCOMPLETE, "manifest.json", message)
    for message in faults:
        yield Problem(ProblemKind.MANIFEST, "manifest.json", message)


def _manifest_faults(manifest: dict[str, Any], table: TableSpec, rows: Sequence[ShardResult]) -> Iterator[str]:
    """It must name every shard that is done, those that the input has no longer as `removed`."""
    for name, wanted in table.to_json().items():
        if manifest.get(name) != wanted:
            yield f"it says {name} {manifest.get(name)!r}, run.json {wanted!r}"
    try:
        yield from _wrong_totals(manifest)
        done = {row.shard: row for row in rows if row.state is ShardState.DONE}
        for part in (*manifest["parts"], *manifest["removed"]):
            if other := _differs(part, done.pop(part["shard"], None)):
                yield f"of {part['shard']} {other}"
        yield from (f"it does not know {shard}, which the ledger says is done" for shard in done)
        lost = {row.shard for row in rows if row.state is ShardState.QUARANTINED}
        for shard in {entry["shard"] for entry in manifest["quarantined"]} - lost:
            yield f"it says that {shard} is quarantined, the ledger does not"
    except (KeyError, TypeError) as error:
        raise Damaged(f"it is no manifest ({type(error).__name__}: {error})") from error


def _wrong_totals(manifest: dict[str, Any]) -> Iterator[str]:
    parts = manifest["parts"]
    totals = {
        "num_done": len(parts),
        "num_quarantined": len(manifest["quarantined"]),
        "num_rows": sum(part["num_rows"] for part in parts),
        "num_failed": sum(part["num_failed"] for part in parts),
    }
    for name, total in totals.items():
        if manifest.get(name) != total:
            yield f"it says {name} {manifest.get(name)!r}, what it lists has {total}"


def _differs(part: dict[str, Any], row: ShardResult | None) -> str | None:
    if row is None:
        return "the ledger does not know that it is done"
    wanted = {"part": row.part, "num_rows": row.num_rows, "num_failed": row.num_failed, "bytes": row.part_bytes}
    if row.sha256 and part.get("sha256"):  # an adopted part has none until the ledger is made again
        wanted["sha256"] = row.sha256
    other = [name for name, value in wanted.items() if part.get(name) != value]
    return f"it says {other[0]} {part.get(other[0])!r}, the ledger {wanted[other[0]]!r}" if other else None
