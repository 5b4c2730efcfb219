"""URLs <-> bytes on any store. Publishing is one PUT; nobody else opens a URL for writing.

A URL is anything fsspec takes; a plain path is a URL too. The only module that knows fsspec.
"""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit, urlunsplit

import fsspec
from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

from pipeline.errors import NoShardsMatched, StorageError
from pipeline.records import ObjectInfo

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
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


def normalize(url: str) -> str:
    """The one spelling of a URL: local paths absolute and without `file://`, no trailing slash."""
    if url.startswith("file://"):
        url = url.removeprefix("file://")
    if "://" not in url:
        return os.path.abspath(Path(url).expanduser())  # noqa: PTH100 - resolve() would follow links
    return url.rstrip("/")


def public_url(url: str) -> str:
    """`url` without query string, fragment and credentials: what may be hashed, stored and shown."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def join(url: str, *names: str) -> str:
    return "/".join([url.rstrip("/"), *names])


def base_name(url: str) -> str:
    return PurePosixPath(urlsplit(url).path if "://" in url else url).name


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file://")


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
def _named(action: str, url: str) -> Iterator[None]:
    """Give every error of a store a name and the URL; a missing object stays FileNotFoundError."""
    try:
        yield
    except (FileNotFoundError, StorageError):
        raise
    except Exception as error:  # each store's client raises its own kinds, botocore's are no OSError
        raise StorageError(f"cannot {action} {public_url(url)}: {type(error).__name__}: {error}") from error


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
    with _named("write", url):
        if is_local(url):
            _with_temporary(Path(path), data, os.replace)
        else:
            fs.pipe_file(path, data)


def create(url: str, data: bytes) -> bool:
    """As `publish`, but only where nothing is yet. `data` must hold an id of its writer: an answer that
    was lost makes the client try again and be refused by its own success, so the object is compared."""
    fs, path = filesystem(url)
    with _named("create", url):
        try:
            if is_local(url):
                _with_temporary(Path(path), data, os.link)
            else:
                fs.pipe_file(path, data, mode="create")
        except OSError as error:
            if not (isinstance(error, FileExistsError) or error.errno == errno.EINVAL):
                raise
            fs.invalidate_cache()
            return bool(fs.cat_file(path) == data)
    return True


def _with_temporary(path: Path, data: bytes, finish: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        finish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove(url: str) -> None:
    """Remove one object; one that is not there is no error."""
    fs, path = filesystem(url)
    with _named("remove", url):
        try:
            fs.rm_file(path)
        except FileNotFoundError:
            return


def remove_temporaries(prefix_url: str) -> None:
    """Remove what a killed `publish` left on a local disk. Only for whoever holds the prefix."""
    if is_local(prefix_url):
        for path in Path(normalize(prefix_url)).rglob(".*.tmp"):
            path.unlink(missing_ok=True)


def list_files(prefix_url: str) -> list[ObjectInfo]:
    """All objects below a prefix, in name order; none when there is no such prefix. Never from a cache."""
    fs, path = filesystem(prefix_url)
    with _named("list", prefix_url):
        fs.invalidate_cache()
        try:
            found = fs.find(path, detail=True)
        except FileNotFoundError:
            return []
    infos = (_info(fs, prefix_url, entry) for entry in found.values())
    return sorted((i for i in infos if not _is_temporary(i.url)), key=lambda info: info.url)


def _is_temporary(url: str) -> bool:
    name = base_name(url)
    return name.startswith(".") and name.endswith(".tmp")


def _info(fs: Any, like_url: str, entry: dict[str, Any]) -> ObjectInfo:
    name = str(entry["name"])
    url = name if is_local(like_url) or "://" in name else str(fs.unstrip_protocol(name))
    mark = next((entry[k] for k in ("ETag", "etag", "md5Hash", "mtime", "created") if entry.get(k)), "")
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
    globs = [url for url in urls if re.search(r"[*?\[]", url)]
    named = [url for url in urls if url not in set(globs)]
    infos = [info for url in globs for info in _glob(url)] + _look_up(named)
    if not infos:
        raise NoShardsMatched(f"shard pattern {pattern!r} matches nothing; {_hint(pattern)}")
    return infos


def _hint(pattern: str) -> str:
    if is_local(pattern):
        folder = Path(normalize(re.split(r"[*?\[{]", pattern)[0] + "x")).parent
        return f"the folder {folder} " + ("holds no such file" if folder.is_dir() else "does not exist")
    return "check the bucket, the prefix and the credentials"


def _glob(url: str) -> list[ObjectInfo]:
    fs, path = filesystem(url)
    with _named("list", url):
        fs.invalidate_cache()
        entries = fs.glob(path, detail=True).values()
    return [_info(fs, url, entry) for entry in entries if entry["type"] == "file"]


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
        elif below := [i for i in _stat_or_list(url) if i.url == url or i.url.endswith(SHARD_SUFFIXES)]:
            infos += below
        else:
            raise NoShardsMatched(f"shard {public_url(url)} does not exist; {_hint(url)}")
    return infos


def _list_folder(folder: str) -> dict[str, ObjectInfo]:
    if folder.startswith(("http://", "https://")):  # no listing there: each is asked for by itself
        return {}
    fs, path = filesystem(folder)
    with _named("list", folder):
        fs.invalidate_cache()
        try:
            entries = fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
    infos = (_info(fs, folder, entry) for entry in entries if entry["type"] == "file")
    return {info.url: info for info in infos}


def _stat_or_list(url: str) -> list[ObjectInfo]:
    if not url.startswith(("http://", "https://")):
        return list_files(url)
    fs, path = filesystem(url)
    with _named("look for", url):
        try:
            entry = fs.info(path)
        except FileNotFoundError:
            return []
    return [_info(fs, url, {**entry, "name": url})]
