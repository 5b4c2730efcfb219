"""Image bytes -> RGB uint8 pixels, by a stated policy. Owns Pillow (pictures.py draws with it).

The policy, part of the image spec's version:
the formats are those of FORMATS, told by content and not by name · EXIF orientation is applied · animations
give their first frame · alpha (also palettes with a transparent colour) is laid over white · CMYK, YCbCr, LAB,
palette, grey and 1-bit are converted by Pillow without colour profiles · 16-bit grey is scaled to 8 bits with
rounding, 16-bit colour keeps its upper 8 bits · 32-bit integer and float images are refused · an image of more than
MAX_PIXELS is refused before it is decoded, or enlarged · a truncated image is refused, never filled up, where that can
be told: even a JPEG whose end marker was put back (jpeg.py) and a PNG whose packed rows end too early (png.py) · a PNG
whose pixels don't match their checksum is refused · a shorter side under the target is refused or enlarged, as the
spec says, which may also let libjpeg shrink large JPEGs.

What cannot be told: compressed bytes that were damaged and still decode (a flipped bit in a JPEG; a tail of zeros in
AVIF, WebP or deflated TIFF), a part missing within a scan of a progressive JPEG, restart intervals taken out of one.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipeline import fast_resize, jpeg, png, turbo_jpeg
from pipeline.image_spec import ImageSpec as ImageSpec
from pipeline.image_spec import Shrink
from pipeline.memory_budget import MemoryBudget
from pipeline.pillow_ways import DAMAGED, ON_ITS_SIDE, orientation_of, turned, upright
from pipeline.records import FailureReason

# H W pixel rows and columns, C channels

MAX_PIXELS = 178_956_970  # Pillow's own limit for refusing a decompression bomb
STRIP_PIXELS = 1 << 20
DECODING = MemoryBudget(1 << 30)  # of all threads of the process together; the largest image of all takes it alone
# Pillow's four bytes a pixel, and once more upright or as RGB (8; progressive JPEGs hold their coefficients, 12);
# WebP's and AVIF's libraries hold copies of their own.
_BYTES_PER_PIXEL = {"WEBP": 17, "AVIF": 14}

# Not all that Pillow knows: some of its readers run programs (EPS), take almost any bytes for an image (TGA), or fill
# up what is missing (JPEG 2000).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF")

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS decides
# A damaged tag beside good pixels counts for nothing; Python would keep each new text of it for ever.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

Augment = Literal["none", "flip", "dalle"]


class SampleError(Exception):
    """These bytes give no pixels; becomes a SampleFailure."""

    def __init__(self, reason: FailureReason, message: str) -> None:
        super().__init__(reason, message)
        self.reason, self.message = reason, message


@dataclass(frozen=True)
class DecodedImage:
    """pixels_HWC uint8 (size, size, 3); width and height of the original, as it is meant to be seen."""

    pixels_HWC: NDArray[np.uint8]
    width: int
    height: int


def decode_image(data: bytes, spec: ImageSpec) -> DecodedImage:
    """Pixels as the tokenizer wants them. Raises SampleError with its reason."""
    return _decoded_fast(data, spec) or _decoded_by_pillow(data, spec)


def _decoded_fast(data: bytes, spec: ImageSpec) -> DecodedImage | None:
    """The same as by Pillow in a third of the time, where that is sure; None elsewhere, and of all that is bad."""
    header = jpeg.plain_header(data) if spec.resample == "lanczos" and data.startswith(jpeg.START) else None
    orientation = None if header is None else _hidden_orientation(data) if header.has_more else 1
    if header is None or orientation is None or header.width * header.height > MAX_PIXELS:
        return None
    width, height = (header.height, header.width) if orientation in ON_ITS_SIDE else (header.width, header.height)
    is_small = min(width, height) < spec.size
    is_shrunk = spec.shrink == "dct" and min(width, height) >= 2 * spec.size
    if (is_small and spec.small == "refuse") or is_shrunk or not fast_resize.suits(width, height, spec.size):
        return None
    with DECODING.hold(_claim(width, height, 12 if header.is_progressive else 8, spec) + len(data)):
        is_cropped_only = orientation == 1 and min(width, height) == spec.size
        pixels_HWX = turbo_jpeg.pixels(data, header.width, header.height, 3 if is_cropped_only else 4)
        if pixels_HWX is None:
            return None
        pixels_HWC = fast_resize.shorter_side_crop(turned(pixels_HWX, orientation), spec.size)
    return DecodedImage(pixels_HWC, width, height)


def _hidden_orientation(data: bytes) -> int | None:
    """What Pillow reads in a JPEG's metadata; None where they say that it is no usual one, or cannot be read."""
    try:
        image: Any = Image.open(io.BytesIO(data), formats=("JPEG",))
    except Exception:  # noqa: BLE001 - whatever it is, it is raised again where Pillow decodes
        return None
    is_usual = image.format == "JPEG" and (image.mode == "L" or image.info.get("adobe_transform", 1) == 1)
    return orientation_of(image) if is_usual else None


