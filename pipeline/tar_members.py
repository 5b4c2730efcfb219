"""Tar bytes -> members, in one pass from front to back. Owns the tar format and nothing else.

Our own reader of 512-byte headers: `tarfile` ends quietly where a tar is cut at or inside a header, and
costs five times as much. Knows ustar, GNU long names and PAX (POSIX.1-2017, pax, "ustar Interchange Format").
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

from pipeline.errors import ShardDamaged, ShardError, ShardTruncated, ShardUnreadable
from pipeline.records import ObjectInfo

BLOCK = 512
CHUNK_BYTES = 4 << 20  # asked of the stream at a time: a whole block of ranged_reader.py, so that it is not copied
UNPACKED_BYTES = 1 << 16  # of a compressed tar at a time
SKIP_CHUNK_BYTES = 1 << 20
MAX_EXTENDED_HEADER_BYTES = 1 << 20
MAX_PADDING_BYTES = 1 << 20  # writers fill up to 10 KiB; more zeros are what a crash leaves of lost data
_REGULAR, _LINKS, _DIRECTORY = b"0\x007", b"12", b"5"
_DEVICES = b"346"  # character and block devices, pipes
_ZEROS = bytes(BLOCK)

Wanted = Callable[[str], int]
"""Name -> the most bytes of it to keep; 0 steps over its data."""


@dataclass(frozen=True)
class Member:
    """One tar member that is no directory. `data` is None where it wasn't wanted, is too large, or is no file;
    `offset` is where its data begins in the shard, None in a compressed one."""

    name: str
    size: int
    offset: int | None
    data: bytes | None
    is_file: bool


@dataclass(frozen=True)
class _Header:
    name: str
    size: int
    type: bytes


def tar_members(
    stream: BinaryIO, shard: ObjectInfo, wanted: Wanted, *, require_end_marker: bool = True
) -> Iterator[Member]:
    """Members in order. Raises ShardTruncated when the tar or the object ends early, ShardDamaged when a header
    is not one or something other than zeros follows the end, ShardUnreadable when the store fails."""
    reader = _Reader(stream, shard)
    extended: dict[str, str] | None = None  # records for the next member
    while (block := reader.header_block()) is not None:
        header = _parse(block, shard.url)
        if header.type in b"xLKg" and header.type:
            extended = _extended(extended, header, reader, shard.url)
            continue
        header = _apply(header, extended or {}, shard.url)
        extended = None
        if header.type in _REGULAR or header.type in _LINKS or header.type in _DEVICES:
            yield _member(header, reader, wanted)
        elif header.type != _DIRECTORY:  # a directory has no data, whatever its size field says
            raise ShardDamaged(shard.url, f"member {header.name!r} has type {header.type!r}, not supported")
    reader.finish(require_end_marker)
    if extended is not None:
        raise ShardDamaged(shard.url, "ends behind an extended header, whose member is missing")


def _member(header: _Header, reader: _Reader, wanted: Wanted) -> Member:
    offset = None if reader.compressed else reader.position
    if header.type not in _REGULAR:  # links and devices have no data, whatever their size field says
        return Member(header.name, 0, offset, None, is_file=False)
    if header.size <= wanted(header.name):
        return Member(header.name, header.size, offset, reader.data(header.size), is_file=True)
    reader.skip(header.size)
    return Member(header.name, header.size, offset, None, is_file=True)


class _Reader:
    """The stream, counted: each read gives all its bytes or raises. Cuts what is asked for out of large chunks, for a
    read of the stream goes through four layers and gives the interpreter's lock away where an MD5 is taken."""

    def __init__(self, stream: BinaryIO, shard: ObjectInfo) -> None:
        self._shard = shard
        self._raw = _Counted(stream)
        self.compressed = self._guarded(self._raw.peek, CHUNK_BYTES).startswith(b"\x1f\x8b")
        self._stream = cast(BinaryIO, gzip.GzipFile(fileobj=self._raw)) if self.compressed else self._raw
        self._chunk_bytes = UNPACKED_BYTES if self.compressed else CHUNK_BYTES
        self._chunk, self._used = b"", 0  # what came last, and how much of it has been read
        self.position = 0
        self._ended = False

    def _guarded(self, read: Callable[[int], bytes], size: int) -> bytes:
        try:
            return read(size)
        except ShardError:
            raise
        except EOFError as error:
            raise ShardTruncated(self._shard.url, f"the gzip stream is cut: {error}") from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise ShardDamaged(self._shard.url, f"not a good gzip stream: {error}") from error
        except Exception as error:  # each store's client raises its own kinds, botocore's are no OSError
            raise ShardUnreadable(self._shard.url, f"{type(error).__name__}: {error}") from error

    def _read(self, size: int) -> bytes:
        """Fewer bytes only at the end."""
        end = self._used + size
        if end > len(self._chunk):
            return self._read_across(size)
        data = self._chunk[self._used : end]
        self._used = end
        self.position += size
        return data

    def _read_across(self, size: int) -> bytes:
        pieces = [self._chunk[self._used :]]
        self._chunk, self._used = b"", 0  # given back before the next one is waited for
        missing = size - len(pieces[0])
        while missing and (chunk := self._guarded(self._stream.read, self._chunk_bytes)):
            pieces.append(chunk[:missing])
            if len(chunk) > missing:
                self._chunk, self._used = chunk, missing
            missing -= len(pieces[-1])
        data = b"".join(pieces)
        self.position += len(data)
        return data

    def header_block(self) -> bytes | None:
        """The next header; None at the end-of-archive block or the end of the stream."""
        start = self.position
        block = self._read(BLOCK)
        if block == _ZEROS:
            self._ended = True
            return None
        if not block and start:
            return None
        if len(block) < BLOCK:
            raise ShardTruncated(self._shard.url, f"ends at byte {self.position}, inside a header"
                                 if block else "is empty: not even an end-of-archive block")  # fmt: skip
        return block

    def data(self, size: int) -> bytes:
        data = self._read(size)
        if len(data) < size or len(self._read(-size % BLOCK)) < -size % BLOCK:
            self._cut(size)
        return data

    def skip(self, size: int) -> None:
        missing = size + -size % BLOCK
        while missing:
            chunk = self._read(min(missing, SKIP_CHUNK_BYTES))
            if not chunk:
                self._cut(size)
            missing -= len(chunk)

    def _cut(self, size: int) -> None:
        raise ShardTruncated(self._shard.url, f"ends at byte {self.position}, inside a member of {size} bytes")

    def finish(self, require_end_marker: bool) -> None:
        """Read on to the end: nothing but zeros may follow, and every byte of the object must have come."""
        if require_end_marker and not self._ended:
            raise ShardTruncated(self._shard.url, f"ends at byte {self.position} without an end-of-archive block")
        end = self.position
        while chunk := self._read(SKIP_CHUNK_BYTES):
            if chunk.strip(b"\0"):
                raise ShardDamaged(self._shard.url, "has data behind its end-of-archive block")
        if self.position - end > MAX_PADDING_BYTES:
            raise ShardDamaged(self._shard.url, f"ends in {self.position - end} zero bytes: was its data lost?")
        if self._raw.count != self._shard.size_bytes:
            detail = f"gave {self._raw.count} bytes where {self._shard.size_bytes} were listed"
            raise ShardTruncated(self._shard.url, detail)


