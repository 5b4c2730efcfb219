"""JPEG markers, read far enough to notice a picture that was cut. Owns no pixels: images.py decodes.

libjpeg fills up with grey what is missing before an end marker and only warns, and Pillow doesn't pass the warning on.
Format: ITU-T T.81, annexes B and G.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

START = b"\xff\xd8\xff"
MAX_SCANS = 1000  # encoders write about ten; a decoder goes over the whole picture for each
_MARKER = re.compile(rb"\xff([^\x00\xff])")
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
# Eight bytes of ones, stuffed: what a Huffman decoder may look ahead behind the last block. No code is all ones, so
# they decode into two blocks at most.
_PADDING = b"\xff\x00" * 8
_HUFFMAN_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), (0xC2, 0xCA)
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # DHT, JPG and DAC lie between them
_START_OF_SCAN = 0xDA
_ALONE = frozenset({0x01, *range(0xD0, 0xDA)})  # without length and content


@dataclass(frozen=True)
class _Scan:
    """`first` to `last`: the coefficients it brings; `low_bit`: how many of their bits are still to come."""

    components: frozenset[int]
    first: int
    last: int
    low_bit: int
    data_end: int  # where in the file


def with_open_end(data: bytes) -> bytes:
    """`data` such that a decoder runs out of bytes where the picture was cut: padding instead of the end marker. The
    pixels of a whole picture are the same. One with several scans (progressive) comes back as it is, and so do bytes
    that are no JPEG. Raises OSError: "truncated" where the end marker or a scan is missing; more than MAX_SCANS.
    Not noticed: a part missing within one of several scans, restart intervals taken out, changed bytes that decode."""
    kind, components, scans = _read(data)
    if kind in _HUFFMAN_SEQUENTIAL and scans and scans[0].components == components:
        return b"".join([memoryview(data)[: scans[0].data_end], _PADDING])
    if kind and not scans:
        raise OSError("truncated: it has no end marker")
    missing = components - _complete(scans, 63 if kind in _PROGRESSIVE else 0)
    if scans and missing:
        raise OSError(f"truncated: scans of {len(missing)} of its {len(components)} components are missing")
    return data


@dataclass(frozen=True, slots=True)
class Header:
    """Of a plain picture. `has_more`: segments that may say more of it, as EXIF does."""

    width: int
    height: int
    is_progressive: bool
    has_more: bool


def plain_header(data: bytes) -> Header | None:
    """Of a picture that a decoder which stops at every warning of libjpeg can judge without help: grey or YCbCr of 8
    bits, all in one scan or progressive with every scan, and only one way to read its markers, for nothing lies between
    them. None of any other."""
    frame, kind, has_more, at = b"", 0, False, 2
    while at + 12 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        body = data[at + 4 : at + 2 + length]
        if marker == _START_OF_SCAN:
            return _plain(frame, kind, has_more) if _is_whole(data, kind, frame, body) else None
        if marker in _ALONE or marker == 0xFF or length < 2 or (marker in _FRAMES and frame):
            return None
        if marker in _FRAMES:
            frame, kind = body, marker
        has_more = has_more or not (marker in _FRAMES or _says_nothing_more(marker, body))
        at += 2 + length
    return None


def _plain(frame: bytes, kind: int, has_more: bool) -> Header | None:
    """T.81, B.2.2: precision, height, width, number of components, three bytes for each."""
    ids = frame[6::3]
    if frame[0] != 8 or len(frame) != 6 + 3 * frame[5] or not (len(ids) == 1 or ids == b"\1\2\3"):
        return None
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    return Header(width, height, kind in _PROGRESSIVE, has_more) if width and height else None


def _is_whole(data: bytes, kind: int, frame: bytes, scan: bytes) -> bool:
    if len(frame) < 9 or len(scan) < 6 or kind not in (*_HUFFMAN_SEQUENTIAL, _PROGRESSIVE[0]):
        return False
    if kind in _HUFFMAN_SEQUENTIAL:  # a decoder warns where it lacks bits of the one scan
        return scan[0] == frame[5] and scan[1 : 1 + 2 * scan[0] : 2] == frame[6::3]
    try:
        return with_open_end(data) == data
    except OSError:
        return False


def _says_nothing_more(marker: int, body: bytes) -> bool:
    """Tables and comments, and what Pillow and libjpeg read in one way: a JFIF header, a colour profile, and Adobe's
    word that it is YCbCr."""
    if marker == 0xE0:
        return body.startswith(b"JFIF\0") and len(body) >= 14
    if marker == 0xE2:
        return body.startswith(b"ICC_PROFILE\0") and len(body) >= 16
    if marker == 0xEE:
        return body.startswith(b"Adobe") and len(body) == 12 and body[11] == 1
    return marker in (0xC4, 0xDB, 0xDD, 0xFE)


def _complete(scans: list[_Scan], last: int) -> frozenset[int]:
    """The components of which every bit of the coefficients 0 to `last` comes."""
    bits_to_come: dict[tuple[int, int], int] = {}
    for scan in scans:
        for component in scan.components:
            bits_to_come |= {(component, n): scan.low_bit for n in range(scan.first, scan.last + 1)}
    seen = frozenset(component for scan in scans for component in scan.components)
    return frozenset(c for c in seen if all(bits_to_come.get((c, n)) == 0 for n in range(last + 1)))


def _read(data: bytes) -> tuple[int, frozenset[int], list[_Scan]]:
    """The kind of frame, its components, and the scans that have an end. Raises OSError where these are too many."""
    kind, components = 0, frozenset[int]()
    scans: list[_Scan] = []
    for marker, body, end in _segments(data):
        if marker in _FRAMES:
            kind, components = marker, frozenset(body[6::3][: body[5]])
        elif marker == _START_OF_SCAN:
            ids, (first, last, bits) = body[1 : 1 + 2 * body[0] : 2], body[1 + 2 * body[0] :][:3]
            scans.append(_Scan(frozenset(ids), first, last, bits & 15, end))
        if len(scans) > MAX_SCANS:
            raise OSError(f"it has more than {MAX_SCANS} scans")
    return kind, components, scans


def _scan_end(data: bytes, start: int) -> int | None:
    """The first marker behind `start`: stuffed bytes and restart markers belong to the scan."""
    found = _END_OF_SCAN.search(data, start)
    return found.start() if found else None


def _segments(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """(marker, content, where it and its data end) up to the end marker; stops where the bytes are no JPEG."""
    at = 2
    while (found := _MARKER.search(data, at)) and found[1] != b"\xd9":
        marker, at = found[1][0], found.end()
        if marker in _ALONE:
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        at += length
        if length < 2 or at > len(data):
            return
        body = data[at - length + 2 : at]
        if marker in _FRAMES and len(body) < 9:
            return
        if marker == _START_OF_SCAN and not 6 <= len(body) == 4 + 2 * body[0] <= 12:  # of four components at most
            return
        if marker == _START_OF_SCAN:
            end = _scan_end(data, at)
            if end is None:
                return
            at = end
        yield marker, body, at
