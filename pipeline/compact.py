"""A finished run as fewer, larger files below another prefix: the same rows, sorted by shard and place in it.

    run.json     that of the run, with `compacted`: what was compacted, and how; written first
    tokens/      rows-<number>-<hash>.parquet: the rows of many shards, whole parts one after another
    errors/      the errors of the same shards, under the same name
    shards/      the map, under the same name: a row for each shard; written last, and says that the others are right
    manifest.json  totals and files; written when all are there

A file is a pure function of its parts, so a compaction that was killed goes on: a file that has a map is read back and
kept, every other one is made anew.
What was compacted is never written to.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import compact_file, storage
from pipeline.compact_file import Held, ShardPlace, map_bytes
from pipeline.compacted import (
    NO_FILE,
    FileDone,
    FileMark,
    manifest_of,
    publish_map,
    read_map,
    read_marked,
    shards_folder,
)
from pipeline.errors import Damaged, PipelineError, RunMismatch
from pipeline.ledger import Ledger
from pipeline.manifest import Totals
from pipeline.map_ahead import map_ahead
from pipeline.output import OutputPrefix, listed, part_name, read_run, require_run, table_of
from pipeline.records import ObjectInfo, ShardResult, ShardState
from pipeline.token_table import ERRORS_SCHEMA, token_schema

log = logging.getLogger(__name__)
READERS = 8  # of parts, which are all held until their file is written


@dataclass(frozen=True)
class Group:
    """The shards that go into one file. `name`: from its number, and from what is put together."""

    name: str
    rows: tuple[ShardResult, ...]

    @property
    def part_bytes(self) -> int:
        return sum(row.part_bytes for row in self.rows)


class Compaction:
    """What is to be put together, and how far it is. Raises PipelineError, saying what is wrong, before anything is
    written: NoRun, a run that is not complete, files that its ledger does not know, or another thing at `dest`."""

    def __init__(self, source: OutputPrefix, dest: OutputPrefix, target_bytes: int) -> None:
        _require_apart(source, dest)
        self.source, self.dest = source, dest
        self._run = require_run(source)
        self.table = table_of(source, self._run)
        rows = _whole_run(source, self._run)
        self.groups = list(_groups(rows, target_bytes))
        snapshot = hashlib.sha256("\n".join(group.name for group in self.groups).encode()).hexdigest()
        self._compacted = {
            "source": storage.public_url(source.url), "target_bytes": target_bytes, "snapshot": snapshot,
            "order": ["shard", "index"],
        }  # fmt: skip
        self._maps: dict[str, ObjectInfo] = {}  # that an earlier start left
        _require_room(dest, self._compacted)

    def begin(self) -> None:
        """Claim `dest`, which the caller holds by now: somebody else may have been there since it was looked at."""
        _require_room(self.dest, self._compacted)
        storage.remove_temporaries(self.dest.url)
        url = self.dest.file("run.json")
        if not storage.exists(url):
            storage.publish(url, _json({**self._run, "compacted": self._compacted}))
        self._maps = listed(shards_folder(self.dest))

    def kept(self, group: Group) -> FileDone | None:
        """What an earlier start made of this group, read back; None where it made nothing, or that is damaged or gone.
        Raises StorageError."""
        if group.name not in self._maps:
            return None
        try:
            file, _ = read_map(self._maps[group.name].url)
            for url, mark in (
                (self.dest.part(group.name), file.mark),
                (self.dest.errors(group.name), file.errors_mark),
            ):
                if mark != NO_FILE:
                    read_marked(url, mark)
        except Damaged as error:
            log.warning("made anew: %s", error)
            return None
        wanted = _places(group, file.mark, file.errors_mark)
        return file if file.map_sha256 == FileMark.of(map_bytes(wanted)).sha256 else None

    def copy(self, group: Group) -> FileDone:
        """Write one file, once it is held against its parts and the counts of its shards; read it back, and say in its
        map that it is right. Takes three times its size in memory. Raises Damaged, StorageError."""
        rows, errors = self._merged(group)
        mark, errors_mark = FileMark.of(rows), FileMark.of(errors) if errors else NO_FILE
        places = _places(group, mark, errors_mark)
        for fault in compact_file.faults(places, rows, errors, self.table):
            raise Damaged(f"{storage.public_text(fault)}: the run is not what its ledger says; dvae verify says more")
        _publish(self.dest.part(group.name), rows, mark)
        if errors:
            _publish(self.dest.errors(group.name), errors, errors_mark)
        return publish_map(storage.join(shards_folder(self.dest), group.name), places)

    def _merged(self, group: Group) -> tuple[bytes, bytes]:
        """The rows and the errors of a group, as files; no bytes for no errors."""
        parts, errors = _fetched(group.rows, self._part), _fetched(group.rows, self._errors)
        totals = Totals.of(group.rows)
        footer = {"num_rows": totals.num_rows, "num_failed": totals.num_failed, "num_shards": len(group.rows)}
        rows = compact_file.merged_rows(self.table, parts, footer)
        compact_file.require_same_rows(rows, parts, token_schema(self.table))
        if not errors:
            return rows, b""
        merged = compact_file.merged_errors(errors)
        compact_file.require_same_rows(merged, errors, ERRORS_SCHEMA)
        return rows, merged

    def finish(self, files: Sequence[FileDone]) -> dict[str, Any]:
        """Write manifest.json, once every file was kept or copied."""
        manifest = manifest_of(self.table, self._compacted, files)
        storage.publish(self.dest.file("manifest.json"), _json(manifest))
        return manifest

    def _part(self, row: ShardResult) -> Held | None:
        if row.state is not ShardState.DONE:
            return None
        url = self.source.part(str(row.part))
        return Held(url, read_marked(url, FileMark(row.part_bytes, row.sha256)))

    def _errors(self, row: ShardResult) -> Held | None:
        if not row.num_failed and row.state is ShardState.DONE:
            return None
        url = self.source.errors(part_name(row.shard))
        return Held(url, storage.read_bytes(url))


def _publish(url: str, data: bytes, mark: FileMark) -> None:
    """Raises Damaged where the store does not give it back."""
    storage.publish(url, data)
    read_marked(url, mark)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()


# What is to be put together


def _require_apart(source: OutputPrefix, dest: OutputPrefix) -> None:
    one, other = source.url.rstrip("/") + "/", dest.url.rstrip("/") + "/"
    if one.startswith(other) or other.startswith(one):
        where = storage.public_url(dest.url)
        raise PipelineError(f"{where} and the run lie in each other: name a place of its own for what is compacted")


def _whole_run(source: OutputPrefix, run: dict[str, Any]) -> list[ShardResult]:
    """The ledger's rows of all shards that have a part or are quarantined, by shard, where the folder agrees."""
    where = storage.public_url(source.url)
    if "compacted" in run:
        raise PipelineError(f"{where} is compacted already: name the run that it was made of")
    if not storage.exists(source.file("manifest.json")):
        raise PipelineError(f"{where} is not complete (no manifest.json): run dvae tokenize to its end first")
    rows = [row for row in Ledger(source).read().values() if row.state is not ShardState.REMOVED]
    recorded = {row.part: row.part_bytes for row in rows if row.state is ShardState.DONE}
    there = {name: info.size_bytes for name, info in listed(source.tokens_folder()).items()}
    if wrong := sorted(str(name) for name, _ in recorded.items() ^ there.items()):
        what = f"{wrong[0]} and {len(wrong) - 1:,} more" if len(wrong) > 1 else wrong[0]
        raise PipelineError(f"{where}: tokens/ is not what the ledger says ({what}): dvae verify says what is wrong")
    return sorted(rows, key=lambda row: row.shard)


