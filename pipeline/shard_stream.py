"""The bytes of one shard: those of the object that was listed, all of one version, in order, and as the store has them.

storage.py reads, ranged_reader.py asks again. A tar says by itself where it ends: tar_members.py.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable
from typing import BinaryIO, Protocol, cast

from pipeline import storage
from pipeline.errors import ShardChanged, ShardUnreadable
from pipeline.md5_marks import Md5Marks, PartedMd5, Verdict
from pipeline.ranged_reader import Fetch, RangedReader
from pipeline.records import ObjectInfo
from pipeline.store_requests import is_changed, is_passing
from pipeline.stored_object import StoredObject
from pipeline.urls import is_local, public_url

log = logging.getLogger(__name__)
_marks = Md5Marks()  # what this process has seen


class _Md5(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def digest(self) -> bytes: ...


def open_shard(shard: ObjectInfo) -> BinaryIO:
    """A stream from front to back; to know that all is well, read on until it gives nothing. Raises ShardChanged where
    the object is not the one that was listed or is replaced meanwhile, and ShardUnreadable, FileNotFoundError,
    StorageError."""
    found = storage.look_at(shard.url)
    if found.size_bytes is None:
        raise ShardUnreadable(shard.url, "its server does not say how long it is, so a cut one could not be told")
    _require_same(shard, found)
    raw = _ranges(shard, found) if found.fetch else storage.open_stream(shard.url)
    hashes = found.md5 is not None and _marks.may_be_md5s(_kin(shard, found))
    return cast(BinaryIO, _Checked(raw, _new_md5(found) if hashes else None, lambda md5: _check_end(shard, found, md5)))


def _kin(shard: ObjectInfo, found: StoredObject) -> str:
    """Its bucket; those that came in parts apart, for some stores mark only these in a way of their own."""
    bucket = "/".join(shard.url.split("/", 3)[:3])
    return bucket if found.part_bytes is None else f"{bucket} (in parts)"


def _new_md5(found: StoredObject) -> _Md5:
    return hashlib.md5(usedforsecurity=False) if found.part_bytes is None else PartedMd5(found.part_bytes)


def _ranges(shard: ObjectInfo, found: StoredObject) -> BinaryIO:
    fetch = _final_or_not(shard, found)
    return cast(BinaryIO, RangedReader(public_url(shard.url), fetch, shard.size_bytes))


def _require_same(shard: ObjectInfo, found: ObjectInfo | StoredObject) -> None:
    if found.size_bytes != shard.size_bytes or shard.etag not in ("", found.etag):
        here, there = (f"{one.size_bytes} bytes, mark {one.etag!r}" for one in (found, shard))
        raise ShardChanged(shard.url, f"is another object ({here}) than the one listed ({there}); run again to take it")


def _final_or_not(shard: ObjectInfo, found: StoredObject) -> Fetch:
    """Say of each failure whether asking again may help."""
    read = found.fetch
    assert read is not None

    def fetch(start: int, end: int) -> bytes:
        try:
            return read(start, end)
        except Exception as error:  # each store's client raises its own kinds, botocore's are no OSError
            if is_changed(error):
                detail = (
                    f"was replaced while it was read (it was listed with mark {shard.etag!r}); run again to take it"
                )
                raise ShardChanged(shard.url, detail) from error
            if is_local(shard.url) or not is_passing(error):
                raise ShardUnreadable(shard.url, f"{type(error).__name__}: {error}") from error
            raise

    return fetch


def _check_end(shard: ObjectInfo, found: StoredObject, md5: bytes | None) -> None:
    """After the last byte: it is the same object still, and these are its bytes (where there is an MD5 to tell)."""
    now = storage.stat(shard.url)
    if now is None:
        raise ShardChanged(shard.url, "was removed while it was read; run again, or put it back")
    _require_same(shard, now)
    if md5 is None:
        return
    if md5 == found.md5:
        _marks.matched(_kin(shard, found))
        return
    if _md5_again(shard, found) != md5:
        raise ShardUnreadable(shard.url, "came damaged: the bytes do not have the store's MD5")
    _judge(shard, found)


def _judge(shard: ObjectInfo, found: StoredObject) -> None:
    """Twice the same bytes: the line is sound, so it is the mark that is something else, or the object itself."""
    verdict = _marks.differed(_kin(shard, found), shard.url)
    if verdict is Verdict.DAMAGED:
        detail = "the store's own mark is not the MD5 of what it gives, as it is of other objects of this bucket"
        raise ShardUnreadable(shard.url, f"is damaged in its store, or encrypted: {detail}; put it there again")
    said = "%s came twice the same, and its store's mark is not its MD5 (so it is in encrypted buckets): taken as it is"
    log.warning(said, public_url(shard.url))
    if verdict is Verdict.NO_MD5S:
        log.warning("%s has no MD5s for marks: size and tar must do from here on", public_url(_kin(shard, found)))


def _md5_again(shard: ObjectInfo, found: StoredObject) -> bytes:
    md5 = _new_md5(found)
    raw = _ranges(shard, found) if found.fetch else storage.open_stream(shard.url)
    for chunk in iter(lambda: raw.read(1 << 20), b""):
        md5.update(chunk)
    return md5.digest()


class _Checked(io.RawIOBase):
    """Calls `at_end` before it says that there is no more, with the digest of what passed if there is an `md5`."""

    def __init__(self, raw: BinaryIO, md5: _Md5 | None, at_end: Callable[[bytes | None], None]) -> None:
        self._raw, self._md5, self._at_end, self._ended = raw, md5, at_end, False

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._raw.read(size)
        if self._md5 is not None:
            self._md5.update(data)
        if not data and size != 0 and not self._ended:
            self._ended = True
            self._at_end(self._md5.digest() if self._md5 is not None else None)
        return data

    def close(self) -> None:
        self._raw.close()
        super().close()
