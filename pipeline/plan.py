"""What is to be done: the shards listed, less the parts that are there and right. Reads no shard."""

from __future__ import annotations

import gc
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from pipeline import storage
from pipeline.errors import Damaged, RunMismatch
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix, listed, part_name, read_json
from pipeline.records import ObjectInfo, ShardResult, ShardState
from pipeline.token_table import TableSpec, read_footer

FOOTER_READERS = 16


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to tokenise. `has_errors_file`: an earlier attempt left one, which may have become stale."""

    shard: ObjectInfo
    part: str
    has_errors_file: bool = False


class Why(StrEnum):
    """Why a shard is to be tokenised, in the words of the plan's line."""

    NEW = "new"
    CHANGED = "changed"
    QUARANTINED = "tried again"  # an earlier run gave it up
    NO_PART = "without a good part"  # it is missing, torn, of other bytes or of another model, or its errors file is


@dataclass(frozen=True)
class Plan:
    """`todo` and `done` are together all the shards listed. `removed`: shards of earlier runs that are listed no
    longer, as the ledger has them. `adopted` are those of `done` and `removed` whose part was there without a row
    in the ledger, or newer than it (a kill in between). `num_left`: shards of the run that this driver leaves alone,
    which have no result yet (in a retry)."""

    todo: tuple[ShardTask, ...]
    done: tuple[ShardResult, ...]
    adopted: tuple[ShardResult, ...]
    removed: tuple[ShardResult, ...] = ()
    todo_by_reason: Mapping[Why, int] = field(default_factory=dict)
    num_left: int = 0

    @property
    def num_shards(self) -> int:
        return len(self.todo) + len(self.done) + self.num_left

    @property
    def num_lost(self) -> int:
        """Of `todo`, those that are quarantined since an earlier run."""
        return self.todo_by_reason.get(Why.QUARANTINED, 0)

    def describe(self) -> str:
        """One line for the log."""
        adopted = f" ({len(self.adopted):,} of them without a ledger row)" if self.adopted else ""
        todo = [f"{self.todo_by_reason[why]:,} {why}" for why in Why if self.todo_by_reason.get(why)]
        kept = f"; {len(self.removed):,} removed from the input keep their parts (--prune drops them)"
        counts = ", ".join([f"{len(self.done):,} done{adopted}", *todo])
        return f"{self.num_shards:,} shards: {counts}" + (kept if self.removed else "")


@contextmanager
def collector_paused() -> Iterator[None]:
    """Inside, Python's collector of cycles rests: a plan makes millions of objects and no cycle, and looking at all of
    them again and again took a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def make_plan(shards: Iterable[ObjectInfo], output: OutputPrefix, ledger: Ledger, table: TableSpec) -> Plan:
    """One listing of tokens/ and of errors/, the ledger, and one footer for each part that it doesn't know."""
    parts, errors, rows = listed(output.tokens_folder()), listed(output.errors_folder()), ledger.read()
    named = _by_part(shards)
    known = {name: rows.pop(storage.public_url(shard.url), None) for name, shard in named.items()}
    done = {
        name: row
        for name, row in known.items()
        if row is not None and _is_done(row, named[name], parts.get(name), has_errors=name in errors)
    }
    unknown = [name for name in named if name in parts and name not in done and not _is_quarantined(known[name])]
    adopted = _adopt((parts[name] for name in unknown), table, errors, named)
    removed, adopted_removed = _removed(rows, parts, named, table)
    todo = [name for name in named if name not in done and name not in adopted]
    return Plan(
        tuple(ShardTask(named[name], name, name in errors) for name in todo),
        (*done.values(), *adopted.values()),
        (*adopted.values(), *adopted_removed.values()),
        tuple(removed.values()),
        Counter(_why(named[name], known[name], parts.get(name)) for name in todo),
    )


def _by_part(shards: Iterable[ObjectInfo]) -> dict[str, ObjectInfo]:
    named: dict[str, ObjectInfo] = {}
    for shard in shards:
        other = named.setdefault(part_name(shard.url), shard)
        if other is not shard:
            one, two = storage.public_url(shard.url), storage.public_url(other.url)
            raise RunMismatch(f"{one} and {two} would have the same part: give one of them another name")
    return named


def _is_same_shard(row: ShardResult, shard: ObjectInfo) -> bool:
    return (row.size_bytes, row.etag) == (shard.size_bytes, shard.etag)


def _is_whole(row: ShardResult, part: ObjectInfo | None) -> bool:
    return row.state is ShardState.DONE and part is not None and part.size_bytes == row.part_bytes


def _is_done(row: ShardResult, shard: ObjectInfo, part: ObjectInfo | None, *, has_errors: bool) -> bool:
    """The row is of these very bytes of the shard, and what it promises is there."""
    return _is_same_shard(row, shard) and _is_whole(row, part) and has_errors == (row.num_failed > 0)


