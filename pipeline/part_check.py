"""One part or errors file, read whole or by its footer alone: what it says, and what in it cannot be right.

What the ledger says of it, and so what is to be done, is left to verify_shard.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import storage
from pipeline.parquet_access import file_end
from pipeline.records import FailureReason, ObjectInfo, Stage
from pipeline.token_table import ERRORS_SCHEMA, TableSpec, token_schema

# N rows of a file

FOOTER_FIELDS = {"shard": str, "shard_size": int, "shard_etag": str, "num_rows": int, "num_failed": int}


class NotWhole(ValueError):
    """The file is no Parquet file that can be read to its end."""


class NotOurs(ValueError):
    """The file is whole, and was not written by this project."""


@dataclass(frozen=True)
class PartContent:
    """What a part says. `sha256` and `index_N` are None where only the footer was read."""

    footer: dict[str, Any]
    num_rows: int
    faults: tuple[str, ...] = ()
    sha256: str | None = None
    index_N: NDArray[np.int32] | None = None


@dataclass(frozen=True)
class ErrorsContent:
    """What an errors file says. All but `num_rows` is empty where only the footer was read. `shard` is that of its
    first row; `quarantine` the (reason, message) of its row of stage `shard`."""

    num_rows: int
    faults: tuple[str, ...] = ()
    shard: str | None = None
    quarantine: tuple[str, str] | None = None
    index_N: NDArray[np.int32] | None = None


def read_part_footer(part: ObjectInfo, table: TableSpec) -> PartContent:
    """Raises NotWhole, NotOurs, FileNotFoundError, StorageError."""
    return _part_head(file_end(part), table)


def read_part(part: ObjectInfo, table: TableSpec) -> PartContent:
    """As `read_part_footer`, from every byte of the part."""
    data = storage.read_bytes(part.url)
    head = _part_head(data, table)
    rows = _all_rows(data)
    sha256 = hashlib.sha256(data).hexdigest()
    if not has_schema(rows.schema, token_schema(table)):
        return PartContent(head.footer, head.num_rows, head.faults, sha256)
    faults = (*head.faults, *row_faults(rows, head.footer["shard"], head.footer["shard_size"], table))
    return PartContent(head.footer, head.num_rows, faults, sha256, _index(rows))


def read_errors_footer(errors: ObjectInfo) -> ErrorsContent:
    """Raises NotWhole, NotOurs, FileNotFoundError, StorageError."""
    return ErrorsContent(_errors_head(file_end(errors)))


def read_errors(errors: ObjectInfo) -> ErrorsContent:
    """As `read_errors_footer`, from every byte of the file."""
    data = storage.read_bytes(errors.url)
    num_rows = _errors_head(data)
    rows = _all_rows(data)
    whole = rows.filter(pc.equal(rows["stage"], Stage.SHARD.value)).to_pylist()
    return ErrorsContent(
        num_rows,
        tuple(_errors_faults(rows, len(whole))),
        rows["shard"][0].as_py() if num_rows else None,
        (whole[0]["reason"], whole[0]["message"]) if whole else None,
        _index(rows.filter(pc.is_valid(rows["index"]))),
    )


def _part_head(data: bytes, table: TableSpec) -> PartContent:
    metadata = _metadata(data)
    stored, schema = metadata.metadata or {}, metadata.schema.to_arrow_schema()
    try:
        footer = dict(json.loads(stored[b"dvae"]))
    except (KeyError, ValueError, TypeError) as error:
        raise NotOurs(f"it has no footer of a part ({type(error).__name__}: {error})") from error
    if strange := [name for name, kind in FOOTER_FIELDS.items() if not isinstance(footer.get(name), kind)]:
        raise NotOurs(f"its footer does not say {', '.join(strange)}")
    faults = list(_footer_faults(footer, table))
    if not has_schema(schema, token_schema(table)):
        faults.append("its Parquet schema is not the run's")
    if metadata.num_rows != footer["num_rows"]:
        faults.append(f"it has {metadata.num_rows} rows, its footer says {footer['num_rows']}")
    return PartContent(footer, metadata.num_rows, tuple(faults))


def _errors_head(data: bytes) -> int:
    metadata = _metadata(data)
    if not has_schema(metadata.schema.to_arrow_schema(), ERRORS_SCHEMA):
        raise NotOurs("its Parquet schema is not that of errors")
    return int(metadata.num_rows)


def _metadata(data: bytes) -> pq.FileMetaData:
    if data[:4] != b"PAR1":  # pyarrow does not look there, other readers do
        raise NotWhole("it does not begin as a Parquet file")
    try:
        return pq.read_metadata(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:  # a bad thrift header is an OSError
        raise NotWhole(f"it is no whole Parquet file ({error})") from error


def _all_rows(data: bytes) -> pa.Table:
    try:
        return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise NotWhole(f"its rows cannot be read ({error})") from error


def has_schema(found: pa.Schema, wanted: pa.Schema) -> bool:
    """In every name too: pyarrow's own comparison passes over that of a list's child."""
    return str(found.remove_metadata()) == str(wanted)


def _footer_faults(footer: dict[str, Any], table: TableSpec) -> Iterator[str]:
    for name, wanted in table.to_json().items():
        if footer.get(name) != wanted:
            yield f"its footer says {name} {footer.get(name)!r}, the run has {wanted!r}"


def _index(rows: pa.Table) -> NDArray[np.int32]:
    return np.asarray(rows["index"].to_numpy(), np.int32)


def row_faults(rows: pa.Table, shard: str, shard_bytes: int, table: TableSpec) -> Iterator[str]:
    """What cannot be right in the rows of one shard."""
    tokens = rows["tokens"].combine_chunks().flatten().to_numpy()
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < table.codebook_size:
        yield f"it has tokens {tokens.min()}..{tokens.max()}, outside [0, {table.codebook_size})"
    if repeated := rows.num_rows - pc.count_distinct(rows["key"]).as_py():
        yield f"{repeated} of its keys come twice"
    if (np.diff(_index(rows)) <= 0).any():
        yield "its rows are not in the order of the shard"
    if set(rows["shard"].unique().to_pylist()) - {shard}:
        yield f"it has rows of other shards than {shard}"
    if rows.num_rows and not _lie_within(rows, shard_bytes):
        yield f"it has images outside the {shard_bytes} bytes of its shard"


def _lie_within(rows: pa.Table, shard_bytes: int) -> bool:
    """Of a compressed shard (its offsets are null) only that no size is negative."""
    first, last = rows["offset"], pc.add(rows["offset"], rows["size"])
    inside = pc.and_(pc.greater_equal(first, 0), pc.less_equal(last, shard_bytes))
    return bool(pc.min(rows["size"]).as_py() >= 0 and pc.all(inside).as_py() is not False)


def _errors_faults(rows: pa.Table, num_whole: int) -> Iterator[str]:
    if len(rows["shard"].unique()) > 1:
        yield "it has rows of several shards"
    for name, known in (("stage", Stage), ("reason", FailureReason)):
        if unknown := set(rows[name].unique().to_pylist()) - {one.value for one in known}:
            yield f"its {name} {sorted(unknown)[0]!r} is unknown"
    if num_whole and rows.num_rows > 1:
        yield "it has a row for the whole shard and others"
    if rows["index"].null_count != num_whole:
        yield "it has rows without an index"
