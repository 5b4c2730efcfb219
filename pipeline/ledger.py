"""What is done: one row per shard, in immutable numbered Parquet segments. The newest row of a shard counts."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import Damaged, StorageError
from pipeline.output import OutputPrefix
from pipeline.records import ShardResult, ShardState

log = logging.getLogger(__name__)
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
        self._tiers: list[list[str]] = []  # segments of this writer: appended, merged once, merged twice …

    def read(self) -> dict[str, ShardResult]:
        """The newest row of each shard, by shard URL."""
        for _ in range(LISTINGS):
            try:
                return _newest_rows(self._segments())
            except FileNotFoundError:  # its driver merged it away after it was listed here
                continue
        raise StorageError(f"{storage.public_url(self._output.ledger_folder())} changes faster than it can be read")

    def append(self, results: Iterable[ShardResult]) -> None:
        """Publish one more segment; nothing when there is nothing to say. Once it is there, a merge that fails is no
        failure of this: its segments are left to the next run."""
        if rows := list(results):
            segment = self._publish(_table(rows))
            try:
                self._keep(segment, 0)
            except (StorageError, FileNotFoundError) as error:
                self._tiers = []  # of all tiers: an older one that is merged later would come after what is left here
                log.warning("the ledger's segments are merged by the next run: %s", error)

    def _keep(self, segment: str, tier: int) -> None:
        """Merge a tier that has grown too long into one segment of the next, so that a row is written a few times at
        most, however long a run is. All of lower tiers was merged just before: a full tier is the newest."""
        if tier == len(self._tiers):
            self._tiers.append([])
        self._tiers[tier].append(segment)
        if len(self._tiers[tier]) > COMPACT_SEGMENTS:
            merged = self._put_in_place_of(self._tiers[tier], _newest(self._tiers[tier]))
            self._tiers[tier] = []
            self._keep(merged, tier + 1)

    def compact(self) -> None:
        """Merge many segments into one. Killed in between, rows stand in both, which says the same."""
        segments = self._segments()
        if len(segments) > COMPACT_SEGMENTS:
            self._put_in_place_of(segments, _newest(segments))
            self._tiers = []

    def rewrite(self, rows: Iterable[ShardResult]) -> None:
        """These rows and no others, whatever state the segments are in. Killed in between, old rows that are not
        among them stay."""
        self._put_in_place_of(self._segments(), _table(list(rows)))
        self._tiers = []

    def _put_in_place_of(self, segments: list[str], rows: pa.Table) -> str:
        """`segments` are the newest, or all: the rows come after every other."""
        url = self._publish(rows)
        for segment in segments:
            storage.remove(segment)
        return url

    def _publish(self, rows: pa.Table) -> str:
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
    return {row.shard: row for table in _tables(segments) for row in _rows(table)}


def _newest(segments: list[str]) -> pa.Table:
    """The newest row of each shard, as a table: a merge makes no object of a row."""
    rows = pa.concat_tables(_tables(segments))
    numbered = pa.table({"shard": rows["shard"], "number": np.arange(len(rows))})
    last = numbered.group_by("shard").aggregate([("number", "max")])["number_max"]
    return rows.take(last.sort())


def _tables(segments: list[str]) -> Iterator[pa.Table]:
    with ThreadPoolExecutor(SEGMENT_READERS) as executor:
        yield from executor.map(_read_segment, segments)


def _table(rows: list[ShardResult]) -> pa.Table:
    columns = {name: [getattr(row, name) for row in rows] for name in LEDGER_SCHEMA.names}
    columns["state"] = [state.value for state in columns["state"]]
    columns["message"] = [text if text is None else storage.public_text(text) for text in columns["message"]]
    return pa.table(columns, schema=LEDGER_SCHEMA)


def _segment_bytes(rows: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(rows, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def _read_segment(url: str) -> pa.Table:
    data = storage.read_bytes(url)
    try:
        # Not read_table: of processes that end right after it, pyarrow 26 aborts one in twelve.
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        return file.read(LEDGER_SCHEMA.names, use_threads=False).cast(LEDGER_SCHEMA)
    except (pa.ArrowException, OSError, ValueError) as error:
        remedy = "remove it: the parts say again what it said"
        raise Damaged(f"{storage.public_url(url)} is no segment of a ledger; {remedy} ({error})") from error


def _rows(table: pa.Table) -> Iterator[ShardResult]:
    columns = {name: table[name].to_pylist() for name in LEDGER_SCHEMA.names}
    columns["state"] = [ShardState(state) for state in columns["state"]]
    return (ShardResult(*values) for values in zip(*columns.values(), strict=True))
