"""A folder of images -> WebDataset shards. Which files make a sample is image_folder.py's.

Bytes are copied as they are. The plan (which sample goes into which shard) follows from names and sizes
alone, so the same folder gives the same shards, byte for byte, wherever and however often it is packed.
Each shard appears whole or not at all; `<prefix>.pack.json` says which packing the shards belong to, and is
written before them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.image_folder import FolderSample, LeftOut, PackError, SourceFile, list_folder

FORMAT_VERSION = 1
SHARD_BYTES = 256 << 20
SHARD_SAMPLES = 10_000
PLAIN_HEADER_BYTES = 8 << 30  # a larger member, as one with a long or non-ASCII name, has a PAX header too
_MODE = 0o644

Progress = Callable[[int, int], None]
"""(images in finished shards, images in all), after each shard."""


@dataclass(frozen=True)
class PackSummary:
    """What was packed, and every file of the folder that was not."""

    shard_urls: tuple[str, ...]
    num_images: int
    num_captions: int
    num_metadata: int
    packed_bytes: int  # of all shards
    num_reused: int  # shards that an earlier run of this packing had finished
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True)
class Packing:
    """Identifies the shards of one packing; what `<prefix>.pack.json` holds."""

    version: int
    shard_bytes: int
    shard_samples: int
    num_shards: int
    num_images: int
    plan: str  # hash of every key, extension and size, by shard
    sources: str | None  # hash of modification times too: finished shards may be reused; None: they may not


@dataclass(frozen=True)
class PlannedShard:
    name: str
    samples: tuple[FolderSample, ...]
    size_bytes: int


def pack(
    folder: str | os.PathLike[str],
    out_url: str,
    *,
    shard_bytes: int = SHARD_BYTES,
    shard_samples: int = SHARD_SAMPLES,
    prefix: str = "images",
    progress: Progress | None = None,
) -> PackSummary:
    """Write `out_url`/<prefix>-000000.tar and so on. A run that was killed goes on where it stopped.

    A shard is closed before it exceeds `shard_bytes` or `shard_samples`, and holds at least one sample.
    Raises PackError: nothing to pack, two images of one name, or `out_url` holds another packing.
    """
    _check(folder, out_url, shard_bytes, shard_samples, prefix)
    listing = list_folder(folder)
    if not listing.samples:
        raise PackError(f"{folder} holds no image ({len(listing.left_out)} other files); name another folder")
    shards = tuple(_planned(listing.samples, shard_bytes, shard_samples, prefix))
    packing = _packing(shards, shard_bytes, shard_samples)
    finished = _claim(out_url, prefix, shards, packing)
    done = 0
    for shard in shards:
        if shard.name not in finished:
            storage.publish(storage.join(out_url, shard.name), shard_tar(shard))
        done += len(shard.samples)
        if progress is not None:
            progress(done, packing.num_images)
    _record(out_url, prefix, packing)
    return _summary(out_url, shards, len(finished), listing.left_out)


def _check(folder: str | os.PathLike[str], out_url: str, shard_bytes: int, shard_samples: int, prefix: str) -> None:
    if shard_bytes < 1 or shard_samples < 1:
        raise PackError(f"shard_bytes {shard_bytes} and shard_samples {shard_samples} must be at least 1")
    if not prefix or "/" in prefix or "." in prefix:
        raise PackError(f"prefix {prefix!r} must be a plain name without '/' and '.'")
    if storage.is_local(out_url) and Path(storage.normalize(out_url)).is_relative_to(Path(folder).resolve()):
        raise PackError(f"{out_url} lies inside the folder {folder} that is packed; name another output")


def _planned(
    samples: Sequence[FolderSample], shard_bytes: int, shard_samples: int, prefix: str
) -> Iterator[PlannedShard]:
    current: list[FolderSample] = []
    number = current_bytes = 0
    for sample in samples:
        size = sum(_member_bytes(sample.key, extension, file) for extension, file in sample.files)
        if current and (len(current) == shard_samples or _whole(current_bytes + size) > shard_bytes):
            yield PlannedShard(f"{prefix}-{number:06d}.tar", tuple(current), _whole(current_bytes))
            number, current, current_bytes = number + 1, [], 0
        current.append(sample)
        current_bytes += size
    yield PlannedShard(f"{prefix}-{number:06d}.tar", tuple(current), _whole(current_bytes))


def _member_bytes(key: str, extension: str, file: SourceFile) -> int:
    data = file.size_bytes + -file.size_bytes % tarfile.BLOCKSIZE
    name = f"{key}.{extension}"
    if name.isascii() and len(name) <= tarfile.LENGTH_NAME and file.size_bytes < PLAIN_HEADER_BYTES:
        return tarfile.BLOCKSIZE + data
    info = tarfile.TarInfo(name)
    info.size = file.size_bytes
    return len(info.tobuf(tarfile.PAX_FORMAT)) + data


def _whole(members_bytes: int) -> int:
    """Size of a tar: its members, two zero blocks, filled up to whole records."""
    size = members_bytes + 2 * tarfile.BLOCKSIZE
    return size + -size % tarfile.RECORDSIZE


def shard_tar(shard: PlannedShard) -> bytes:
    """The tar of one planned shard: fixed owner, mode and time; PAX, whose names are UTF-8 by definition."""
    import webdataset  # here, for it brings torch along

    buffer = io.BytesIO()
    with webdataset.TarWriter(
        buffer, user="", group="", mode=_MODE, mtime=0, encoder=False, format="PAX_FORMAT"
    ) as writer:
        for sample in shard.samples:
            members = {extension: _read(file) for extension, file in sample.files}
            writer.write({"__key__": sample.key, **members})
    return buffer.getvalue()


def _read(file: SourceFile) -> bytes:
    try:
        data = Path(file.path).read_bytes()
    except OSError as error:
        raise PackError(f"cannot read {file.path}: {error.strerror}; mend it and run again") from error
    if len(data) != file.size_bytes:
        raise PackError(f"{file.path} changed while it was packed; run again when the folder is at rest")
    return data


def _packing(shards: Sequence[PlannedShard], shard_bytes: int, shard_samples: int) -> Packing:
    plan, sources = hashlib.sha256(), hashlib.sha256()
    for shard in shards:
        for sample in shard.samples:
            for extension, file in sample.files:
                line = json.dumps([shard.name, sample.key, extension, file.size_bytes])
                plan.update(line.encode())
                sources.update(f"{line}{file.mtime_ns}".encode())
    return Packing(
        version=FORMAT_VERSION,
        shard_bytes=shard_bytes,
        shard_samples=shard_samples,
        num_shards=len(shards),
        num_images=sum(len(shard.samples) for shard in shards),
        plan=plan.hexdigest(),
        sources=sources.hexdigest(),
    )


def _claim(out_url: str, prefix: str, shards: Sequence[PlannedShard], packing: Packing) -> set[str]:
    """Make `out_url` this packing's. Returns the names of the finished shards that may be reused."""
    shard_name = re.compile(rf"{re.escape(prefix)}-\d{{6,}}\.tar")
    listed = {storage.base_name(info.url): info.size_bytes for info in storage.list_files(out_url)}
    present = {name: size for name, size in listed.items() if shard_name.fullmatch(name)}
    recorded = _recorded(out_url, prefix)
    planned = {shard.name: shard.size_bytes for shard in shards}
    if difference := _difference(recorded, packing, set(present) - set(planned), present):
        remedy = "name another output or another prefix, or remove what is there"
        raise PackError(f"{out_url} holds another packing: {difference}; {remedy}")
    if recorded is None or recorded.get("sources") == packing.sources:
        _record(out_url, prefix, packing)
        return {name for name, size in planned.items() if present.get(name) == size}
    # A file was touched: its shard may be stale, so all are made again, also after a kill in between.
    _record(out_url, prefix, replace(packing, sources=None))
    return set()


