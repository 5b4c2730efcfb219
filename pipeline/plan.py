"""What is to be done: the shards listed, less the parts that are there and right. Reads no shard."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from pipeline import storage
from pipeline.errors import RunMismatch
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix, listed, part_name, read_json
from pipeline.records import ObjectInfo, ShardResult, ShardState
from pipeline.token_table import read_footer

FOOTER_READERS = 16


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to tokenise. `has_errors_file`: an earlier attempt left one, which may have become stale."""

    shard: ObjectInfo
    part: str
    has_errors_file: bool = False


@dataclass(frozen=True)
class Plan:
    """`todo` and `done` together are all the shards. `adopted` are those of `done` whose part was there without
    a row in the ledger, or newer than it (a kill in between)."""

    todo: tuple[ShardTask, ...]
    done: tuple[ShardResult, ...]
    adopted: tuple[ShardResult, ...]
    num_lost: int = 0  # of `todo`, those that are quarantined since an earlier run

    @property
    def num_shards(self) -> int:
        return len(self.todo) + len(self.done)


@dataclass(frozen=True)
class PlanRecord:
    """plan.json: what the last driver that had work set out to do, so that anybody can say how far it is."""

    num_shards: int
    num_done: int  # when it began
    num_lost: int  # quarantined then, and tried again
    num_images: int  # in those
    started: float  # seconds since the epoch


def record_plan(output: OutputPrefix, plan: Plan) -> None:
    record = PlanRecord(
        plan.num_shards, len(plan.done), plan.num_lost, sum(row.num_rows for row in plan.done), time.time()
    )
    storage.publish(output.file("plan.json"), json.dumps(asdict(record)).encode())


def read_plan_record(output: OutputPrefix) -> PlanRecord | None:
    """None where no driver had work yet. Raises StorageError when it is damaged."""
    stored = read_json(output.file("plan.json"))
    return None if stored is None else PlanRecord(**stored)


def make_plan(shards: Iterable[ObjectInfo], output: OutputPrefix, ledger: Ledger) -> Plan:
    """One listing of tokens/ and of errors/, the ledger, and one footer for each part that it doesn't know."""
    parts, errors, rows = listed(output.tokens_folder()), listed(output.errors_folder()), ledger.read()
    named = _by_part(shards)
    known = {name: rows.get(storage.public_url(shard.url)) for name, shard in named.items()}
    done = {
        name: row
        for name, row in known.items()
        if row is not None and _is_done(row, named[name], parts.get(name), has_errors=name in errors)
    }
    unknown = [name for name in named if name in parts and name not in done and not _is_quarantined(known[name])]
    with ThreadPoolExecutor(FOOTER_READERS) as executor:
        found = executor.map(lambda name: _adopt(named[name], parts[name], has_errors=name in errors), unknown)
        adopted = {name: row for name, row in zip(unknown, found, strict=True) if row is not None}
    todo = (
        ShardTask(shard, name, name in errors)
        for name, shard in named.items()
        if name not in done and name not in adopted
    )
    num_lost = sum(_is_quarantined(row) for row in known.values())
    return Plan(tuple(todo), (*done.values(), *adopted.values()), tuple(adopted.values()), num_lost)


def _by_part(shards: Iterable[ObjectInfo]) -> dict[str, ObjectInfo]:
    named: dict[str, ObjectInfo] = {}
    for shard in shards:
        other = named.setdefault(part_name(shard.url), shard)
        if other is not shard:
            one, two = storage.public_url(shard.url), storage.public_url(other.url)
            raise RunMismatch(f"{one} and {two} would have the same part: give one of them another name")
    return named


def _is_done(row: ShardResult, shard: ObjectInfo, part: ObjectInfo | None, *, has_errors: bool) -> bool:
    """The row is of these very bytes of the shard, and what it promises is there."""
    same_shard = (row.size_bytes, row.etag) == (shard.size_bytes, shard.etag)
    whole = part is not None and part.size_bytes == row.part_bytes
    return row.state is ShardState.DONE and same_shard and whole and has_errors == (row.num_failed > 0)


def _is_quarantined(row: ShardResult | None) -> bool:
    """Then the errors file may be older than the part, so that nobody knows whether they belong together."""
    return row is not None and row.state is ShardState.QUARANTINED


def _adopt(shard: ObjectInfo, part: ObjectInfo, *, has_errors: bool) -> ShardResult | None:
    """The ledger row of a part that the ledger doesn't know; None when it is of other shard bytes, or torn, or
    its errors file isn't there."""
    try:
        footer = read_footer(part.url)
    except ValueError:
        return None
    same_shard = (footer["shard_size"], footer["shard_etag"]) == (shard.size_bytes, shard.etag)
    if not same_shard or has_errors != (footer["num_failed"] > 0):
        return None
    return ShardResult(
        storage.public_url(shard.url), shard.size_bytes, shard.etag, ShardState.DONE,
        storage.base_name(part.url), footer["num_rows"], footer["num_failed"], part.size_bytes,
    )  # fmt: skip
