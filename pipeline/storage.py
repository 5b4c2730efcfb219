"""URLs <-> bytes on any store. Publishing is one PUT; nobody else opens a URL for writing.

A URL is anything fsspec takes; a plain path is a URL too. The only module that knows fsspec.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from aiohttp import ClientTimeout
from fsspec.implementations.local import LocalFileSystem

from pipeline import local_disk, object_writes, stored_object
from pipeline.errors import StorageError
from pipeline.records import ObjectInfo
from pipeline.store_requests import ShortAnswer, request
from pipeline.stored_object import AS_IT_IS, StoredObject
from pipeline.urls import base_name as base_name
from pipeline.urls import glob_folder, is_s3, is_web
from pipeline.urls import is_local as is_local
from pipeline.urls import join as join
from pipeline.urls import normalize as normalize
from pipeline.urls import public_text as public_text
from pipeline.urls import public_url as public_url

READ_BLOCK_BYTES = 8 << 20
_EXTRAS = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "az": "azure",
    "abfs": "azure",
    "abfss": "azure",
}


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for `url` and the path in it. Raises StorageError when its package is missing."""
    protocol = url.partition("://")[0]
    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(normalize(url), **_options(url)))
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'dvae-ray[{extra}]'" if extra else str(error)
        raise StorageError(f"{protocol}:// needs a package that is not installed: {remedy}") from error
    except ValueError as error:
        raise StorageError(f"{public_url(url)} is no URL that can be opened: {error}") from error


def _options(url: str) -> dict[str, Any]:
    """aiohttp gives up a download after five minutes in all, and one that hangs no sooner."""
    if not is_web(url):
        return {}
    chosen = fsspec.config.conf.get(url.partition("://")[0], {}).get("client_kwargs", {})
    return {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=15, sock_read=60), **chosen}}


def read_bytes(url: str) -> bytes:
    """The whole object. Raises FileNotFoundError, StorageError."""
    fs, path = filesystem(url)
    return request("read", url, lambda: cast(bytes, fs.cat_file(path)))


def read_range(url: str, start: int, size: int) -> bytes:
    """Just `size` bytes from `start`, in one request. Raises StorageError where the store gives other than that."""
    fs, path = filesystem(url)

    def read() -> bytes:
        data = cast(bytes, fs.cat_file(path, start=start, end=start + size))
        if len(data) != size:
            raise ShortAnswer(len(data), size)
        return data

    return request("read", url, read)


def open_read(url: str) -> BinaryIO:
    """A binary stream read from front to back; for a shard there is shard_stream.py."""
    fs, path = filesystem(url)
    return request("open", url, lambda: cast(BinaryIO, fs.open(path, "rb", block_size=READ_BLOCK_BYTES)))


def open_ranges(url: str) -> Any:
    """For a reader of ranges: a path where the object is a local file, else a binary file that fetches just what is
    read, each time anew. Raises FileNotFoundError and what the store's client raises."""
    fs, path = filesystem(url)
    return path if is_local(url) else fs.open(path, "rb", cache_type="none")


def look_at(url: str) -> StoredObject:
    """What there is to read at `url`, never from a cache. Raises FileNotFoundError, StorageError."""
    fs, path = _listing(url)
    return request("open", url, lambda: stored_object.look_at(url, fs, path))


def open_stream(url: str) -> BinaryIO:
    """The bytes of a web address by one request, from front to back."""
    fs, path = filesystem(url)
    return request("open", url, lambda: cast(BinaryIO, fs.open(path, "rb", block_size=0, headers=AS_IT_IS)))


def copy_stream(url: str, file: BinaryIO, most_bytes: int) -> None:
    """All of a web address into `file`, by one request, and again from the start where it breaks. Raises
    FileNotFoundError, and StorageError also where more than `most_bytes` come."""

    def copy() -> None:
        file.seek(0)
        file.truncate()
        with open_stream(url) as stream:
            while data := stream.read(READ_BLOCK_BYTES):
                if file.tell() + len(data) > most_bytes:
                    raise StorageError(f"{public_url(url)} sends more than {most_bytes:,} bytes")
                file.write(data)

    request("read", url, copy)


def exists(url: str) -> bool:
    fs, path = filesystem(url)
    fs.invalidate_cache()
    return request("look for", url, lambda: bool(fs.exists(path)))


def publish(url: str, data: bytes) -> None:
    """Make `data` appear at `url` whole or not at all, replacing what was there."""
    fs, path = filesystem(url)
    put = partial(local_disk.write_whole, Path(path)) if is_local(url) else partial(object_writes.put, fs, path)
    request("write", url, lambda: put(data), writes=True)


def create(url: str, data: bytes) -> bool:
    """As `publish`, but only where nothing is yet. `data` must hold an id of its writer: an answer that was lost makes
    a client try again and be refused by its own success, so the object is compared."""
    fs, path = filesystem(url)

    def put() -> bool:
        if is_local(url):
            return local_disk.create_whole(Path(path), data)
        return object_writes.create(fs, path, data)

    return request("create", url, put, writes=True)