def _difference(
    recorded: dict[str, Any] | None, packing: Packing, strange: Collection[str], present: Collection[str]
) -> str | None:
    """What shows that the output holds something else than this packing."""
    if recorded is None:
        return f"{min(present)} is there without its .pack.json" if present else None
    mine = asdict(packing)
    for field in ("version", "shard_bytes", "shard_samples", "num_images", "num_shards", "plan"):
        if recorded.get(field) != mine[field]:
            return f"{field} was {recorded.get(field)}, is {mine[field]}"
    return f"{min(strange)} is not one of its {packing.num_shards} shards" if strange else None


def _recorded(out_url: str, prefix: str) -> dict[str, Any] | None:
    url = storage.join(out_url, f"{prefix}.pack.json")
    try:
        recorded = json.loads(storage.read_bytes(url))
    except FileNotFoundError:
        return None
    except ValueError:
        recorded = None
    if not isinstance(recorded, dict):
        raise PackError(f"{url} is not the record of a packing; name another output")
    return recorded


def _record(out_url: str, prefix: str, packing: Packing) -> None:
    data = json.dumps(asdict(packing), indent=2) + "\n"
    storage.publish(storage.join(out_url, f"{prefix}.pack.json"), data.encode())


def _summary(
    out_url: str, shards: Sequence[PlannedShard], num_reused: int, left_out: tuple[LeftOut, ...]
) -> PackSummary:
    extensions = [extension for shard in shards for sample in shard.samples for extension, _ in sample.files]
    return PackSummary(
        shard_urls=tuple(storage.join(storage.normalize(out_url), shard.name) for shard in shards),
        num_images=sum(len(shard.samples) for shard in shards),
        num_captions=extensions.count("txt"),
        num_metadata=extensions.count("json"),
        packed_bytes=sum(shard.size_bytes for shard in shards),
        num_reused=num_reused,
        left_out=left_out,
    )