def _groups(rows: Sequence[ShardResult], target_bytes: int) -> Iterator[Group]:
    """Whole parts, as many as come to `target_bytes`, one at least."""
    waiting: list[ShardResult] = []
    waiting_bytes = number = 0
    for row in rows:
        if waiting and waiting_bytes + row.part_bytes > target_bytes:
            yield _group(number, waiting)
            waiting, waiting_bytes, number = [], 0, number + 1
        waiting.append(row)
        waiting_bytes += row.part_bytes
    if waiting:
        yield _group(number, waiting)


def _group(number: int, rows: Sequence[ShardResult]) -> Group:
    """Its name changes with whatever its bytes depend on."""
    marks = [(r.shard, r.size_bytes, r.etag, r.state, r.part_bytes, r.sha256, r.num_failed) for r in rows]
    return Group(f"rows-{number:06d}-{hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:8]}.parquet", tuple(rows))


def _require_room(dest: OutputPrefix, compacted: dict[str, Any]) -> None:
    run, where = read_run(dest), storage.public_url(dest.url)
    if run is None:
        if strange := next(
            (info for info in storage.list_files(dest.url) if info.url != dest.file("lease.json")), None
        ):
            named = storage.public_url(strange.url)
            raise RunMismatch(f"{where} holds {named}, and no run.json says whose: name an empty place")
    elif "compacted" not in run:
        raise RunMismatch(f"{where} holds a run of its own: name an empty place")
    elif run["compacted"] != compacted:
        raise RunMismatch(
            f"{where} holds another compaction: of another run, an earlier state of this one, or another "
            "--target-bytes; name an empty place"
        )


def _fetched(rows: Sequence[ShardResult], fetch: Callable[[ShardResult], Held | None]) -> list[Held]:
    try:
        return [held for held in map_ahead(fetch, rows, threads=READERS) if held is not None]
    except (FileNotFoundError, Damaged) as error:
        raise Damaged(f"the run cannot be read: {storage.public_text(str(error))}; dvae verify says more") from error


def _places(group: Group, mark: FileMark, errors_mark: FileMark) -> list[ShardPlace]:
    places, first_row = [], 0
    for row in group.rows:
        places.append(
            ShardPlace(
                row.shard, row.size_bytes, row.etag, row.state, row.part, row.sha256, group.name, first_row,
                row.num_rows, row.num_failed, mark.num_bytes, str(mark.sha256), errors_mark.num_bytes,
                errors_mark.sha256,
            )
        )  # fmt: skip
        first_row += row.num_rows
    return places
