"""Parquet files on a store that fails now and then: what the store says is kept apart from what the bytes are."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import Damaged, StorageError
from pipeline.records import ObjectInfo
from pipeline.store_requests import is_passing, request

END_BYTES = 64 << 10
log = logging.getLogger(__name__)


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


def open_parquet(url: str) -> pq.ParquetFile:
    """Fetches the footer now and later only the columns and row groups that are read, neighbours in one request; pages
    must have their checksums. Raises FileNotFoundError, OSError or ArrowException, and what the store's client raises:
    whoever reads asks within `asked_again`."""
    return pq.ParquetFile(storage.open_ranges(url), pre_buffer=True, page_checksum_verification=True)


def intact(url: str, read: Callable[[], pa.Table]) -> pa.Table:
    """As `asked_again`, and once more where the bytes are not right, for a network damages bytes too, but not twice the
    same. Raises FileNotFoundError, StorageError, and Damaged where they stay wrong."""
    try:
        return asked_again(url, read)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        log.info("%s is read again: %s", storage.public_url(url), error)
    try:
        return asked_again(url, read)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise Damaged(f"{storage.public_url(url)} is damaged: {storage.public_text(str(error))}") from error
