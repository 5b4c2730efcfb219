"""URLs <-> bytes on any store. Publishing is one PUT; nobody else opens a URL for writing.

A URL is anything fsspec takes; a plain path is a URL too. The only module that knows fsspec.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline import local_disk
from pipeline.errors import StorageError
from pipeline.records import ObjectInfo
from pipeline.urls import base_name as base_name
from pipeline.urls import glob_folder, is_web
from pipeline.urls import is_local as is_local
from pipeline.urls import join as join
from pipeline.urls import normalize as normalize
from pipeline.urls import public_text as public_text
from pipeline.urls import public_url as public_url

READ_BLOCK_BYTES = 8 << 20
_CONTENT_MARKS = ("ETag", "etag", "md5Hash", "mtime", "created", "Last-Modified")
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
        return cast(tuple[Any, str], fsspec.core.url_to_fs(normalize(url)))
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'dvae-ray[{extra}]'" if extra else str(error)
        raise StorageError(f"{protocol}:// needs a package that is not installed: {remedy}") from error
    except ValueError as error:
        raise StorageError(f"{public_url(url)} is no URL that can be opened: {error}") from error


@contextmanager
def _named(action: str, url: str, *, writes: bool = False) -> Iterator[None]:
    """Give every error of a store a name and the URL; a missing object stays FileNotFoundError, but where one is
    written it is the bucket or the folder that is missing."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:  # each store's client raises its own kinds, botocore's are no OSError
        missing = isinstance(error, FileNotFoundError)
        if missing and not writes:
            raise
        remedy = "; check the bucket or the folder" if missing else ""
        message = f"cannot {action} {public_url(url)}: {type(error).__name__}: {error}{remedy}"
        raise StorageError(public_text(message)) from error


def read_bytes(url: str) -> bytes:
    """The whole object. Raises FileNotFoundError, StorageError."""
    fs, path = filesystem(url)
    with _named("read", url):
        return cast(bytes, fs.cat_file(path))


def read_range(url: str, start: int, size: int) -> bytes:
    """`size` bytes from `start`, in one request."""
    fs, path = filesystem(url)
    with _named("read", url):
        return cast(bytes, fs.cat_file(path, start=start, end=start + size))


def open_read(url: str) -> BinaryIO:
    """A binary stream read from front to back."""
    fs, path = filesystem(url)
    with _named("open", url):
        return cast(BinaryIO, fs.open(path, "rb", block_size=READ_BLOCK_BYTES))


def exists(url: str) -> bool:
    fs, path = filesystem(url)
    with _named("look for", url):
        fs.invalidate_cache()
        return bool(fs.exists(path))


def publish(url: str, data: bytes) -> None:
    """Make `data` appear at `url` whole or not at all, replacing what was there."""
    fs, path = filesystem(url)
    with _named("write", url, writes=True):
        if is_local(url):
            local_disk.write_whole(Path(path), data)
        else:
            fs.pipe_file(path, data)


def create(url: str, data: bytes) -> bool:
    """As `publish`, but only where nothing is yet. `data` must hold an id of its writer: an answer that
    was lost makes the client try again and be refused by its own success, so the object is compared."""
    fs, path = filesystem(url)
    with _named("create", url, writes=True):
        try:
            if is_local(url):
                local_disk.create_whole(Path(path), data)
            else:
                fs.pipe_file(path, data, mode="create")
        except OSError as error:
            if not (isinstance(error, FileExistsError) or error.errno == errno.EINVAL):
                raise
            return _holds(fs, path, data)
    return True


def _holds(fs: Any, path: str, data: bytes) -> bool:
    fs.invalidate_cache()
    try:
        return bool(fs.cat_file(path) == data)
    except FileNotFoundError:  # whoever was there has gone meanwhile
        return False


def remove(url: str) -> None:
    """Remove one object; one that is not there is no error."""
    fs, path = filesystem(url)
    with _named("remove", url):
        try:
            fs.rm_file(path)
        except FileNotFoundError:
            return


def remove_folder(url: str) -> None:
    """Remove all objects below; on a local disk the folder too, with what a killed `publish` left in it."""
    for info in list_files(url):
        remove(info.url)
    if is_local(url):
        with _named("remove", url):
            local_disk.remove_tree(Path(normalize(url)))


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
    with _named("list", prefix_url):
        try:
            found = fs.find(path, detail=True)
        except FileNotFoundError:
            return []
    infos = (_info(normalize(prefix_url), path, {**entry, "name": name}) for name, entry in found.items())
    return sorted((i for i in infos if not local_disk.is_temporary(base_name(i.url))), key=lambda info: info.url)


def _info(folder_url: str, folder_path: str, entry: dict[str, Any]) -> ObjectInfo:
    """The store's own name (`bucket/key`) becomes a URL spelled as the one that was listed, for stores leave out
    the scheme, the host and the account."""
    name = str(entry["name"])
    url = name if "://" in name or is_local(folder_url) else folder_url + name.removeprefix(folder_path)
    return ObjectInfo(url, int(entry.get("size") or 0), _mark(entry))


def _mark(entry: dict[str, Any]) -> str:
    """The same from a listing and from a look at the one object: some say a time in two ways."""
    mark = next((entry[k] for k in _CONTENT_MARKS if entry.get(k)), "")
    return str(mark.timestamp() if isinstance(mark, datetime) else mark).strip('"')


def list_folder(folder_url: str) -> list[ObjectInfo]:
    """The objects right in a folder, none of those further down; none when there is no such folder."""
    fs, path = _listing(folder_url)
    with _named("list", folder_url):
        try:
            entries = fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
    return [_info(folder_url, path, entry) for entry in entries if entry["type"] == "file"]


def list_matches(glob_url: str) -> list[ObjectInfo]:
    """The objects whose URL matches a pattern of `*`, `?` and `[]`; a `**` stands for folders as well."""
    fs, path = _listing(glob_url)
    with _named("list", glob_url):
        entries = fs.glob(path, detail=True).values()
    folder = glob_folder(glob_url)
    start = "" if folder.endswith("://") else filesystem(folder)[1]
    return [_info(folder, start, entry) for entry in entries if entry["type"] == "file"]


def stat(url: str) -> ObjectInfo | None:
    """One object as its store lists it now, never from a cache; None where there is none (a folder is none)."""
    fs, path = _listing(url)
    with _named("look for", url):
        try:
            entry = fs.info(path)
        except FileNotFoundError as error:
            _raise_if_unanswered(url, error)
            return None
    return _info(url, path, {**entry, "name": url}) if entry["type"] == "file" else None


def _raise_if_unanswered(url: str, error: FileNotFoundError) -> None:
    """fsspec's web client says "not found" of every other refusal too, and of a server that it cannot reach."""
    cause = error.__cause__
    if is_web(url) and cause is not None and getattr(cause, "status", None) not in (404, 410):
        raise cause
