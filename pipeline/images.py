"""Image bytes -> RGB uint8 pixels, by a stated policy. Owns Pillow (pictures.py draws with it).

The policy, part of the image spec's version:
the formats are those of FORMATS, told by content and not by name · EXIF orientation is applied · animations
give their first frame · alpha (also palettes with a transparent colour) is laid over white · CMYK, YCbCr, LAB,
palette, grey and 1-bit are converted by Pillow without colour profiles · 16-bit grey is scaled to 8 bits with
rounding, 16-bit colour keeps its upper 8 bits · 32-bit integer and float images are refused · an image of more than
MAX_PIXELS is refused before it is decoded, or enlarged · a truncated image is refused, never filled up, where that can
be told: even a JPEG whose end marker was put back (jpeg.py) and a PNG whose packed rows end too early (png.py) · a PNG
whose pixels don't match their checksum is refused · a shorter side under the target is refused or enlarged, as the
spec says.

What cannot be told: compressed bytes that were damaged and still decode (a flipped bit in a JPEG; a tail of zeros in
AVIF, WebP or deflated TIFF), a part missing within a scan of a progressive JPEG, restart intervals taken out of one.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipeline import jpeg, png
from pipeline.memory_budget import MemoryBudget
from pipeline.records import FailureReason

# H W pixel rows and columns, C channels

IMAGE_SPEC_VERSION = 1
MAX_PIXELS = 178_956_970  # Pillow's own limit for refusing a decompression bomb
STRIP_PIXELS = 1 << 20
DECODING = MemoryBudget(1 << 30)  # of all threads of the process together; the largest image of all takes it alone
# Pillow's four bytes a pixel, and once more upright or as RGB (8; progressive JPEGs hold their coefficients, 12);
# WebP's and AVIF's libraries hold copies of their own.
_BYTES_PER_PIXEL = {"WEBP": 17, "AVIF": 14}

# Not all that Pillow knows: some of its readers run programs (EPS), take almost any bytes for an image (TGA), or fill
# up what is missing (JPEG 2000).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF")

# What a damaged file can make Pillow raise beside OSError: its plugins parse hostile bytes in Python. MemoryError is
# not among them: it says more of the process than of the image, and the engine tries the shard again elsewhere.
_DAMAGED = (
    AssertionError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    AttributeError,
    RuntimeError,
    NotImplementedError,
    ZeroDivisionError,
    struct.error,
    zlib.error,
)
_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS decides
# A damaged tag beside good pixels counts for nothing; Python would keep each new text of it for ever.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

Augment = Literal["none", "flip", "dalle"]
Resample = Literal["lanczos", "bicubic", "box"]
Small = Literal["refuse", "upscale"]


class SampleError(Exception):
    """These bytes give no pixels; becomes a SampleFailure."""

    def __init__(self, reason: FailureReason, message: str) -> None:
        super().__init__(reason, message)
        self.reason, self.message = reason, message


@dataclass(frozen=True)
class ImageSpec:
    """What becomes of an image before the encoder sees it. The default is DALL-E's: shorter side to `size`
    with Lanczos, centre crop (github.com/openai/DALL-E, notebooks/usage.ipynb)."""

    size: int = 256
    resample: Resample = "lanczos"
    small: Small = "refuse"
    version: int = IMAGE_SPEC_VERSION

    def __post_init__(self) -> None:
        if not 8 <= self.size <= 4096:
            raise ValueError(f"size {self.size} is not between 8 and 4096")
        if self.resample not in get_args(Resample) or self.small not in get_args(Small):
            raise ValueError(f"resample {self.resample!r} or small {self.small!r} is unknown here")
        if self.version != IMAGE_SPEC_VERSION:
            raise ValueError(f"version {self.version} is unknown here: this is {IMAGE_SPEC_VERSION}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ImageSpec:
        """Raises ValueError on an unknown or missing field, for then the pixels would be others."""
        wanted = {field.name for field in fields(cls)}
        if set(value) != wanted:
            raise ValueError(f"no image spec that this version knows: it has {sorted(value)}, not {sorted(wanted)}")
        try:
            return cls(**value)
        except TypeError as error:
            raise ValueError(f"an image spec has a field of another type: {error}") from error


@dataclass(frozen=True)
class DecodedImage:
    """pixels_HWC uint8 (size, size, 3); width and height of the original, as it is meant to be seen."""

    pixels_HWC: NDArray[np.uint8]
    width: int
    height: int


def decode_image(data: bytes, spec: ImageSpec) -> DecodedImage:
    """Pixels as the tokenizer wants them. Raises SampleError with its reason."""
    with open_rgb(data, spec) as image:
        resized = _resize_shorter_side(_enough(image, spec), spec.size, _filter(spec))
        left, top = (round((side - spec.size) / 2) for side in resized.size)
        return DecodedImage(_crop(resized, left, top, spec.size), image.width, image.height)


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
    """The first frame, upright, as RGB over white. Waits for its share of DECODING, and holds it for the block: few
    images are huge, and those go one at a time. Raises SampleError."""
    image = _opened(data)
    _refuse_bomb(image.width, image.height)
    with DECODING.hold(_bytes_to_decode(image, spec) + 2 * len(data)):
        yield _decoded(image, data)


def _bytes_to_decode(image: Image.Image, spec: ImageSpec) -> int:
    """The most that its pixels take at one time, known from its header; tests/test_image_memory.py measures it."""
    enlarged = max(1.0, spec.size / min(image.size)) ** 2 if spec.small == "upscale" else 1.0
    each = _BYTES_PER_PIXEL.get(image.format or "", 12 if image.info.get("progressive") else 8)
    return round(image.width * image.height * (each + (4 * enlarged if enlarged > 1 else 0)))


def _decoded(image: Image.Image, data: bytes) -> Image.Image:
    try:
        image.load()
        if data.startswith(png.START) and _may_lack_rows(image):
            png.check_rows(data)
        return _to_rgb(_upright(image))
    except _DAMAGED as error:
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
    except _DAMAGED as error:
        raise _undecodable(error) from error


def _checked(data: bytes) -> bytes:
    """The bytes to decode. Raises one of _DAMAGED where Pillow would fill up what is missing, or not look."""
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


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DAMAGED:  # damaged EXIF beside good pixels: as if there were none
        orientation = 1
    method = _TRANSPOSE.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


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


def _filter(spec: ImageSpec) -> Image.Resampling:
    return Image.Resampling[spec.resample.upper()]


def _resize_shorter_side(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    ratio = size / min(image.size)
    width, height = (max(size, round(ratio * side)) for side in image.size)
    _refuse_bomb(width, height)  # a thin line may be enlarged into one
    return image if (width, height) == image.size else image.resize((width, height), resample)


def _crop(image: Image.Image, left: int, top: int, size: int) -> NDArray[np.uint8]:
    return cast(NDArray[np.uint8], np.asarray(image.crop((left, top, left + size, top + size))))
