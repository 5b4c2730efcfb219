"""The demo's odd files: damaged ones of known kinds, and a CMYK photograph that looks odd and is good."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jobs.demo_images import PHOTOS, TILE_PX, photograph_folder
from pipeline.pictures import crop_to_square, encode_jpeg, encode_png, read_picture
from pipeline.records import FailureReason

Pixels = NDArray[np.uint8]
BOMB_SIDE_PX = 20_000


@dataclass(frozen=True)
class OddFile:
    """`make` gets a good tile. `reason` is what tokenising must say of the file; None: that it is an image."""

    name: str
    caption: str
    make: Callable[[Pixels], bytes]
    reason: FailureReason | None

    @property
    def key(self) -> str:
        return Path(self.name).stem


def _cut_jpeg(tile_HWC: Pixels) -> bytes:
    data = encode_jpeg(tile_HWC)
    return data[: len(data) // 2]


def _flipped_png(tile_HWC: Pixels) -> bytes:
    data = bytearray(encode_png(tile_HWC))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


def bomb_png(side: int = BOMB_SIDE_PX) -> bytes:
    """A few bytes that claim to be `side` x `side` pixels (PNG specification, sections 5.3 and 11.2)."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)  # 8-bit RGB, not interlaced
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(64))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


ODD_FILES = (
    OddFile("truncated.jpg", "a JPEG that was cut in half", _cut_jpeg, FailureReason.TRUNCATED_IMAGE),
    OddFile("text.jpg", "a text file named .jpg", lambda _: b"I am not a picture.\n", FailureReason.NOT_AN_IMAGE),
    OddFile(
        "bomb.png", "a tiny PNG that claims 400 million pixels", lambda _: bomb_png(), FailureReason.TOO_MANY_PIXELS
    ),
    OddFile("flipped.png", "a PNG with one damaged byte", _flipped_png, FailureReason.UNDECODABLE),
    OddFile("tiny.jpg", "an image of 8 by 8 pixels", lambda t: encode_jpeg(t[:8, :8]), FailureReason.TOO_SMALL),
    OddFile("cmyk.jpg", "a JPEG in printing colours (CMYK), a good image", lambda t: encode_jpeg(t, "CMYK"), None),
)


def make_odd_files(folder: Path) -> int:
    """Write ODD_FILES with captions and metadata into `folder`; returns how many."""
    photo = next(photo for photo in PHOTOS if photo.name == "chelsea")
    tile_HWC = crop_to_square(read_picture(photograph_folder() / photo.file), photo.held_out, TILE_PX)
    folder.mkdir(parents=True, exist_ok=True)
    for odd in ODD_FILES:
        path = folder / odd.name
        path.write_bytes(odd.make(tile_HWC))
        path.with_suffix(".txt").write_text(odd.caption, encoding="utf-8")
        path.with_suffix(".json").write_text(json.dumps({"source": odd.name, "split": "damaged"}))
    return len(ODD_FILES)
