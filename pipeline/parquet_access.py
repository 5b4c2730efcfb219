"""Parquet files on a store that fails now and then: what the store says is kept apart from what the bytes are."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

from pipeline import storage
from pipeline.errors import StorageError
from pipeline.records import ObjectInfo
from pipeline.store_requests import is_passing, request

END_BYTES = 64 << 10


def file_end(info: ObjectInfo) -> bytes:
    """The footer of a Parquet file, whole, behind what else fits into one request; a second one where it is longer.
    Raises FileNotFoundError, StorageError."""
    end = storage.read_range(info.url, max(0, info.size_bytes - END_BYTES), min(info.size_bytes, END_BYTES))
    footer_bytes = int.from_bytes(end[-8:-4], "little") + 8
    if len(end) < footer_bytes <= info.size_bytes:
        end = storage.read_range(info.url, info.size_bytes - footer_bytes, footer_bytes)
    return b"PAR1" + end


def asked_again(url: str, read: Callable[[], pa.Table]) -> pa.Table:
    """For Arrow, which asks the store by itself: what it says of the bytes stays as it is."""
    try:
        return request("read", url, read)
    except StorageError as error:
        cause = error.__cause__
        is_arrows = isinstance(cause, OSError) and cause.errno is None and not is_passing(cause)
        if cause is not None and (is_arrows or isinstance(cause, pa.ArrowException)):
            raise cause from None
        raise
