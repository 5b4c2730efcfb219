"""PNG chunks, read far enough to notice damaged pixels. Owns no pixels: images.py decodes.

Pillow steps over the checksums of the pixels, so that a file whose tail became zeros gives a picture. Format: PNG,
third edition (W3C), section 5.
"""

from __future__ import annotations

import zlib

START = b"\x89PNG\r\n\x1a\n"
_OVERHEAD = 12  # length and kind before, checksum behind


def check_pixels(data: bytes) -> None:
    """Raises ValueError where the checksum of a chunk of pixels is wrong. What is cut is left to the decoder."""
    view, at = memoryview(data), len(START)
    while at + _OVERHEAD <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + _OVERHEAD + length
        if kind == b"IEND" or end > len(data):
            return
        if kind == b"IDAT" and zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise ValueError(f"the checksum of the pixels at byte {at} is wrong")
        at = end
