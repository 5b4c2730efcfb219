"""What is done: one row per shard, in immutable numbered Parquet segments. The newest row of a shard counts."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.output import OutputPrefix
from pipeline.records import ShardResult, ShardState

COMPACT_SEGMENTS = 64  # more than this many are merged into one when a run begins

LEDGER_SCHEMA = pa.schema([
    ("shard", pa.string()), ("size_bytes", pa.int64()), ("etag", pa.string()), ("state", pa.string()),
    ("part", pa.string()), ("num_rows", pa.int64()), ("num_failed", pa.int64()), ("part_bytes", pa.int64()),
    ("sha256", pa.string()), ("seconds", pa.float64()), ("attempts", pa.int32()), ("reason", pa.string()),
    ("message", pa.string()),
])  # fmt: skip
assert LEDGER_SCHEMA.names == [f.name for f in fields(ShardResult)]


class Ledger:
    """Reads all segments; appends by publishing a new one. Only the driver that holds the prefix writes."""

    def __init__(self, output: OutputPrefix) -> None:
        self._output = output
        self._next_number = 1

    def read(self) -> dict[str, ShardResult]:
        """The newest row of each shard, by shard URL."""
        rows: dict[str, ShardResult] = {}
        for url in self._segments():
            for row in _read_segment(url):
                rows[row.shard] = row
        return rows

    def append(self, results: Iterable[ShardResult]) -> None:
        """Publish one more segment; nothing when there is nothing to say."""
        if rows := list(results):
            storage.publish(self._segment_url(self._next_number), _segment_bytes(rows))
            self._next_number += 1

    def compact(self) -> None:
        """Merge many segments into one. Killed in between, rows stand in both, which says the same."""
        segments = self._segments()
        if len(segments) > COMPACT_SEGMENTS:
            self.append(self.read().values())
            for url in segments:
                storage.remove(url)

    def _segments(self) -> list[str]:
        urls = [info.url for info in storage.list_files(self._output.ledger_folder())]
        self._next_number = 1 + max((int(storage.base_name(url).partition(".")[0]) for url in urls), default=0)
        return urls

    def _segment_url(self, number: int) -> str:
        return storage.join(self._output.ledger_folder(), f"{number:08d}.parquet")


def _segment_bytes(rows: list[ShardResult]) -> bytes:
    sink = io.BytesIO()
    table = pa.Table.from_pylist([_plain(row) for row in rows], schema=LEDGER_SCHEMA)
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _plain(row: ShardResult) -> dict[str, Any]:
    return {**asdict(row), "state": row.state.value}


def _read_segment(url: str) -> list[ShardResult]:
    table = pq.read_table(io.BytesIO(storage.read_bytes(url)), schema=LEDGER_SCHEMA)
    columns = {name: table[name].to_pylist() for name in LEDGER_SCHEMA.names}
    columns["state"] = [ShardState(state) for state in columns["state"]]
    return [ShardResult(*values) for values in zip(*columns.values(), strict=True)]