class _Counted(io.RawIOBase):
    """Counts the bytes that the store gave; `peek` looks ahead at the start."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._ahead = io.BytesIO()
        self.count = 0

    def readable(self) -> bool:
        return True

    def peek(self, size: int) -> bytes:
        self._ahead = io.BytesIO(self._stream.read(size))
        return self._ahead.getvalue()

    def read(self, size: int = -1) -> bytes:
        data = self._ahead.read(size)
        if not data:
            self._ahead = io.BytesIO()  # so that what was in it is given back
            data = self._stream.read(size)
        self.count += len(data)
        return data


def _parse(block: bytes, url: str) -> _Header:
    stored = _number(block[148:156], url)
    total = _sum(block[:256]) + _sum(block[256:]) - _sum(block[148:156]) + 8 * 32
    if stored != total and stored != total - 256 * sum(byte > 127 for byte in block[:148] + block[156:]):
        raise ShardDamaged(url, "a header's checksum is wrong: damaged, or not a tar")
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and block[345]:
        name = f"{_text(block[345:500])}/{name}"
    size = _number(block[124:136], url)
    if size < 0:
        raise ShardDamaged(url, f"member {name!r} has a negative size")
    return _Header(name, size, block[156:157])


def _sum(data: bytes) -> int:
    """Of at most 256 bytes: there Adler's first sum, modulo 65,521, is 1 more, and it comes six times as fast."""
    return (zlib.adler32(data) & 0xFFFF) - 1


