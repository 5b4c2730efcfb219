"""One output prefix opened for reading: what its token table is, which parts are committed, and their rows.

Who reads tokens begins here. Which row comes when in training is token_reader.py's.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import storage
from pipeline.errors import Damaged, PipelineError, StorageError
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix, listed, part_name, require_run, table_of
from pipeline.parquet_access import intact, open_parquet
from pipeline.plan import collector_paused
from pipeline.records import ObjectInfo, ShardResult, ShardState
from pipeline.token_table import ROW_GROUP_ROWS, TableSpec, read_footer, token_schema

# B rows of a batch, N = H * W tokens of a row

FOOTER_READERS = 16
READ_ROWS = 4 * ROW_GROUP_ROWS  # at a time, of one part: whole row groups, for each is decoded whole
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Part:
    """One committed part. `shard` is None where it holds the rows of several shards."""

    name: str
    url: str
    shard: str | None
    num_rows: int
    size_bytes: int


@dataclass(frozen=True)
class TokenBatch:
    """Some rows of one part, in its order: `tokens_BN` in the table's dtype, and the other columns asked for."""

    part: Part
    tokens_BN: NDArray[np.signedinteger[Any]]
    columns: pa.Table

    def __len__(self) -> int:
        return len(self.tokens_BN)


@dataclass(frozen=True)
class TokenRun:
    """`parts`: all that were committed when the run was opened, by name. Those of shards that are quarantined, or tried
    again just now, are none of them. `missing`: names of parts that the ledger says are there, and that are not."""

    output: OutputPrefix
    description: Mapping[str, Any]  # run.json
    table: TableSpec
    parts: tuple[Part, ...]
    missing: tuple[str, ...] = ()

    @classmethod
    def open(cls, url: str) -> TokenRun:
        """One reading of run.json and the ledger, one listing of tokens/, and one footer for each part that the ledger
        doesn't know (all, where there is none). Raises NoRun, RunMismatch (a newer schema), Damaged, StorageError."""
        output = OutputPrefix(storage.normalize(url))
        description = require_run(output)
        table = table_of(output, description)
        with collector_paused():
            parts, missing = _committed(output, table)
            if missing:  # or dropped between the reading and the listing
                parts, missing = _committed(output, table)
        return cls(output, description, table, parts, missing)

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts)

    def read_part(self, part: Part, columns: Sequence[str] | None = None) -> pa.Table:
        """Its rows, all columns or those of these names, in the order asked for. Raises as `read_rows`."""
        return self.read_rows(part, 0, part.num_rows, columns)

    def read_rows(self, part: Part, start: int, stop: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows `start` to `stop` of a part, from the row groups that hold them. Raises Damaged where bytes are not
        those that were written, StorageError where the store fails or the part is another than when the run was
        opened, PipelineError for a column that there is not."""
        names = self._names(columns)
        try:
            return intact(part.url, lambda: _read_rows(self._opened(part), start, stop, names))
        except FileNotFoundError as error:
            raise _changed(part, "it is gone") from error

    def batches(
        self, parts: Iterable[Part], columns: Sequence[str] = (), rows: int = ROW_GROUP_ROWS
    ) -> Iterator[TokenBatch]:
        """All rows of these parts, in their order, at most `rows` at a time and never of two parts. Holds READ_ROWS
        rows in memory, or what `rows` comes to in whole row groups. Raises as `read_rows`."""
        names = ["tokens", *(name for name in columns if name != "tokens")]
        step = max(READ_ROWS, -(-rows // ROW_GROUP_ROWS) * ROW_GROUP_ROWS)
        for part in parts:
            for start in range(0, part.num_rows, step):
                table = self.read_rows(part, start, min(start + step, part.num_rows), names)
                yield from (self._batch(part, table.slice(first, rows)) for first in range(0, len(table), rows))

    def _batch(self, part: Part, rows: pa.Table) -> TokenBatch:
        return TokenBatch(part, tokens_of(rows, self.table), rows.drop_columns(["tokens"]))

    def _names(self, columns: Sequence[str] | None) -> list[str]:
        known = token_schema(self.table).names
        if strange := [name for name in columns or () if name not in known]:
            where = storage.public_url(self.output.url)
            raise PipelineError(f"{where} has no column {strange[0]!r}; its columns are {', '.join(known)}")
        return known if columns is None else list(columns)

    def _opened(self, part: Part) -> pq.ParquetFile:
        file = open_parquet(part.url)
        footer = json.loads((file.metadata.metadata or {}).get(b"dvae", b"{}"))
        if other := _difference(footer, self.table):
            raise Damaged(f"{storage.public_url(part.url)} is of another run: {other}")
        if file.metadata.num_rows != part.num_rows:
            raise _changed(part, f"it has {file.metadata.num_rows} rows, not {part.num_rows}")
        return file


def tokens_of(rows: pa.Table, table: TableSpec) -> NDArray[np.signedinteger[Any]]:
    """tokens_BN of rows with that column; a view where they lie in one chunk, and then read-only."""
    tokens = np.asarray(rows["tokens"].combine_chunks().flatten().to_numpy(), table.token_dtype)
    return tokens.reshape(rows.num_rows, table.num_tokens)


def _difference(footer: Mapping[str, Any], table: TableSpec) -> str:
    """How a footer is not that of a part of this table; empty where it is."""
    other = (name for name, wanted in table.to_json().items() if footer.get(name) != wanted)
    return next((f"{name} is {footer.get(name)!r} there" for name in other), "")


def _changed(part: Part, how: str) -> StorageError:
    return StorageError(f"{storage.public_url(part.url)} has changed since the run was opened: {how}; open it again")


def _read_rows(file: pq.ParquetFile, start: int, stop: int, names: list[str]) -> pa.Table:
    sizes = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
    spans = list(enumerate(pairwise(accumulate(sizes, initial=0))))
    groups = [number for number, (first, end) in spans if first < stop and start < end]
    skipped = sum(sizes[: groups[0]]) if groups else 0
    with file:
        table = file.read_row_groups(groups, names, use_threads=False)
    return table.select(names).slice(start - skipped, stop - start)


# Which parts are committed


def _committed(output: OutputPrefix, table: TableSpec) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """The parts by name, and the names of those that are missing. A part without a row, or of another size than its
    row says, is newer than the ledger: its footer tells."""
    rows = {row.part or part_name(row.shard): row for row in Ledger(output).read().values()}
    files = {name: info for name, info in listed(output.tokens_folder()).items() if name.endswith(".parquet")}
    done = {name: row for name, row in rows.items() if row.state is ShardState.DONE}
    parts = {name: _part(files[name], row) for name, row in done.items() if _is_as_recorded(files.get(name), row)}
    newer = [info for name, info in files.items() if name not in parts and (name not in rows or name in done)]
    parts |= _by_footers(newer, table)
    return tuple(parts[name] for name in sorted(parts)), tuple(sorted(done.keys() - files.keys()))


def _is_as_recorded(file: ObjectInfo | None, row: ShardResult) -> bool:
    return file is not None and file.size_bytes == row.part_bytes


def _part(file: ObjectInfo, row: ShardResult) -> Part:
    return Part(storage.base_name(file.url), file.url, row.shard, row.num_rows, row.part_bytes)


def _by_footers(files: Iterable[ObjectInfo], table: TableSpec) -> dict[str, Part]:
    with ThreadPoolExecutor(FOOTER_READERS) as executor:
        found = executor.map(lambda file: _by_footer(file, table), files)
        return {part.name: part for part in found if part is not None}


def _by_footer(file: ObjectInfo, table: TableSpec) -> Part | None:
    """None where it is torn, of another run, or a copy under another shard's name."""
    name = storage.base_name(file.url)
    try:
        footer = read_footer(file.url)
        shard = footer.get("shard")
        if other := _difference(footer, table):
            raise ValueError(f"it is of another run: {other}")
        if shard is not None and part_name(shard) != name:
            raise ValueError(f"it is of {shard}, whose part has another name")
        return Part(name, file.url, shard, footer["num_rows"], file.size_bytes)
    except (ValueError, KeyError) as error:
        log.warning("%s is passed over: %s", storage.public_url(file.url), error)
        return None
