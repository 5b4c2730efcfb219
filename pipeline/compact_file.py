"""One file of a compacted run: the rows of several parts as one Parquet file, held against those parts; and its map.

Bytes in, bytes out: which parts go together, and what is written where, is compact.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import repeat
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import Damaged
from pipeline.part_check import has_schema, row_faults
from pipeline.records import ShardState
from pipeline.token_table import (
    ERRORS_SCHEMA,
    ROW_GROUP_ROWS,
    WRITE_OPTIONS,
    TableSpec,
    read_table,
    schema_with_footer,
    token_schema,
)


@dataclass(frozen=True, slots=True)
class ShardPlace:
    """Where the rows of one shard are: a row of the map. `part` and `part_sha256`: of the file that they were taken
    from; None for a quarantined shard, which has an error and no rows. The errors of `file` are in a file of the same
    name under errors/, where there are any."""

    shard: str
    size_bytes: int
    etag: str
    state: ShardState
    part: str | None
    part_sha256: str | None
    file: str
    first_row: int
    num_rows: int
    num_failed: int
    file_bytes: int
    file_sha256: str
    errors_bytes: int
    errors_sha256: str | None


@dataclass(frozen=True)
class Held:
    """A file of the run, in memory. `url` is for what is said of it."""

    url: str
    data: bytes


_TYPES = {"str": pa.string(), "int": pa.int64(), "ShardState": pa.string()}
MAP_SCHEMA = pa.schema([
    pa.field(f.name, _TYPES[str(f.type).removesuffix(" | None")], nullable="None" in str(f.type))
    for f in fields(ShardPlace)
])  # fmt: skip


def merged_rows(table: TableSpec, parts: Sequence[Held], footer: dict[str, Any]) -> bytes:
    """The rows of these parts, in their order, in row groups of ROW_GROUP_ROWS. Raises Damaged."""
    tables = (_rows_of(part, token_schema(table)) for part in parts)
    return _written(tables, schema_with_footer(table, {**table.to_json(), **footer}))


def merged_errors(files: Sequence[Held]) -> bytes:
    """The same of errors files."""
    return _written((_rows_of(file, ERRORS_SCHEMA) for file in files), ERRORS_SCHEMA)


def _written(tables: Iterable[pa.Table], schema: pa.Schema) -> bytes:
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, **WRITE_OPTIONS) as writer:
        for rows in cut(tables, repeat(ROW_GROUP_ROWS), schema):
            writer.write_table(pa.Table.from_arrays(rows.columns, schema=schema), row_group_size=ROW_GROUP_ROWS)
    return bytes(sink.getvalue())


def require_same_rows(merged: bytes, files: Sequence[Held], schema: pa.Schema) -> None:
    """Raises Damaged unless `merged` has just the rows of `files`, in their order."""
    groups, lengths = _row_groups(merged, schema), [_opened(file.data).metadata.num_rows for file in files]
    if _opened(merged).metadata.num_rows != sum(lengths):
        raise Damaged(f"{_opened(merged).metadata.num_rows} rows were written of {sum(lengths)}")
    for file, rows in zip(files, cut(groups, lengths, schema), strict=True):
        if not _is_same(_rows_of(file, schema), rows):
            raise Damaged("other rows were written than those of the parts")


def _is_same(one: pa.Table, other: pa.Table) -> bool:
    """In every value. Arrow has it that NaN is not NaN, so of floats the bits are compared."""
    pairs = zip(one.columns, other.columns, strict=True)
    return len(one) == len(other) and all(_bits(a).equals(_bits(b)) for a, b in pairs)


def _bits(column: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    if not pa.types.is_floating(column.type):
        return column
    return column.combine_chunks().view(pa.int32() if column.type.bit_width == 32 else pa.int64())


def cut(tables: Iterable[pa.Table], lengths: Iterable[int], schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows of `tables` in pieces of these lengths; the last one is shorter where there are no more."""
    more = iter(tables)
    waiting = schema.empty_table()
    for length in lengths:
        while len(waiting) < length and (table := next(more, None)) is not None:
            waiting = pa.concat_tables([waiting, table.replace_schema_metadata(schema.metadata)])
        if length and not len(waiting):
            return
        yield waiting.slice(0, length)
        waiting = waiting.slice(length)


