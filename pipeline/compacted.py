"""What lies below a compacted run: its files as they were written, the map that says so, and the manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline import compact_file, storage
from pipeline.compact_file import ShardPlace
from pipeline.errors import Damaged
from pipeline.manifest import Totals
from pipeline.output import OutputPrefix
from pipeline.token_table import TableSpec


def shards_folder(output: OutputPrefix) -> str:
    return output.file("shards")


@dataclass(frozen=True)
class FileMark:
    """What must be at a URL. `sha256` is None where nobody knows (a part that was found after a kill: its pages have
    their checksums)."""

    num_bytes: int
    sha256: str | None

    @classmethod
    def of(cls, data: bytes) -> FileMark:
        return cls(len(data), hashlib.sha256(data).hexdigest())

    def fits(self, data: bytes) -> bool:
        return len(data) == self.num_bytes and self.sha256 in (None, hashlib.sha256(data).hexdigest())


NO_FILE = FileMark(0, None)


def read_marked(url: str, mark: FileMark) -> bytes:
    """Raises Damaged where there is nothing, or bytes of another mark, and StorageError."""
    data = b""
    for _ in range(2):  # a network damages bytes too, but not twice the same
        try:
            data = storage.read_bytes(url)
        except FileNotFoundError as error:
            raise Damaged(f"{storage.public_url(url)} is gone") from error
        if mark.fits(data):
            return data
    raise Damaged(f"{storage.public_url(url)} has other bytes than were recorded: {len(data):,} of {mark.num_bytes:,}")


@dataclass(frozen=True)
class FileDone:
    """One file that is there, as its store gave it back. `totals`: of its shards."""

    name: str
    totals: Totals
    mark: FileMark
    errors_mark: FileMark
    map_sha256: str

    @classmethod
    def of(cls, places: Sequence[ShardPlace], map_sha256: str) -> FileDone:
        first = places[0]
        mark, errors_mark = FileMark(first.file_bytes, first.file_sha256), NO_FILE
        if first.errors_sha256 is not None:
            errors_mark = FileMark(first.errors_bytes, first.errors_sha256)
        return cls(first.file, Totals.of(places), mark, errors_mark, map_sha256)


def publish_map(url: str, places: Sequence[ShardPlace]) -> FileDone:
    """Say that the file of these places is there, whole and right."""
    data = compact_file.map_bytes(places)
    storage.publish(url, data)
    return FileDone.of(places, hashlib.sha256(data).hexdigest())


def read_map(url: str) -> tuple[FileDone, list[ShardPlace]]:
    """What `publish_map` wrote. Raises Damaged, StorageError."""
    try:
        data = storage.read_bytes(url)
        places = compact_file.read_map(data)
        return FileDone.of(places, hashlib.sha256(data).hexdigest()), places
    except (FileNotFoundError, Damaged, ValueError, LookupError) as error:
        raise Damaged(f"{storage.public_url(url)} is no map of shards: {error}") from error


def shard_as_read(output: OutputPrefix, shard: str) -> tuple[int, str]:
    """Size and etag of a shard when it was tokenised, by the map of a compacted run. Raises StorageError."""
    found = compact_file.find_shard([info.url for info in storage.list_files(shards_folder(output))], shard)
    if found is None:
        raise Damaged(f"no map below {storage.public_url(shards_folder(output))} knows {shard}")
    return found


def manifest_of(table: TableSpec, compacted: Any, files: Sequence[FileDone]) -> dict[str, Any]:
    totals = sum((file.totals for file in files), Totals(0, 0, 0, 0))
    parts = [
        {"part": file.name, **asdict(file.totals), "bytes": file.mark.num_bytes, "sha256": file.mark.sha256,
         "map_sha256": file.map_sha256}
        for file in files
    ]  # fmt: skip
    return {**table.to_json(), **asdict(totals), "compacted": compacted, "parts": parts}
