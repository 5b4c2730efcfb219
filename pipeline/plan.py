"""What is to be done: the shards listed, less the parts that are there and right. Reads no shard."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipeline import storage
from pipeline.errors import RunMismatch
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix, listed, part_name
from pipeline.records import ObjectInfo, ShardResult, ShardState
from pipeline.token_table import read_footer

FOOTER_READERS = 16


@dataclass(frozen=True)
class ShardTask:
    """One shard to tokenise. `has_errors_file`: an earlier attempt left one, which may have become stale."""

    shard: ObjectInfo
    part: str
    has_errors_file: bool = False


@dataclass(frozen=True)
class Plan:
    """`todo` and `done` together are all the shards. `adopted` are those of `done` whose part was there without
    a row in the ledger (a kill in between)."""

    todo: tuple[ShardTask, ...]
    done: tuple[ShardResult, ...]
    adopted: tuple[ShardResult, ...]

    @property
    def num_shards(self) -> int:
        return len(self.todo) + len(self.done)


def make_plan(shards: Iterable[ObjectInfo], output: OutputPrefix, ledger: Ledger) -> Plan:
    """One listing of tokens/ and of errors/, the ledger, and one footer for each part that it doesn't know."""
    parts, errors, rows = listed(output.tokens_folder()), listed(output.errors_folder()), ledger.read()
    named = _by_part(shards)
    done = {name: row for name, shard in named.items() if (row := _done(name, shard, parts, rows))}
    unknown = [name for name, shard in named.items() if name in parts and storage.public_url(shard.url) not in rows]
    with ThreadPoolExecutor(FOOTER_READERS) as executor:
        found = executor.map(lambda name: _adopt(named[name], parts[name]), unknown)
        adopted = {name: row for name, row in zip(unknown, found, strict=True) if row is not None}
    todo = (
        ShardTask(shard, name, name in errors)
        for name, shard in named.items()
        if name not in done and name not in adopted
    )
    return Plan(tuple(todo), (*done.values(), *adopted.values()), tuple(adopted.values()))


def _by_part(shards: Iterable[ObjectInfo]) -> dict[str, ObjectInfo]:
    named: dict[str, ObjectInfo] = {}
    for shard in shards:
        other = named.setdefault(part_name(shard.url), shard)
        if other is not shard:
            raise RunMismatch(f"{shard.url} and {other.url} would have the same part: give one another name")
    return named


def _done(
    name: str, shard: ObjectInfo, parts: Mapping[str, ObjectInfo], rows: Mapping[str, ShardResult]
) -> ShardResult | None:
    row = rows.get(storage.public_url(shard.url))
    whole = row is not None and name in parts and parts[name].size_bytes == row.part_bytes
    if row is None or not whole or row.state is not ShardState.DONE:
        return None
    return row if (row.size_bytes, row.etag) == (shard.size_bytes, shard.etag) else None


def _adopt(shard: ObjectInfo, part: ObjectInfo) -> ShardResult | None:
    """The ledger row of a part that the ledger doesn't know; None when it is of other shard bytes or torn."""
    try:
        footer = read_footer(part.url)
    except ValueError:
        return None
    if (footer["shard_size"], footer["shard_etag"]) != (shard.size_bytes, shard.etag):
        return None
    return ShardResult(
        storage.public_url(shard.url), shard.size_bytes, shard.etag, ShardState.DONE,
        storage.base_name(part.url), footer["num_rows"], footer["num_failed"], part.size_bytes,
    )  # fmt: skip
