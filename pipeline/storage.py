"""URLs <-> bytes on any store. Publishing is one PUT; nobody else opens a URL for writing.

A URL is anything fsspec takes; a plain path is a URL too. The only module that knows fsspec.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]
from fsspec.implementations.local import LocalFileSystem

from pipeline import local_disk
from pipeline.errors import NoShardsMatched, StorageError
from pipeline.records import ObjectInfo
from pipeline.urls import base_name as base_name
from pipeline.urls import glob_folder, is_glob, is_web
from pipeline.urls import is_local as is_local
from pipeline.urls import join as join
from pipeline.urls import normalize as normalize
from pipeline.urls import public_text as public_text
from pipeline.urls import public_url as public_url

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
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
    mark = next((entry[k] for k in _CONTENT_MARKS if entry.get(k)), "")
    return ObjectInfo(url, int(entry.get("size") or 0), str(mark).strip('"'))


def expand(patterns: Iterable[str]) -> list[ObjectInfo]:
    """The shards that brace patterns, globs and folders name, in URL order, each once.

    Costs one listing a folder, not a request a shard. Raises NoShardsMatched naming the pattern that
    matched nothing.
    """
    found = {info.url: info for pattern in patterns for info in _expand_one(pattern)}
    return [found[url] for url in sorted(found)]


def _expand_one(pattern: str) -> list[ObjectInfo]:
    try:
        urls = [normalize(url) for url in braceexpand(pattern)]
    except UnbalancedBracesError as error:
        raise NoShardsMatched(f"shard pattern {pattern!r} has unbalanced braces") from error
    globs = [info for url in urls if is_glob(url) for info in _glob(url)]
    return globs + _look_up([url for url in urls if not is_glob(url)])


def _hint(url: str) -> str:
    if is_local(url):
        folder = Path(glob_folder(url) if is_glob(url) else url.rpartition("/")[0] or "/")
        return f"the folder {folder} " + ("holds no such file" if folder.is_dir() else "does not exist")
    return "check the bucket, the prefix and the credentials"


def _glob(url: str) -> list[ObjectInfo]:
    fs, path = _listing(url)
    with _named("list", url):
        entries = fs.glob(path, detail=True).values()
    folder = glob_folder(url)
    start = "" if folder.endswith("://") else filesystem(folder)[1]
    infos = [_info(folder, start, entry) for entry in entries if entry["type"] == "file"]
    if not infos:
        shown = public_url(url) if is_web(url) else url
        raise NoShardsMatched(f"shard pattern {shown!r} matches nothing; {_hint(url)}")
    return infos


def _look_up(urls: list[str]) -> list[ObjectInfo]:
    """Named shards, by one listing per folder; a folder itself stands for the shards in it."""
    infos: list[ObjectInfo] = []
    listings: dict[str, dict[str, ObjectInfo]] = {}
    for url in urls:
        folder = url.rpartition("/")[0]
        if folder not in listings:
            listings[folder] = _list_folder(folder)
        if url in listings[folder]:
            infos.append(listings[folder][url])
        else:
            infos += _shards_of(url, _stat_or_list(url))
    return infos


def _shards_of(url: str, below: list[ObjectInfo]) -> list[ObjectInfo]:
    if not below:
        raise NoShardsMatched(f"shard {public_url(url)} does not exist; {_hint(url)}")
    shards = [info for info in below if info.url == url or info.url.endswith(SHARD_SUFFIXES)]
    if not shards:
        suffixes = ", ".join(SHARD_SUFFIXES)
        raise NoShardsMatched(f"{public_url(url)} holds no shard: none of its files ends with {suffixes}")
    return shards


def _list_folder(folder: str) -> dict[str, ObjectInfo]:
    if is_web(folder):  # no listing there: each is asked for by itself
        return {}
    fs, path = _listing(folder)
    with _named("list", folder):
        try:
            entries = fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
    infos = (_info(folder, path, entry) for entry in entries if entry["type"] == "file")
    return {info.url: info for info in infos}


def _stat_or_list(url: str) -> list[ObjectInfo]:
    if not is_web(url):
        return list_files(url)
    fs, path = filesystem(url)
    with _named("look for", url):
        try:
            entry = fs.info(path)
        except FileNotFoundError:
            return []
    return [_info(url, path, {**entry, "name": url})]
