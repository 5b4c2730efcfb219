"""What is done: one row per shard, in immutable numbered Parquet segments. The newest row of a shard counts."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import Damaged, StorageError
from pipeline.output import OutputPrefix
from pipeline.records import ShardResult, ShardState

COMPACT_SEGMENTS = 64  # more than this many are merged into one, when a run begins and while it goes on
SEGMENT_READERS = 16
LISTINGS = 5

LEDGER_SCHEMA = pa.schema([
    ("shard", pa.string()), ("size_bytes", pa.int64()), ("etag", pa.string()), ("state", pa.string()),
    ("part", pa.string()), ("num_rows", pa.int64()), ("num_failed", pa.int64()), ("part_bytes", pa.int64()),
    ("sha256", pa.string()), ("seconds", pa.float64()), ("attempts", pa.int32()), ("reason", pa.string()),
    ("message", pa.string()),
])  # fmt: skip
assert LEDGER_SCHEMA.names == [f.name for f in fields(ShardResult)]


class Ledger:
    """Reads all segments; appends by publishing a new one. Only the driver that holds the prefix writes: `check`
    raises when it no longer does."""

    def __init__(self, output: OutputPrefix, check: Callable[[], None] = lambda: None) -> None:
        self._output, self.check = output, check
        self._next_number: int | None = None
        self._appended: list[str] = []  # since the last merge

    def read(self) -> dict[str, ShardResult]:
        """The newest row of each shard, by shard URL."""
        for _ in range(LISTINGS):
            try:
                return _newest_rows(self._segments())
            except FileNotFoundError:  # its driver merged it away after it was listed here
                continue
        raise StorageError(f"{storage.public_url(self._output.ledger_folder())} changes faster than it can be read")

    def append(self, results: Iterable[ShardResult]) -> None:
        """Publish one more segment; nothing when there is nothing to say."""
        if rows := list(results):
            self._appended.append(self._publish(rows))
        if len(self._appended) > COMPACT_SEGMENTS:
            self._merge(self._appended)

    def compact(self) -> None:
        """Merge many segments into one. Killed in between, rows stand in both, which says the same."""
        segments = self._segments()
        if len(segments) > COMPACT_SEGMENTS:
            self._merge(segments)

    def _merge(self, segments: list[str]) -> None:
        """`segments` are the newest, or all: the merged rows come after every other."""
        self._put_in_place_of(segments, list(_newest_rows(segments).values()))

    def rewrite(self, rows: Iterable[ShardResult]) -> None:
        """These rows and no others, whatever state the segments are in. Killed in between, old rows that are not
        among them stay."""
        self._put_in_place_of(self._segments(), list(rows))

    def _put_in_place_of(self, segments: list[str], rows: list[ShardResult]) -> None:
        self._publish(rows)
        for url in segments:
            storage.remove(url)
        self._appended = []

    def _publish(self, rows: list[ShardResult]) -> str:
        """Under the next number that nobody has: a driver that lost its lease may have taken one meanwhile."""
        self.check()
        data = _segment_bytes(rows)
        if self._next_number is None:
            self._segments()
        while True:
            url = storage.join(self._output.ledger_folder(), f"{self._next_number:08d}.parquet")
            self._next_number = _number(url) + 1
            if storage.create(url, data):  # an equal one that is there says the same
                return url

    def _segments(self) -> list[str]:
        urls = [info.url for info in storage.list_files(self._output.ledger_folder()) if _number(info.url)]
        self._next_number = 1 + max(map(_number, urls), default=0)
        return urls


def _number(url: str) -> int:
    """Of a segment, from 1 on; 0 for any other file."""
    stem, _, suffix = storage.base_name(url).partition(".")
    return int(stem) if suffix == "parquet" and stem.isdecimal() else 0


def _newest_rows(segments: list[str]) -> dict[str, ShardResult]:
    with ThreadPoolExecutor(SEGMENT_READERS) as executor:
        return {row.shard: row for rows in executor.map(_read_segment, segments) for row in rows}


def _segment_bytes(rows: list[ShardResult]) -> bytes:
    sink = io.BytesIO()
    table = pa.Table.from_pylist([_plain(row) for row in rows], schema=LEDGER_SCHEMA)
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def _plain(row: ShardResult) -> dict[str, Any]:
    message = None if row.message is None else storage.public_text(row.message)
    return {**asdict(row), "state": row.state.value, "message": message}


def _read_segment(url: str) -> list[ShardResult]:
    data = storage.read_bytes(url)
    try:
        table = pq.read_table(io.BytesIO(data), schema=LEDGER_SCHEMA, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        remedy = "remove it: the parts say again what it said"
        raise Damaged(f"{storage.public_url(url)} is no segment of a ledger; {remedy} ({error})") from error
    columns = {name: table[name].to_pylist() for name in LEDGER_SCHEMA.names}
    columns["state"] = [ShardState(state) for state in columns["state"]]
    return [ShardResult(*values) for values in zip(*columns.values(), strict=True)]
