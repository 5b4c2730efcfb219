"""Whether the marks of a store are MD5s of what it holds: those of encrypted buckets are not, and look the same."""

from __future__ import annotations

import hashlib
from enum import Enum

ENOUGH_STRANGERS = 3


class Verdict(Enum):
    """Of an object that is read twice the same and does not have its mark for an MD5."""

    UNKNOWN = "unknown"  # nothing says yet what the marks of its bucket are
    NO_MD5S = "no MD5s"  # as before, and this was the last that was looked at
    DAMAGED = "damaged"  # its neighbours have theirs


class Md5Marks:
    """What was seen in this process of each bucket. One object that has its MD5 settles it for good; without one, it
    takes ENOUGH_STRANGERS distinct objects to believe that there are none. (One alone may have been damaged in its
    store.)"""

    def __init__(self) -> None:
        self._proven: set[str] = set()
        self._strangers: dict[str, set[str]] = {}

    def may_be_md5s(self, bucket: str) -> bool:
        return bucket in self._proven or len(self._strangers.get(bucket, ())) < ENOUGH_STRANGERS

    def matched(self, bucket: str) -> None:
        self._proven.add(bucket)

    def differed(self, bucket: str, url: str) -> Verdict:
        """`url` gave the same bytes twice, and another MD5."""
        if bucket in self._proven:
            return Verdict.DAMAGED
        self._strangers.setdefault(bucket, set()).add(url)
        return Verdict.UNKNOWN if self.may_be_md5s(bucket) else Verdict.NO_MD5S


class PartedMd5:
    """The MD5 of the MD5s of the parts, all of `part_bytes` but the last: S3's mark of an object that came in parts."""

    def __init__(self, part_bytes: int) -> None:
        self._part_bytes, self._filled = part_bytes, 0
        self._part, self._all = (hashlib.md5(usedforsecurity=False) for _ in range(2))

    def update(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            piece = rest[: self._part_bytes - self._filled]
            self._part.update(piece)
            self._filled, rest = self._filled + len(piece), rest[len(piece) :]
            if self._filled == self._part_bytes:
                self._end_part()

    def digest(self) -> bytes:
        """Only at the end."""
        if self._filled:
            self._end_part()
        return self._all.digest()

    def _end_part(self) -> None:
        self._all.update(self._part.digest())
        self._part, self._filled = hashlib.md5(usedforsecurity=False), 0
