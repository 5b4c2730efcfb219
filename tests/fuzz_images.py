"""Images for the fuzzer: good ones of every format, and what a careless or hostile world makes of them."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, PngImagePlugin

from make_data import bomb_png, encoded, pixels

JPEG_END = b"\xff\xd9"


@cache
def good_images() -> tuple[tuple[str, bytes], ...]:
    """(extension, bytes): each of them must become a row."""
    rgb = Image.fromarray(pixels(1, 40, 30))
    rgba = rgb.convert("RGBA")
    rgba.putalpha(rgb.convert("L"))
    palette = rgb.quantize(16)
    wide = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    frames = [Image.new("RGB", (24, 24), colour) for colour in ("red", "blue", "white")]
    exif = Image.Exif()
    exif[0x0112] = 6
    return (
        ("jpg", encoded(rgb, "JPEG")),
        ("jpg", encoded(rgb, "JPEG", quality=95, subsampling=0, exif=exif)),
        ("jpeg", encoded(rgb, "JPEG", progressive=True)),
        ("JPG", encoded(rgb.convert("CMYK"), "JPEG")),
        ("jpg", encoded(rgb.convert("L"), "JPEG", restart_marker_rows=1)),
        ("png", encoded(rgb, "PNG")),
        ("png", encoded(rgba, "PNG", exif=exif)),
        ("PNG", encoded(palette, "PNG", transparency=3)),
        ("png", encoded(wide, "PNG")),
        ("png", encoded(rgb.convert("1"), "PNG")),
        ("webp", encoded(rgb, "WEBP")),
        ("WebP", encoded(rgba, "WEBP", lossless=True)),
        ("webp", encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])),
        ("gif", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])),
        ("gif", encoded(palette, "GIF", transparency=2)),
        ("tif", encoded(rgb, "TIFF")),
        ("tiff", encoded(rgb, "TIFF", compression="tiff_lzw")),
        ("tif", encoded(rgb, "TIFF", compression="jpeg")),
        ("tif", encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])),
        ("bmp", encoded(rgb, "BMP")),
        ("ppm", encoded(rgb, "PPM")),
        ("avif", encoded(rgb, "AVIF")),
    )


def _of(*extensions: str) -> list[bytes]:
    return [data for extension, data in good_images() if extension.lower() in extensions]


def _jpeg_end_put_back(rng: random.Random) -> bytes:
    data = rng.choice(_of("jpg", "jpeg"))
    return data[: rng.randrange(20, len(data))] + JPEG_END


def _jpeg_segments(rng: random.Random) -> bytes:
    """Random EXIF, ICC, Adobe and comment segments, with true or lying lengths, behind the first marker."""
    data = rng.choice(_of("jpg", "jpeg"))
    out = data[:2]
    for _ in range(rng.randint(1, 5)):
        kind, head = rng.choice([
            (0xE1, b"Exif\0\0"), (0xE1, b"http://ns.adobe.com/xap/1.0/\0"), (0xE2, b"ICC_PROFILE\0\x01\x01"),
            (0xE2, b"MPF\0"), (0xED, b"Photoshop 3.0\0"), (0xEE, b"Adobe"), (0xFE, b""), (0xC4, b""), (0xDB, b""),
        ])  # fmt: skip
        body = head + rng.choice([rng.randbytes(rng.choice((0, 1, 8, 30, 3000))), b"II*\0\x08\0\0\0" * 5])
        length = rng.choice([len(body) + 2] * 3 + [0, 1, 2, 65535, len(body)])
        out += struct.pack(">BBH", 0xFF, kind, length) + body
    return out + data[2:]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def text_bomb(num_bytes: int = 80 << 20, kind: bytes = b"zTXt") -> bytes:
    """A PNG whose text, or colour profile, unpacks to that many bytes."""
    packed = zlib.compress(bytes(num_bytes), 9)
    head = {b"zTXt": b"Comment\0\0", b"iTXt": b"Comment\0\x01\0\0\0", b"iCCP": b"profile\0\0"}[kind]
    data = _of("png")[0]
    return data[:33] + png_chunk(kind, head + packed) + data[33:]


def _png_chunks(rng: random.Random) -> bytes:
    """Chunks behind the header with right checksums and wrong content."""
    data = rng.choice(_of("png"))
    kinds = [b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"gAMA", b"pHYs", b"IHDR"]
    chunks = b"".join(
        png_chunk(rng.choice(kinds), rng.randbytes(rng.choice((0, 1, 2, 9, 26, 500)))) for _ in range(rng.randint(1, 4))
    )
    return data[:33] + chunks + data[33:]


@cache
def _bombs() -> tuple[bytes, ...]:
    many = PngImagePlugin.PngInfo()
    for n in range(300):
        many.add_text(f"k{n}", "x" * 5000, zip=True)
    return (
        text_bomb(8 << 20),
        text_bomb(8 << 20, b"iTXt"),
        text_bomb(8 << 20, b"iCCP"),
        encoded(Image.new("RGB", (32, 32)), "PNG", pnginfo=many),
    )


def _bomb(rng: random.Random) -> bytes:
    side = rng.choice([13_378, 20_000, 65_535, 2**31 - 1])
    jpeg, gif = bytearray(_of("jpg")[0]), bytearray(_of("gif")[0])
    frame = jpeg.index(b"\xff\xc0") + 5
    jpeg[frame : frame + 4] = struct.pack(">HH", min(side, 65_535), min(side, 65_535))
    gif[6:10] = struct.pack("<HH", min(side, 65_535), min(side, 65_535))
    return rng.choice([bomb_png(side, side), bomb_png(side, 1), bytes(jpeg), bytes(gif), *_bombs()])


def tiff(entries: list[tuple[int, int, int, int]], next_ifd: int, tail: bytes = b"") -> bytes:
    """A little-endian TIFF with one directory at byte 8: (tag, type, count, value)."""
    body = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + body + struct.pack("<I", next_ifd) + tail


def _tiff(rng: random.Random) -> bytes:
    """Directories that point at themselves, at each other, or far away; absurd counts and sizes."""
    huge = rng.choice([0, 1, 7, 40, 65_535, 2**31 - 1, 2**32 - 1])
    entries = [
        (256, 4, 1, rng.choice([40, huge])), (257, 4, 1, rng.choice([30, huge])), (258, 3, 1, 8),
        (259, 3, 1, rng.choice([1, 1, 5, 7, 8, 32773, 65_000])), (262, 3, 1, rng.choice([0, 1, 2, 3, 6])),
        (273, 4, rng.choice([1, huge]), rng.choice([8, huge])), (277, 3, 1, rng.choice([1, 3, 4, huge & 0xFFFF])),
        (278, 4, 1, rng.choice([30, huge])), (279, 4, rng.choice([1, huge]), rng.choice([1200, huge])),
        (rng.choice([322, 330, 34665, 34675, 700]), rng.choice([1, 2, 4, 5, 7, 12, 13]), huge, rng.choice([8, huge])),
    ]  # fmt: skip
    return tiff(entries, rng.choice([0, 8, 8, 10, 2**32 - 8]), rng.randbytes(2000))


def _changed(rng: random.Random) -> bytes:
    data = bytearray(rng.choice(good_images())[1])
    for _ in range(rng.randint(1, 8)):
        place = rng.randrange(min(len(data), rng.choice((80, 1 << 20))))
        length = rng.choice((0, 1, 1, 1, 9))
        data[place : place + length] = rng.randbytes(rng.choice((0, 1, 1, 1, 9)))
    return bytes(data)


def _cut(rng: random.Random) -> bytes:
    data = rng.choice(good_images())[1]
    return data[: rng.randrange(len(data))]


def _nonsense(rng: random.Random) -> bytes:
    heads = [
        b"",
        b"GIF89a",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
        b"RIFF\xff\xff\xff\xffWEBPVP8X",
        b"BM",
        b"II*\0",
    ]
    heads += [b"P6 99999999 99999999 255\n", b"P6\n#", b"\0\0\0\x1cftypavif", b"%!PS-Adobe-3.0\n", b"<svg/>"]
    return rng.choice(heads) + rng.randbytes(rng.choice((0, 1, 20, 3000)))


IMAGE_DAMAGE: dict[str, Callable[[random.Random], bytes]] = {
    "cut": _cut,
    "jpeg cut, end marker put back": _jpeg_end_put_back,
    "bytes changed": _changed,
    "jpeg segments": _jpeg_segments,
    "png chunks": _png_chunks,
    "bomb": _bomb,
    "tiff directories": _tiff,
    "nonsense": _nonsense,
}


def damaged_image(rng: random.Random) -> tuple[str, bytes]:
    """(extension, bytes); the extension may lie, and what was damaged may still be a good image."""
    extension = rng.choice(good_images())[0]
    return extension, IMAGE_DAMAGE[rng.choice(list(IMAGE_DAMAGE))](rng)