def _decoded_by_pillow(data: bytes, spec: ImageSpec) -> DecodedImage:
    with _open_rgb(data, spec, spec.shrink) as (image, (width, height)):
        return DecodedImage(_resized_crop(_enough(image, spec), spec), width, height)


def _resized_crop(image: Image.Image, spec: ImageSpec) -> NDArray[np.uint8]:
    """uint8 (size, size, 3): the shorter side resized to `size`, and the centre."""
    new_size = fast_resize.scaled(*image.size, spec.size)
    if new_size != image.size and spec.resample == "lanczos" and fast_resize.suits(*image.size, spec.size):
        return fast_resize.shorter_side_crop(_four_bytes(image), spec.size)
    _refuse_bomb(*new_size)  # a thin line may be enlarged into one
    resized = image if new_size == image.size else image.resize(new_size, Image.Resampling[spec.resample.upper()])
    left, top = (round((side - spec.size) / 2) for side in new_size)
    return _crop(resized, left, top, spec.size)


def training_crop(data: bytes, spec: ImageSpec, augment: Augment, rng: np.random.Generator) -> NDArray[np.uint8]:
    """One training view, uint8 (size, size, 3). `dalle`: DALL-E's paper, appendix A.1 (random square, area
    filter, random crop, flip), lengths scaled by size/256. `flip`: the evaluation crop, mirrored half the time.
    Raises SampleError."""
    if augment == "dalle":
        with open_rgb(data, spec) as image:
            pixels_HWC = _dalle_crop(_enough(image, spec), spec.size, rng)
    else:
        pixels_HWC = decode_image(data, spec).pixels_HWC
    if augment != "none" and rng.integers(2):
        pixels_HWC = np.ascontiguousarray(pixels_HWC[:, ::-1])
    return pixels_HWC


