"""A file of weights at any URL as something to seek in, and its sha256; nothing of it is read for what it says."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pipeline import storage
from pipeline.errors import PipelineError
from pipeline.urls import is_web

CHUNK_BYTES = 32 << 20
MAX_UNKNOWN_BYTES = 16 << 30  # of a web server that does not say how much it will send


class SourceNotFound(PipelineError):
    """There is nothing to import at that URL."""


class SourceChanged(PipelineError):
    """The file was written to while it was read: its sha256 is not of what was read."""


@dataclass(frozen=True)
class SourceFile:
    """`name` is the last part of its URL: a record goes to other machines, where paths say nothing."""

    name: str
    file: BinaryIO
    num_bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return {"sha256": self.sha256, "bytes": self.num_bytes}


@contextmanager
def open_source(url: str) -> Iterator[SourceFile]:
    """The file on a local disk itself; a copy without a name of any other, gone at the end of the block. Raises
    SourceNotFound, StorageError, and at the end of the block SourceChanged."""
    url = storage.normalize(url)
    info = storage.stat(url)
    if info is None:
        raise SourceNotFound(f"no file at {storage.public_url(url)}")
    with Path(url).open("rb") if storage.is_local(url) else tempfile.TemporaryFile() as file:
        if not storage.is_local(url):
            _copy(url, info.size_bytes, file)
        before = _version(file)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        num_bytes = file.tell()
        file.seek(0)
        yield SourceFile(storage.base_name(url), file, num_bytes, digest)
        if _version(file) != before:
            raise SourceChanged(f"{storage.public_url(url)} was written to while it was read: import it again")


def _version(file: BinaryIO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def _copy(url: str, size_bytes: int, file: Any) -> None:
    """In ranges, each asked for again where it is cut short; a web server may know no ranges."""
    if is_web(url):
        storage.copy_stream(url, file, size_bytes or MAX_UNKNOWN_BYTES)
    else:
        for start in range(0, size_bytes, CHUNK_BYTES):
            file.write(storage.read_range(url, start, min(CHUNK_BYTES, size_bytes - start)))
    file.seek(0)
