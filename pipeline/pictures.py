"""Pictures out of arrays (tiles, labelled grids) for people to look at; decoding is images.py's."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

# H, W picture rows and columns, C = 3 colours; every array is uint8 RGB
Box = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom lie outside


def read_picture(path: Path) -> np.ndarray:
    """The RGB pixels (H, W, 3) of an image file that is known to be good."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def crop_to_square(pixels_HWC: np.ndarray, box: Box, size: int) -> np.ndarray:
    """The square region `box` of a picture, brought to `size` x `size` with Lanczos."""
    region = Image.fromarray(pixels_HWC).crop(box)
    if region.size == (size, size):
        return np.asarray(region)
    return np.asarray(region.resize((size, size), Image.Resampling.LANCZOS))


def encode_jpeg(pixels_HWC: np.ndarray, colours: Literal["RGB", "CMYK"] = "RGB") -> bytes:
    """Quality 95 without chroma subsampling: what a careful person would keep."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).convert(colours).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def encode_png(pixels_HWC: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
