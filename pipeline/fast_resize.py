"""Resize to the shorter side and centre crop, four times as fast as Pillow and with its bytes.

Used where numba is installed, on machines whose rounding is known (x86-64), for the shapes whose columns Pillow makes
first in all its versions, and where it gives Pillow's own bytes for a few pictures that each process looks at once.
Elsewhere the answer is None, and Pillow resizes.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import platform
import threading
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# H W pixel rows and columns, C channels, X those and a byte that counts for nothing

log = logging.getLogger(__name__)
_CHECKED_SIZES = ((57, 45, 16), (40, 79, 16), (33, 20, 32), (300, 270, 24), (70, 131, 64))  # width, height, target
_lock = threading.Lock()
_agrees: bool | None = None  # None: not looked at yet


def scaled(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) with the shorter side made `size`."""
    ratio = size / min(width, height)
    return max(size, round(ratio * width)), max(size, round(ratio * height))


def suits(width: int, height: int, size: int) -> bool:
    """Whether `shorter_side_crop` may be used. Not where Pillow makes the columns first, which rounds in another way:
    13 where the height loses more than twice what the width does, 12 in images that are taller still."""
    new_width, new_height = scaled(width, height, size)
    if (new_width, new_height) == (width, height):
        return True
    rows_first = new_height < height and height - new_height > 2 * (width - new_width)
    return height <= 2 * width <= 20 * height and not rows_first and usable()


def shorter_side_crop(pixels_HWX: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """uint8 (size, size, 3): Pillow's resize to the shorter side with Lanczos, then its centre. `pixels_HWX` is
    C-contiguous, of a shape that suits; where nothing is resized, three channels will do."""
    height, width = pixels_HWX.shape[:2]
    new_width, new_height = scaled(width, height, size)
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    if (new_width, new_height) == (width, height):
        return np.ascontiguousarray(pixels_HWX[top : top + size, left : left + size, :3])
    return _resampled(pixels_HWX, (new_width, new_height), (left, top), size)


def _resampled(
    pixels_HWX: NDArray[np.uint8], new_size: tuple[int, int], corner: tuple[int, int], size: int
) -> NDArray[np.uint8]:
    from pipeline.resize_kernels import resample

    height, width = pixels_HWX.shape[:2]
    across, down = _weights(width, new_size[0], corner[0], size), _weights(height, new_size[1], corner[1], size)
    out_HWC = np.empty((size, size, 3), np.uint8)
    resample(pixels_HWX.view(np.uint32)[..., 0], *across, *down, out_HWC)
    return out_HWC


@lru_cache(maxsize=256)
def _weights(length: int, target: int, start: int, count: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    from pipeline.resize_kernels import weights

    first, taps = np.empty(count, np.int64), np.empty(count, np.int64)
    k = np.zeros((count, 2 * math.ceil(3 * max(1.0, length / target)) + 1), np.int32)
    weights(length, target, start, first, taps, k)
    return first, taps, k


def usable() -> bool:
    """Whether it can be had and gives Pillow's bytes here. The first call takes half a second, or seconds where nothing
    is compiled yet."""
    global _agrees
    if _agrees is None:
        with _lock:
            if _agrees is None:
                _agrees = _is_there() and _works()
    return _agrees


def _is_there() -> bool:
    """Elsewhere than on x86-64, compilers may join a product and a sum into one rounding."""
    return platform.machine() in ("x86_64", "AMD64") and importlib.util.find_spec("numba") is not None


def _works() -> bool:
    try:
        return _gives_pillows_bytes()
    except Exception as error:  # noqa: BLE001 - another numpy, no llvmlite, no compiling: whatever it is, Pillow does it
        log.warning("numba cannot be used here (%s: %s): Pillow resizes", type(error).__name__, error)
        return False


def _gives_pillows_bytes() -> bool:
    from pipeline.resize_kernels import HAS_OTHER_SINES

    random = np.random.default_rng(0)
    for width, height, size in _CHECKED_SIZES:
        pixels_HWX = random.integers(0, 256, (height, width, 4), dtype=np.uint8)
        image = Image.fromarray(pixels_HWX[..., :3]).resize(scaled(width, height, size), Image.Resampling.LANCZOS)
        corner = (round((image.width - size) / 2), round((image.height - size) / 2))
        wanted = np.asarray(image.crop((*corner, corner[0] + size, corner[1] + size)))
        if HAS_OTHER_SINES or not np.array_equal(_resampled(pixels_HWX, image.size, corner, size), wanted):
            log.warning("numba's pixels are not Pillow's here (%dx%d to %d): Pillow resizes", width, height, size)
            return False
    return True