def _number(field: bytes, url: str) -> int:
    if field[0] & 0x80:  # GNU: base 256, for sizes from 8 GiB on
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError as error:
        raise ShardDamaged(url, f"a header has {field!r} for a number: damaged, or not a tar") from error


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", errors="backslashreplace")


def _extended(before: dict[str, str] | None, header: _Header, reader: _Reader, url: str) -> dict[str, str] | None:
    """What an extended header and those right before it say of the next member. A global one may say nothing that
    we use, and no two may say the same: readers differ on whom to believe."""
    if header.size > MAX_EXTENDED_HEADER_BYTES:
        raise ShardDamaged(url, f"the extended header {header.name!r} has {header.size} bytes")
    data = reader.data(header.size + -header.size % BLOCK)
    if header.type == b"L":
        records = {"path": _long_name(data, header.size, url)}
    else:
        records = {} if header.type == b"K" else _pax_records(data[: header.size], url)
    ours = {name for name in records if name in ("path", "size") or name.startswith("GNU.sparse.")}
    if header.type == b"g":
        if ours:
            raise ShardDamaged(url, f"a global header sets {sorted(ours)} of all members, not supported")
        return before
    if before is not None and ours & before.keys():
        raise ShardDamaged(url, f"two extended headers set {sorted(ours & before.keys())} of one member")
    return {**(before or {}), **records}


def _long_name(data: bytes, size: int, url: str) -> str:
    """GNU's long name; `size` counts the zero at its end, which some writers leave out. Some readers go by the one and
    some by the other."""
    name = data.partition(b"\0")[0]
    if not 0 < len(name) <= size:
        raise ShardDamaged(url, f"a long name of {len(name)} bytes is said to have {size}")
    return _text(name)


def _pax_records(data: bytes, url: str) -> dict[str, str]:
    """Records `length name=value\n`, whose length counts all of itself; the last of a name counts."""
    records: dict[str, str] = {}
    data, start = data.rstrip(b"\0"), 0
    while start < len(data):
        length, space, _ = data[start : start + 8].partition(b" ")
        end = start + int(length) if space and length.isdigit() else start
        name, equals, value = data[start + len(length) + 1 : max(0, end - 1)].partition(b"=")
        if not equals or data[end - 1 : end] != b"\n":
            raise ShardDamaged(url, f"the record at byte {start} of an extended header cannot be read")
        records[name.decode("utf-8", "backslashreplace")] = value.decode("utf-8", "backslashreplace")
        start = end
    return records


def _apply(header: _Header, extended: dict[str, str], url: str) -> _Header:
    if not extended:
        return header
    if any(name.startswith("GNU.sparse.") for name in extended):
        raise ShardDamaged(url, f"member {header.name!r} is sparse, not supported")
    size = extended.get("size", str(header.size))
    if not (size.isascii() and size.isdigit() and len(size) < 20):
        raise ShardDamaged(url, f"member {header.name!r} has size {size!r}")
    return _Header(extended.get("path") or header.name, int(size), header.type)