def _dalle_crop(image: Image.Image, size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    side = min(image.size)
    left, top = (int(rng.integers(0, length - side + 1)) for length in image.size)
    low, high = (max(size, min(side, round(bound * size / 256))) for bound in (288, 384))
    target = int(rng.integers(low, high + 1))
    square = image.resize((target, target), Image.Resampling.BOX, box=(left, top, left + side, top + side))
    left, top = (int(rng.integers(0, target - size + 1)) for _ in range(2))
    return _crop(square, left, top, size)


@contextmanager
def open_rgb(data: bytes, spec: ImageSpec) -> Iterator[Image.Image]:
    """The first frame, upright, as RGB over white, of its own size whatever the spec says. Waits for its share of
    DECODING, and holds it for the block: few images are huge, and those go one at a time. Raises SampleError."""
    with _open_rgb(data, spec, "none") as (image, _):
        yield image


@contextmanager
def _open_rgb(data: bytes, spec: ImageSpec, shrink: Shrink) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
    """The same, perhaps shrunk, with the width and height that it had before."""
    image = _opened(data)
    before, claim, size = image.size, _bytes_to_decode(image, spec), None
    _refuse_bomb(*before)
    if shrink == "dct" and image.draft(None, (spec.size, spec.size)):  # None: it is no JPEG
        size = before[::-1] if orientation_of(image) in ON_ITS_SIDE else before
        if not image.info.get("progressive"):  # of such a one all coefficients are held as ever
            claim = _bytes_to_decode(image, spec)
    with DECODING.hold(claim + 2 * len(data)):
        image = _decoded(image, data)
        yield image, size or image.size


def _bytes_to_decode(image: Image.Image, spec: ImageSpec) -> int:
    """The most that its pixels take at one time, known from its header; tests/test_image_memory.py measures it."""
    each = _BYTES_PER_PIXEL.get(image.format or "", 12 if image.info.get("progressive") else 8)
    return _claim(*image.size, each, spec)


def _claim(width: int, height: int, each: int, spec: ImageSpec) -> int:
    """In bytes, `each` a pixel and what enlarging takes."""
    enlarged = max(1.0, spec.size / min(width, height)) ** 2 if spec.small == "upscale" else 1.0
    return round(width * height * (each + (4 * enlarged if enlarged > 1 else 0)))


def _decoded(image: Image.Image, data: bytes) -> Image.Image:
    try:
        image.load()
        if data.startswith(png.START) and _may_lack_rows(image):
            png.check_rows(data)
        return _to_rgb(upright(image))
    except DAMAGED as error:
        raise _undecodable(error) from error


def _may_lack_rows(image: Image.Image) -> bool:
    """Pillow leaves at 0 what a PNG does not bring: where the last row is anything else, all are there."""
    last = image.crop((0, image.height - 1, image.width, image.height))
    return bool(image.info.get("interlace")) or not np.asarray(last).any()


def _opened(data: bytes) -> Image.Image:
    """The image by its header, pixels not yet decoded. Raises SampleError."""
    try:
        return Image.open(io.BytesIO(_checked(data)), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise SampleError(FailureReason.NOT_AN_IMAGE, "no image format that is known") from error
    except DAMAGED as error:
        raise _undecodable(error) from error


def _checked(data: bytes) -> bytes:
    """The bytes to decode. Raises one of DAMAGED where Pillow would fill up what is missing, or not look."""
    if data.startswith(png.START):
        png.check_pixels(data)
    return jpeg.with_open_end(data) if data.startswith(jpeg.START) else data


def _refuse_bomb(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise SampleError(FailureReason.TOO_MANY_PIXELS, f"{width}x{height} is more than {MAX_PIXELS} pixels")


def _undecodable(error: Exception) -> SampleError:
    if isinstance(error, Image.DecompressionBombError):  # by the header, or by a size that comes later
        return SampleError(FailureReason.TOO_MANY_PIXELS, f"more than {MAX_PIXELS} pixels")
    message = f"{type(error).__name__}: {error}"
    cut = "truncated" in message.lower() or isinstance(error, EOFError)
    return SampleError(FailureReason.TRUNCATED_IMAGE if cut else FailureReason.UNDECODABLE, message)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return _by_strips(image, lambda strip: Image.fromarray(_eight_bits(np.asarray(strip))).convert("RGB"))
    if image.mode in ("I", "F"):
        raise SampleError(FailureReason.UNSUPPORTED_MODE, f"Pillow mode {image.mode}: no agreed range")
    if image.has_transparency_data:
        return _by_strips(image, _over_white)
    return image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _by_strips(image: Image.Image, to_rgb: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """`to_rgb` of an image, some rows at a time: it looks at one pixel at a time, and its copies stay small."""
    rgb = Image.new("RGB", image.size)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        rgb.paste(to_rgb(image.crop((0, top, image.width, min(top + rows, image.height)))), (0, top))
    return rgb


def _eight_bits(values_HW: NDArray[Any]) -> NDArray[np.uint8]:
    return ((values_HW.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _enough(image: Image.Image, spec: ImageSpec) -> Image.Image:
    if min(image.size) < spec.size and spec.small == "refuse":
        message = f"{image.width}x{image.height}: the shorter side is under {spec.size}"
        raise SampleError(FailureReason.TOO_SMALL, message)
    return image


def _four_bytes(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 (height, width, 4), the fourth of each counts for nothing."""
    pixels_HWX = np.empty((image.height, image.width, 4), np.uint8)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image if rows >= image.height else image.crop((0, top, image.width, min(top + rows, image.height)))
        values = np.frombuffer(strip.tobytes("raw", "RGBX"), np.uint8)
        pixels_HWX[top : top + rows] = values.reshape(strip.height, image.width, 4)
    return pixels_HWX


def _crop(image: Image.Image, left: int, top: int, size: int) -> NDArray[np.uint8]:
    return cast(NDArray[np.uint8], np.asarray(image.crop((left, top, left + size, top + size))))
