"""Writes to an object store: given up when they hang, or done only where what is there is known. storage.py hands in
fsspec's file system.

A client that gets no answer tries again by itself and is then refused by its own success; so whoever is refused looks
at what is there.
"""

from __future__ import annotations

import asyncio
import errno
from typing import Any

from pipeline.store_requests import is_changed

READ_TIMEOUT_S = 15.0  # of s3fs, where nobody chose another
SPARE_S = 4.0  # to connect; three writes that hang fit into the patience of store_requests.py
SLOWEST_BYTES_PER_S = 100_000


def put(fs: Any, path: str, data: bytes, **options: Any) -> None:
    """Replace what is there. Raises TimeoutError when it hangs: S3's client waits without end for the word to send the
    body ("100-continue"), and for a body that nobody takes."""
    if not fs.async_impl:
        fs.pipe_file(path, data, **options)
        return
    limit_s = time_limit_s(fs, len(data))
    writing = asyncio.run_coroutine_threadsafe(fs._pipe_file(path, data, **options), fs.loop)
    try:
        writing.result(limit_s)
    except TimeoutError as error:
        writing.cancel()  # or it would write when all have gone on
        raise TimeoutError(str(error) or f"not taken within {limit_s:.0f} s") from error


def time_limit_s(fs: Any, num_bytes: int) -> float:
    client_timeout_s = float(getattr(fs, "config_kwargs", {}).get("read_timeout", READ_TIMEOUT_S))
    return client_timeout_s + SPARE_S + num_bytes / SLOWEST_BYTES_PER_S


def create(fs: Any, path: str, data: bytes) -> bool:
    """Whether `data` is there now, put where nothing was."""
    # adlfs goes by `overwrite` and knows no `mode`; the others the other way round.
    options = {"overwrite": False} if "abfs" in fs.protocol else {"mode": "create"}
    try:
        put(fs, path, data, **options)
    except Exception as error:  # each store's client raises its own kinds
        if not _is_refused(error):
            raise
        return _read(fs, path) == data
    return True


def swap(fs: Any, path: str, data: bytes, old: bytes) -> bool:
    """Whether `data` is there now, put where `old` was. For S3: the write names the version that was looked at."""
    fs.invalidate_cache()
    try:
        etag = fs.info(path)["ETag"]
    except FileNotFoundError:
        return False
    there = _read(fs, path)
    if there != old:
        return there == data
    try:
        put(fs, path, data, IfMatch=etag)
    except Exception as error:  # as above
        if not _is_refused(error):
            raise
        return _read(fs, path) == data
    return True


def swap_hopefully(fs: Any, path: str, data: bytes, old: bytes) -> bool:
    """As `swap`, where the client knows no such condition: of two at the same moment both may be told that they won."""
    there = _read(fs, path)
    if there == old:
        put(fs, path, data)
        there = _read(fs, path)
    return there == data


def _is_refused(error: Exception) -> bool:
    """s3fs says EINVAL where it does not know better (and of bytes that were damaged on the way, which have a code)."""
    if isinstance(error, FileExistsError) or is_changed(error) or type(error).__name__ == "ResourceExistsError":
        return True
    return isinstance(error, OSError) and error.errno == errno.EINVAL and error.__cause__ is None


def _read(fs: Any, path: str) -> bytes | None:
    fs.invalidate_cache()
    try:
        return bytes(fs.cat_file(path))
    except FileNotFoundError:  # whoever was there has gone meanwhile
        return None