def _rows_of(file: Held, schema: pa.Schema) -> pa.Table:
    try:
        return _rows(file.data, schema)
    except Damaged as error:
        raise Damaged(f"{storage.public_url(file.url)}: {error}; dvae verify says more") from error


def _rows(data: bytes, schema: pa.Schema) -> pa.Table:
    return pa.concat_tables([schema.empty_table(), *_row_groups(data, schema)])


def _row_groups(data: bytes, schema: pa.Schema) -> Iterator[pa.Table]:
    """Raises Damaged where the bytes are no Parquet file of this schema, with a checksum in every page."""
    file = _opened(data)
    if not has_schema(file.schema_arrow, schema):
        raise Damaged("its Parquet schema is not that of the run")
    for number in range(file.num_row_groups):
        rows = _readable(partial(file.read_row_group, number, use_threads=False))
        yield rows.replace_schema_metadata(None)


def _opened(data: bytes) -> pq.ParquetFile:
    return _readable(lambda: pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True))


def _readable(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (pa.ArrowException, OSError) as error:
        raise Damaged(f"it is no whole Parquet file: {error}") from error


def faults(places: Sequence[ShardPlace], rows: bytes, errors: bytes, table: TableSpec) -> Iterator[str]:
    """What of a merged file and its errors file (no bytes: there is none) is not as the map has it. Raises Damaged."""
    failed = _failed_indexes(errors) if errors else {}
    num_rows, lengths = _opened(rows).metadata.num_rows, [place.num_rows for place in places]
    if num_rows != sum(lengths):
        yield f"{num_rows} rows of {sum(lengths)}"
        return
    schema = token_schema(table)
    for place, piece in zip(places, cut(_row_groups(rows, schema), lengths, schema), strict=True):
        for fault in _shard_faults(place, piece, failed.get(place.shard, []), table):
            yield f"{place.shard}: {fault}"
    if strange := failed.keys() - {place.shard for place in places}:
        yield f"{min(strange)}: its errors are among those of other shards"


def _shard_faults(place: ShardPlace, rows: pa.Table, failed: list[int | None], table: TableSpec) -> Iterator[str]:
    """Rows and errors together must be the samples 0, 1, 2 … of the shard, each once."""
    yield from row_faults(rows, place.shard, place.size_bytes, table)
    if place.state is ShardState.QUARANTINED:
        if failed != [None] or len(rows):
            yield f"it was given up, and has {len(rows)} rows and {len(failed)} errors"
        return
    if (len(rows), len(failed)) != (place.num_rows, place.num_failed):
        yield f"{len(rows)} rows and {len(failed)} errors of {place.num_rows} and {place.num_failed}"
        return
    indexes = [*rows["index"].to_pylist(), *(-1 if index is None else index for index in failed)]
    if sorted(indexes) != list(range(len(indexes))):
        yield "its samples are not all accounted for, each once"


def _failed_indexes(data: bytes) -> dict[str, list[int | None]]:
    """By shard the indexes of what failed, None of a whole shard."""
    found: dict[str, list[int | None]] = {}
    rows = _rows(data, ERRORS_SCHEMA)
    for shard, index in zip(rows["shard"].to_pylist(), rows["index"].to_pylist(), strict=True):
        found.setdefault(shard, []).append(index)
    return found


# The map


def map_bytes(places: Sequence[ShardPlace]) -> bytes:
    columns = {name: [getattr(place, name) for place in places] for name in MAP_SCHEMA.names}
    columns["state"] = [state.value for state in columns["state"]]
    return _written([pa.table(columns, schema=MAP_SCHEMA)], MAP_SCHEMA)


def read_map(data: bytes) -> list[ShardPlace]:
    """What `map_bytes` wrote. Raises Damaged, ValueError."""
    rows = _rows(data, MAP_SCHEMA).to_pylist()
    return [ShardPlace(**{**row, "state": ShardState(row["state"])}) for row in rows]


def find_shard(map_urls: Sequence[str], shard: str) -> tuple[int, str] | None:
    """Its size and etag. Raises Damaged, StorageError."""
    try:
        rows = read_table(map_urls, ["size_bytes", "etag"], ds.field("shard") == shard).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise Damaged(f"a map of shards cannot be read: {error}") from error
    return (rows[0]["size_bytes"], rows[0]["etag"]) if rows else None