def swap(url: str, data: bytes, old: bytes) -> bool:
    """As `publish`, but only where `old` is now; says whether `data` is there. As with `create`, `data` must hold an id
    of its writer. One of two wins on S3 and on a local disk; elsewhere the later of two that meet within a moment."""
    fs, path = filesystem(url)

    def put() -> bool:
        if is_local(url):
            return local_disk.swap_whole(Path(path), data, old)
        swap_there = object_writes.swap if is_s3(url) else object_writes.swap_hopefully
        return swap_there(fs, path, data, old)

    return request("write", url, put, writes=True)


def remove(url: str) -> None:
    """Remove one object; one that is not there is no error."""
    fs, path = filesystem(url)
    with suppress(FileNotFoundError):
        request("remove", url, lambda: fs.rm_file(path))


def remove_folder(url: str) -> None:
    """Remove all objects below; on a local disk the folder too, with what a killed `publish` left in it."""
    for info in list_files(url):
        remove(info.url)
    if is_local(url):
        request("remove", url, lambda: local_disk.remove_tree(Path(normalize(url))))


def remove_temporaries(prefix_url: str) -> None:
    """Remove what a killed `publish` left on a local disk. Only for whoever holds the prefix."""
    if is_local(prefix_url):
        local_disk.remove_temporaries(Path(normalize(prefix_url)))


class _LocalListing(LocalFileSystem):  # type: ignore[misc]
    """fsspec's own leaves out a folder that cannot be read, and takes a link to a file for no file."""

    def info(self, path: Any, **options: Any) -> dict[str, Any]:
        try:
            return cast(dict[str, Any], super().info(os.fspath(path), **options))
        except FileNotFoundError:
            if not Path(path).is_symlink():
                raise
            return {"name": os.fspath(path), "size": 0, "type": "file"}  # reading it says what is missing

    def ls(self, path: str, detail: bool = False, **options: Any) -> list[Any]:
        try:
            return cast(list[Any], super().ls(path, detail, **options))
        except FileNotFoundError:
            raise
        except OSError as error:  # another kind, for fsspec's walk passes over this one
            raise StorageError(f"cannot list {path}: {error}") from error


def _listing(url: str) -> tuple[Any, str]:
    """The file system to list `url` with, nothing of it cached, and the path."""
    fs, path = filesystem(url)
    if is_local(url):
        return _LocalListing(), path
    fs.invalidate_cache()
    return fs, path


def list_files(prefix_url: str) -> list[ObjectInfo]:
    """All objects below a prefix, in name order; none when there is no such prefix. Never from a cache."""
    fs, path = _listing(prefix_url)
    try:
        found = request("list", prefix_url, lambda: fs.find(path, detail=True))
    except FileNotFoundError:
        return []
    entries = ({**entry, "name": name} for name, entry in found.items() if entry.get("type") != "directory")
    infos = (_info(normalize(prefix_url), path, entry) for entry in entries)
    return sorted((i for i in infos if not local_disk.is_temporary(base_name(i.url))), key=lambda info: info.url)


def list_folder(folder_url: str) -> list[ObjectInfo]:
    """The objects right in a folder, none of those further down; none when there is no such folder."""
    fs, path = _listing(folder_url)

    def list_it() -> list[Any]:
        try:
            return cast(list[Any], fs.ls(path, detail=True))
        except (FileNotFoundError, NotADirectoryError):
            return []

    entries = request("list", folder_url, list_it)
    return [_info(folder_url, path, entry) for entry in entries if entry["type"] == "file"]


def written_at(folder_url: str) -> dict[str, float]:
    """When each object right in a folder was written, by name, in seconds since the epoch; without those of which the
    store does not say. A copy has the time of its copying."""
    fs, path = _listing(folder_url)
    try:
        entries = request("list", folder_url, lambda: fs.ls(path, detail=True))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    times = {base_name(entry["name"]): stored_object.time_of(entry) for entry in entries if entry["type"] == "file"}
    return {name: time for name, time in times.items() if time is not None}


def list_matches(glob_url: str) -> list[ObjectInfo]:
    """The objects whose URL matches a pattern of `*`, `?` and `[]`; a `**` stands for folders as well."""
    fs, path = _listing(glob_url)
    entries = request("list", glob_url, lambda: fs.glob(path, detail=True)).values()
    folder = glob_folder(glob_url)
    start = "" if folder.endswith("://") else filesystem(folder)[1]
    return [_info(folder, start, entry) for entry in entries if entry["type"] == "file"]


def stat(url: str) -> ObjectInfo | None:
    """One object as its store lists it now, never from a cache; None where there is none (a folder is none)."""
    fs, path = _listing(url)
    try:
        entry = request("look for", url, lambda: stored_object.entry_of(url, fs, path))
    except FileNotFoundError:
        return None
    return _info(url, path, {**entry, "name": url}) if entry["type"] == "file" else None


def _info(folder_url: str, folder_path: str, entry: dict[str, Any]) -> ObjectInfo:
    """The store's own name (`bucket/key`) becomes a URL spelled as the one that was listed, for stores leave out
    the scheme, the host and the account."""
    name = str(entry["name"])
    url = name if "://" in name or is_local(folder_url) else folder_url + name.removeprefix(folder_path)
    return ObjectInfo(url, int(entry.get("size") or 0), stored_object.mark_of(entry))