def _is_quarantined(row: ShardResult | None) -> bool:
    """Then the errors file may be older than the part, so that nobody knows whether they belong together."""
    return row is not None and row.state is ShardState.QUARANTINED


def _why(shard: ObjectInfo, row: ShardResult | None, part: ObjectInfo | None) -> Why:
    if row is None or row.state is ShardState.REMOVED:
        return Why.NEW if part is None else Why.NO_PART
    if row.state is ShardState.QUARANTINED:
        return Why.QUARANTINED
    return Why.NO_PART if _is_same_shard(row, shard) else Why.CHANGED


def _removed(
    rows: Mapping[str, ShardResult], parts: Mapping[str, ObjectInfo], named: Mapping[str, ObjectInfo], table: TableSpec
) -> tuple[dict[str, ShardResult], dict[str, ShardResult]]:
    """What earlier runs left of shards that are listed no longer, by part name: all, and those of them that the
    ledger doesn't know. `rows`: of the ledger, of shards not listed. Errors files are not looked at: whether they
    fit or not, there they are."""
    left = {part_name(url): row for url, row in rows.items() if row.state is not ShardState.REMOVED}
    known = {name for name, row in left.items() if _is_quarantined(row) or _is_whole(row, parts.get(name))}
    unknown = (part for name, part in parts.items() if name not in named and name not in known)
    adopted = _adopt(unknown, table)
    without_part = {name: replace(row, part=None, num_rows=0) for name, row in left.items() if name not in parts}
    return {**left, **without_part, **adopted}, adopted


def _adopt(
    parts: Iterable[ObjectInfo],
    table: TableSpec,
    errors: Mapping[str, ObjectInfo] | None = None,
    named: Mapping[str, ObjectInfo] | None = None,
) -> dict[str, ShardResult]:
    """The ledger rows of parts that the ledger doesn't know, by part name; none for one that is torn or of another
    model, and, where `named` and `errors` are given, of other shard bytes or without its errors file."""
    with ThreadPoolExecutor(FOOTER_READERS) as executor:
        found = (row for row in executor.map(lambda part: _row_of_part(part, table), parts) if row is not None)
        by_name = {str(row.part): row for row in found}
    if named is None or errors is None:
        return by_name
    return {
        name: row
        for name, row in by_name.items()
        if _is_same_shard(row, named[name]) and (name in errors) == (row.num_failed > 0)
    }


def _row_of_part(part: ObjectInfo, table: TableSpec) -> ShardResult | None:
    """From its footer; None when it is torn, of another model, or a copy under another's name."""
    try:
        footer = read_footer(part.url)
    except ValueError:
        return None
    wanted, name = table.to_json(), storage.base_name(part.url)
    if {key: footer.get(key) for key in wanted} != wanted or part_name(footer["shard"]) != name:
        return None
    return ShardResult(
        footer["shard"], footer["shard_size"], footer["shard_etag"], ShardState.DONE,
        name, footer["num_rows"], footer["num_failed"], part.size_bytes,
    )  # fmt: skip


@dataclass(frozen=True)
class PlanRecord:
    """plan.json: what the last driver set out to do, so that anybody can say how far it is, and try again what
    failed. `settings` are that driver's, their URLs without credentials and query strings."""

    num_shards: int
    num_done: int  # when it began
    num_lost: int  # quarantined then, and tried again
    num_images: int  # in those done
    started: float  # seconds since the epoch
    removed: tuple[str, ...] = ()  # shards of earlier runs that it did not list
    settings: Mapping[str, Any] = field(default_factory=dict)


def record_plan(output: OutputPrefix, plan: Plan, settings: Mapping[str, Any]) -> None:
    """Write plan.json; where there is nothing to do, only if it would say something else."""
    removed = tuple(sorted(row.shard for row in plan.removed))
    num_images = sum(row.num_rows for row in plan.done)
    record = PlanRecord(
        plan.num_shards, len(plan.done), plan.num_lost, num_images, time.time(), removed, dict(settings)
    )
    if plan.todo or _said(record) != _said(read_plan_record(output)):
        storage.publish(output.file("plan.json"), json.dumps(asdict(record)).encode())


def _said(record: PlanRecord | None) -> tuple[Any, ...] | None:
    return None if record is None else (record.num_shards, record.removed, record.settings)


def read_plan_record(output: OutputPrefix) -> PlanRecord | None:
    """None where no driver had work yet. Raises Damaged, StorageError."""
    url = output.file("plan.json")
    stored = read_json(url)
    try:
        return None if stored is None else PlanRecord(**{**stored, "removed": tuple(stored.get("removed", ()))})
    except TypeError as error:  # a field is missing, or unknown here
        raise Damaged(f"{storage.public_url(url)} is damaged: {error}") from error
