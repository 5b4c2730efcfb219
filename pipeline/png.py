"""PNG chunks, read far enough to notice damaged or missing pixels. Owns no pixels: images.py decodes.

Pillow steps over the checksums of the pixels, so that a file whose tail became zeros gives a picture, and where the
packed rows end too early, it leaves the others black. Format: PNG, third edition (W3C), sections 5, 7 and 8.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

START = b"\x89PNG\r\n\x1a\n"
_OVERHEAD = 12  # length and kind before, checksum behind
_PACKED_BYTES, _UNPACKED_BYTES = 1 << 14, 1 << 20  # at a time
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_WHOLE = ((0, 0, 1, 1),)
# Adam7's passes: first column and row, and the steps between those that follow
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def check_pixels(data: bytes) -> None:
    """Raises ValueError where the checksum of a chunk of pixels is wrong. What is cut is left to the decoder."""
    for kind, at, body in _chunks(data):
        checksum = int.from_bytes(data[at + 8 + len(body) : at + _OVERHEAD + len(body)], "big")
        if kind == b"IDAT" and zlib.crc32(body, zlib.crc32(kind)) != checksum:
            raise ValueError(f"the checksum of the pixels at byte {at} is wrong")


def check_rows(data: bytes) -> None:
    """Raises OSError ("truncated") where the pixels of a PNG unpack to fewer bytes than its header says. Takes about
    half as long as decoding does, and a few MiB."""
    header = next((bytes(body) for kind, _, body in _chunks(data) if kind == b"IHDR"), b"")
    wanted, found, packed = _num_bytes(header), 0, zlib.decompressobj()
    for piece in _packed_pieces(data):
        while len(piece) and found < wanted and not packed.eof:
            found += len(packed.decompress(piece, _UNPACKED_BYTES))
            piece = memoryview(packed.unconsumed_tail)
    if found < wanted and found + len(packed.flush()) < wanted:
        raise OSError(f"truncated: its rows have {found} of {wanted} bytes")


def _num_bytes(header: bytes) -> int:
    """Of all rows, unpacked: each has a byte for its filter."""
    width, height, bits, colours, *_, interlaced = struct.unpack(">IIBBBBB", header)
    total = 0
    for left, top, across, down in _PASSES if interlaced else _WHOLE:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0:
            total += max(0, rows) * (1 + -(-columns * bits * _CHANNELS[colours] // 8))
    return total


def _packed_pieces(data: bytes) -> Iterator[memoryview]:
    for kind, _, body in _chunks(data):
        if kind == b"IDAT":
            yield from (body[at : at + _PACKED_BYTES] for at in range(0, len(body), _PACKED_BYTES))


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, memoryview]]:
    """(kind, where it begins, its content) of each whole chunk before the end."""
    view, at = memoryview(data), len(START)
    while at + _OVERHEAD <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + _OVERHEAD + length
        if kind == b"IEND" or end > len(data):
            return
        yield kind, at, view[at + 8 : end - 4]
        at = end
