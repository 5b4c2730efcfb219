"""What Pillow leaves to those who use it: which of its errors speak of a damaged file, which way up an image is."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# H W pixel rows and columns, X three channels and a byte that counts for nothing

# What a damaged file can make Pillow raise beside OSError: its plugins parse hostile bytes in Python. MemoryError is
# not among them: it says more of the process than of the image, and the engine tries the shard again elsewhere.
DAMAGED = (
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
_TURN: dict[int, Callable[[NDArray[np.uint32]], NDArray[np.uint32]]] = {  # the same of pixels_HW
    2: lambda pixels_HW: pixels_HW[:, ::-1],
    3: lambda pixels_HW: pixels_HW[::-1, ::-1],
    4: lambda pixels_HW: pixels_HW[::-1],
    5: lambda pixels_HW: pixels_HW.T,
    6: lambda pixels_HW: pixels_HW[::-1].T,
    7: lambda pixels_HW: pixels_HW[::-1, ::-1].T,
    8: lambda pixels_HW: pixels_HW[:, ::-1].T,
}
ON_ITS_SIDE = (5, 6, 7, 8)


def orientation_of(image: Image.Image) -> int:
    """1 to 8, as its EXIF says; 1 where that is missing, damaged or something else."""
    if image.format == "JPEG" and not image.info.keys() & {"exif", "xmp"}:
        return 1
    try:
        found = image.getexif().get(_ORIENTATION_TAG)
    except DAMAGED:
        return 1
    return found if isinstance(found, int) and found in _TRANSPOSE else 1


def upright(image: Image.Image) -> Image.Image:
    method = _TRANSPOSE.get(orientation_of(image))
    return image if method is None else image.transpose(method)


def turned(pixels_HWX: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """The same of pixels of four bytes."""
    if orientation == 1:
        return pixels_HWX
    turned_HW = np.ascontiguousarray(_TURN[orientation](pixels_HWX.view(np.uint32)[..., 0]))
    return turned_HW[..., None].view(np.uint8)
