"""What a store says of one object, and how to read it by ranges. storage.py hands in fsspec's file system."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, cast

from pipeline.store_requests import is_passing
from pipeline.urls import is_s3, is_web

_CONTENT_MARKS = ("ETag", "etag", "md5Hash", "mtime", "created", "Last-Modified")
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")
_PARTED = re.compile("([0-9a-f]{32})-([1-9][0-9]*)")  # the MD5 of the MD5s of so many parts
AS_IT_IS = {"Accept-Encoding": "identity"}  # bytes that a server packs for the way have another length


@dataclass(frozen=True)
class StoredObject:
    """One object as it is now. `size_bytes` is None where the store does not say, `md5` where it has none, and `fetch`
    (start, end -> those bytes, by one request) where a web server knows no ranges. With `part_bytes`, `md5` is that of
    the MD5s of its parts, all of that size but the last."""

    etag: str
    size_bytes: int | None
    md5: bytes | None
    fetch: Callable[[int, int], bytes] | None
    part_bytes: int | None = None


def look_at(url: str, fs: Any, path: str) -> StoredObject:
    """Raises FileNotFoundError, and what the store's client raises."""
    if is_s3(url):  # its file says If-Match in each request
        file = fs.open(path, "rb", cache_type="none")
        entry, fetch = file.details, file._fetch_range  # fsspec's hook for one range; keeps no state
    else:
        entry = entry_of(url, fs, path)
        fetch = _web_ranges(fs, path, entry) if is_web(url) else partial(fs.cat_file, path)
    mark, size = mark_of(entry), entry.get("size")
    if (
        is_s3(url)
        and (parted := _PARTED.fullmatch(mark))
        and (part_bytes := _part_bytes(fs, path, size, int(parted[2])))
    ):
        return StoredObject(mark, size, bytes.fromhex(parted[1]), fetch, part_bytes)
    return StoredObject(mark, size, _md5(url, entry), fetch)


def _part_bytes(fs: Any, path: str, size: int, num_parts: int) -> int | None:
    """None where the parts are not all of one size but the last, or the store does not say."""
    bucket, key, _ = fs.split_path(path)

    def length(part: int) -> int:
        return int(fs.call_s3("head_object", fs.kwargs, Bucket=bucket, Key=key, PartNumber=part)["ContentLength"])

    try:
        first, last = length(1), length(num_parts)
    except OSError as error:  # s3fs's, of every refusal
        if is_passing(error):
            raise
        return None
    return first if 0 < last <= first and first * (num_parts - 1) + last == size else None


def _web_ranges(fs: Any, path: str, entry: dict[str, Any]) -> Callable[[int, int], bytes] | None:
    size = entry.get("size")
    if not size or not entry.get("partial", True):
        return None
    file = fs.open(path, "rb", size=size, cache_type="none", headers=AS_IT_IS)
    try:
        file._fetch_range(size - 1, size)
    except ValueError:  # it sent all from the start
        return None
    return cast(Callable[[int, int], bytes], file._fetch_range)


def _md5(url: str, entry: dict[str, Any]) -> bytes | None:
    etag = str(entry.get("ETag", "")).strip('"')
    if is_s3(url) and re.fullmatch("[0-9a-f]{32}", etag):  # of an object that came in one piece
        return bytes.fromhex(etag)
    encoded = entry.get("md5Hash") or entry.get("Content-MD5")
    return base64.b64decode(encoded) if encoded else None


def entry_of(url: str, fs: Any, path: str) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], fs.info(path))
    except FileNotFoundError as error:
        # fsspec's web client says so of every other refusal too, and of a server that it cannot reach.
        cause = error.__cause__
        if is_web(url) and cause is not None and getattr(cause, "status", None) not in (404, 410):
            raise cause from None
        raise


def mark_of(entry: dict[str, Any]) -> str:
    """The same from a listing and from a look at the one object: some say a time in two ways."""
    mark = next((entry[k] for k in _CONTENT_MARKS if entry.get(k)), "")
    return str(mark.timestamp() if isinstance(mark, datetime) else mark).strip('"')


def time_of(entry: dict[str, Any]) -> float | None:
    """When it was written, in seconds since the epoch; None where a listing does not say."""
    times = [entry[name] for name in _TIMES if entry.get(name)]
    if not times:
        return None
    time = datetime.fromisoformat(times[0]) if isinstance(times[0], str) else times[0]
    return time.timestamp() if isinstance(time, datetime) else float(time)
