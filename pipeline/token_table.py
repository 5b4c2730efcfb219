"""The Parquet schemas of tokens and errors, to and from bytes. The only module that knows them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import storage
from pipeline.errors import Damaged, StorageError
from pipeline.metadata import MetadataColumn
from pipeline.parquet_access import asked_again, file_end
from pipeline.records import DecodedSample, FailureReason, ObjectInfo, SampleFailure, Stage

# B images, H W token rows and columns, N = H * W

SCHEMA_VERSION = 1  # of what is written; tests/golden has a part of each that ever was
READABLE_VERSIONS = frozenset({1})
ROW_GROUP_ROWS = 2048  # the writer holds about 10 KB a row of 1,024 tokens until a group is whole
INT16_CODES = 32_768  # signed types only: some readers refuse Parquet's unsigned ones
# Pages carry a checksum, so that flipped bytes are an error wherever a part is read, not other tokens.
CHECKED_PARQUET = ds.ParquetFileFormat(
    default_fragment_scan_options=ds.ParquetFragmentScanOptions(page_checksum_verification=True)
)
_ARROW_TYPES = {
    "string": pa.string(), "int32": pa.int32(), "int64": pa.int64(), "float32": pa.float32(),
    "float64": pa.float64(), "bool": pa.bool_(),
}  # fmt: skip

ERRORS_SCHEMA = pa.schema([
    pa.field("shard", pa.string(), nullable=False),
    pa.field("key", pa.string()),
    pa.field("index", pa.int32()),
    pa.field("offset", pa.int64()),
    pa.field("size", pa.int64()),
    pa.field("stage", pa.string(), nullable=False),
    pa.field("reason", pa.string(), nullable=False),
    pa.field("message", pa.string(), nullable=False),
])  # fmt: skip


@dataclass(frozen=True)
class TableSpec:
    """What the token table of a run looks like, and which tokenizer fills it."""

    tokenizer_id: str
    grid: tuple[int, int]
    codebook_size: int
    image_spec: dict[str, Any]
    columns: tuple[MetadataColumn, ...] = ()
    schema_version: int = SCHEMA_VERSION  # of the parts: an older run keeps its own

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def token_type(self) -> pa.DataType:
        return pa.from_numpy_dtype(self.token_dtype)

    @property
    def token_dtype(self) -> np.dtype[np.signedinteger[Any]]:
        return np.dtype(np.int16 if self.codebook_size <= INT16_CODES else np.int32)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": self.schema_version,
            "tokenizer_id": self.tokenizer_id,
            "grid": list(self.grid),
            "codebook_size": self.codebook_size,
            "image_spec": self.image_spec,
            "columns": [{"name": c.name, "from": c.source, "type": c.type} for c in self.columns],  # in their order
        }

    @classmethod
    def from_json(cls, run: Mapping[str, Any]) -> TableSpec:
        """The other way round, of run.json or a footer, of every version ever written. Raises ValueError when a newer
        version wrote it, KeyError, TypeError."""
        version = run["schema_version"]
        if version not in READABLE_VERSIONS:
            known = f"this version knows {SCHEMA_VERSION}; install a newer one"
            raise ValueError(f"the tokens have schema {version}, {known}")
        height, width = run["grid"]
        columns = tuple(MetadataColumn(c["name"], c["from"], c["type"]) for c in run["columns"])
        return cls(run["tokenizer_id"], (height, width), run["codebook_size"], run["image_spec"], columns, version)


def token_schema(spec: TableSpec) -> pa.Schema:
    """key, shard, index, tokens (N, row-major), width and height, offset and size, then the metadata columns."""
    tokens = pa.list_(pa.field("element", spec.token_type, nullable=False), spec.num_tokens)
    own = [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("tokens", tokens, nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("offset", pa.int64()),
        pa.field("size", pa.int64(), nullable=False),
    ]
    return pa.schema(own + [pa.field(c.name, _ARROW_TYPES[c.type]) for c in spec.columns])


def narrow_tokens(tokens_BHW: NDArray[Any], spec: TableSpec) -> NDArray[np.signedinteger[Any]]:
    """tokens_BN in the table's type. Raises ValueError when the shape or a token is not the tokenizer's own."""
    if tokens_BHW.shape[1:] != spec.grid:
        raise ValueError(f"the encoder gave a grid of {tokens_BHW.shape[1:]}, it promised {spec.grid}")
    if not np.issubdtype(tokens_BHW.dtype, np.integer):
        raise ValueError(f"the encoder gave tokens of type {tokens_BHW.dtype}, not integers")
    if tokens_BHW.size and not 0 <= tokens_BHW.min() <= tokens_BHW.max() < spec.codebook_size:
        span = f"{tokens_BHW.min()}..{tokens_BHW.max()}"
        raise ValueError(f"the encoder gave tokens {span}, outside [0, {spec.codebook_size})")
    return tokens_BHW.reshape(len(tokens_BHW), spec.num_tokens).astype(spec.token_dtype)


def part_bytes(
    spec: TableSpec,
    shard: ObjectInfo,
    samples: Sequence[DecodedSample],
    tokens_BN: NDArray[Any],
    num_failed: int,
) -> bytes:
    """One part, whole: a pure function of its arguments."""
    footer = {
        **spec.to_json(),
        "shard": storage.public_url(shard.url),
        "shard_size": shard.size_bytes,
        "shard_etag": shard.etag,
        "num_rows": len(samples),
        "num_failed": num_failed,
    }
    schema = token_schema(spec).with_metadata({b"dvae": _canonical(footer)})
    return _parquet(pa.Table.from_arrays(_columns(spec, shard, samples, tokens_BN, schema), schema=schema))


def _columns(
    spec: TableSpec,
    shard: ObjectInfo,
    samples: Sequence[DecodedSample],
    tokens_BN: NDArray[Any],
    schema: pa.Schema,
) -> list[pa.Array]:
    def column(name: str, values: list[Any]) -> pa.Array:
        return pa.array(values, schema.field(name).type)

    tokens = pa.FixedSizeListArray.from_arrays(
        pa.array(tokens_BN.reshape(-1), spec.token_type), type=schema.field("tokens").type
    )
    return [
        column("key", [s.key for s in samples]),
        column("shard", [storage.public_url(shard.url)] * len(samples)),
        column("index", [s.index for s in samples]),
        tokens,
        column("width", [s.width for s in samples]),
        column("height", [s.height for s in samples]),
        column("offset", [s.offset for s in samples]),
        column("size", [s.size for s in samples]),
        *(column(c.name, [s.metadata[c.name] for s in samples]) for c in spec.columns),
    ]


def errors_bytes(shard: ObjectInfo, failures: Sequence[SampleFailure]) -> bytes:
    """The errors of one shard, whole."""
    rows = [
        {
            "shard": storage.public_url(shard.url),
            "key": f.key,
            "index": f.index,
            "offset": f.offset,
            "size": f.size,
            "stage": f.stage.value,
            "reason": f.reason.value,
            "message": storage.public_text(f.message).encode("utf-8", "replace").decode(),
        }
        for f in failures
    ]
    return _parquet(pa.Table.from_pylist(rows, schema=ERRORS_SCHEMA))


def _canonical(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, compression="zstd", use_dictionary=True, row_group_size=ROW_GROUP_ROWS, write_page_checksum=True
    )
    return bytes(sink.getvalue())


def read_footer(url: str) -> dict[str, Any]:
    """What `part_bytes` wrote beside the rows. Raises ValueError when there is no whole part of ours, and StorageError
    when that cannot be told."""
    info = storage.stat(url)
    if info is None:
        raise ValueError(f"{storage.public_url(url)} is not a whole part of a run: there is no such file")
    end = file_end(info)
    try:
        metadata = pq.read_metadata(pa.BufferReader(end)).metadata or {}
        footer = json.loads(metadata[b"dvae"])
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:  # a bad thrift header is an OSError
        raise ValueError(f"{storage.public_url(url)} is not a whole part of a run: {error}") from error
    return dict(footer)


def read_table(
    urls: Sequence[str], columns: Sequence[str] | None = None, where: ds.Expression | None = None
) -> pa.Table:
    """Rows of the Parquet files at `urls` (all on one store), in the order of the list. Raises OSError or
    ArrowException where the bytes are not those that were written, FileNotFoundError, and StorageError of the store."""
    if not urls:
        return pa.table({})
    return asked_again(urls[0], lambda: _read_table(urls, columns, where))


def _read_table(urls: Sequence[str], columns: Sequence[str] | None, where: ds.Expression | None) -> pa.Table:
    fs = storage.filesystem(urls[0])[0]
    paths = [storage.filesystem(url)[1] for url in urls]
    dataset = ds.dataset(paths, format=CHECKED_PARQUET, filesystem=fs)
    return dataset.to_table(columns=list(columns) if columns else None, filter=where)


def read_tokens(
    urls: Sequence[str], keys: Sequence[str] | None = None, limit: int | None = None
) -> list[dict[str, Any]]:
    """Token rows as dicts, those of `keys` or the first `limit`; `tokens` is an array of N integers."""
    rows: list[dict[str, Any]] = []
    for url in urls:
        if limit is not None and len(rows) >= limit:
            break
        table = read_table([url], where=None if keys is None else ds.field("key").isin(list(keys)))
        rows += _token_rows(table)
    return rows if limit is None else rows[:limit]


def read_tokens_at(url: str, indexes: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
    """As `read_tokens`, `columns` and the tokens of the samples with these indexes that have a row. Raises
    StorageError."""
    try:
        table = read_table([url], [*columns, "tokens"], where=ds.field("index").isin(list(indexes)))
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"{storage.public_url(url)} cannot be read: {error}") from error
    return _token_rows(table)


def _token_rows(table: pa.Table) -> list[dict[str, Any]]:
    if not table.num_rows:
        return []
    tokens_BN = table["tokens"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
    plain = table.drop_columns(["tokens"]).to_pylist()
    return [{**row, "tokens": tokens_N} for row, tokens_N in zip(plain, tokens_BN, strict=True)]


def read_errors(url: str) -> list[SampleFailure]:
    """What `errors_bytes` wrote. Raises FileNotFoundError, StorageError and, when the file is damaged, Damaged."""
    data = storage.read_bytes(url)
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        rows = file.read(ERRORS_SCHEMA.names, use_threads=False).to_pylist()
        return [_failure(row) for row in rows]
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise Damaged(f"{storage.public_url(url)} is no whole errors file: {error}") from error


def _failure(row: dict[str, Any]) -> SampleFailure:
    stage, reason = Stage(row["stage"]), FailureReason(row["reason"])
    return SampleFailure(row["key"], row["index"], row["offset"], row["size"], stage, reason, row["message"])


def count_errors(urls: Sequence[str]) -> dict[str, int]:
    """Rows of the errors files by reason."""
    if not urls:
        return {}
    counts = read_table(urls, ["reason"]).group_by("reason").aggregate([("reason", "count")])
    return dict(zip(counts["reason"].to_pylist(), counts["reason_count"].to_pylist(), strict=True))
