"""Pictures out of arrays (tiles, labelled grids) for people to look at; decoding is images.py's."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# H, W picture rows and columns, C = 3 colours; every array is uint8 RGB
Box = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom lie outside
Pixels = NDArray[np.uint8]

_GAP, _PADDING, _LINE = 2, 14, 17  # pixels between pictures, around groups, and per line of text
_PAPER, _INK, _PALE, _EMPTY = (255, 255, 255), (20, 20, 24), (110, 110, 120), (225, 225, 230)


@dataclass(frozen=True)
class Group:
    """Pictures that belong together, side by side, with lines of text below. None: there is no picture."""

    pictures: tuple[Pixels | None, ...]
    lines: tuple[str, ...]


def read_picture(path: Path) -> Pixels:
    """The RGB pixels (H, W, 3) of an image file that is known to be good."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def crop_to_square(pixels_HWC: Pixels, box: Box, size: int) -> Pixels:
    """The square region `box` of a picture, brought to `size` x `size` with Lanczos."""
    region = Image.fromarray(pixels_HWC).crop(box)
    if region.size == (size, size):
        return np.asarray(region)
    return np.asarray(region.resize((size, size), Image.Resampling.LANCZOS))


def encode_jpeg(pixels_HWC: Pixels, colours: Literal["RGB", "CMYK"] = "RGB") -> bytes:
    """Quality 95 without chroma subsampling: what a careful person would keep."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).convert(colours).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def encode_png(pixels_HWC: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG")
    return buffer.getvalue()


def decode_png(data: bytes) -> Pixels:
    """Of one that was made here."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def draw_groups(
    groups: Sequence[Group], *, title: str, headings: Sequence[str], groups_per_row: int, picture_px: int
) -> Pixels:
    """A sheet of groups, row by row, each picture enlarged or reduced to about `picture_px`.

    `headings` name the pictures of a group, once above each column of groups.
    """
    num_pictures, num_lines = len(headings), max(len(group.lines) for group in groups)
    group_width = num_pictures * picture_px + (num_pictures - 1) * _GAP
    step_x, step_y = group_width + _PADDING, picture_px + num_lines * _LINE + _PADDING
    columns, rows = min(groups_per_row, len(groups)), math.ceil(len(groups) / groups_per_row)
    top = _PADDING + 2 * _LINE + 6
    sheet = Image.new("RGB", (columns * step_x + _PADDING, top + rows * step_y), _PAPER)
    _draw_headings(ImageDraw.Draw(sheet), title, headings, [_PADDING + c * step_x for c in range(columns)], picture_px)
    for n, group in enumerate(groups):
        row, column = divmod(n, groups_per_row)
        _draw_group(sheet, group, _PADDING + column * step_x, top + row * step_y, picture_px)
    return np.asarray(sheet)


def _draw_headings(
    draw: ImageDraw.ImageDraw, title: str, headings: Sequence[str], lefts: Sequence[int], picture_px: int
) -> None:
    draw.text((_PADDING, _PADDING - 4), title, fill=_INK, font=_font(15))
    for left in lefts:
        for n, heading in enumerate(headings):
            x = left + n * (picture_px + _GAP)
            draw.text((x, _PADDING + _LINE + 4), heading, fill=_PALE, font=_font(12))


def _draw_group(sheet: Image.Image, group: Group, left: int, top: int, picture_px: int) -> None:
    draw = ImageDraw.Draw(sheet)
    for n, pixels_HWC in enumerate(group.pictures):
        x = left + n * (picture_px + _GAP)
        if pixels_HWC is None:
            draw.rectangle((x, top, x + picture_px - 1, top + picture_px - 1), fill=_EMPTY)
            draw.text((x + 8, top + picture_px // 2 - 8), "not reachable", fill=_PALE, font=_font(12))
        else:
            sheet.paste(_to_size(pixels_HWC, picture_px), (x, top))
    width = len(group.pictures) * (picture_px + _GAP) - _GAP
    for n, line in enumerate(group.lines):
        text = _fitted(draw, line, width)
        draw.text((left, top + picture_px + 2 + n * _LINE), text, fill=_PALE if n else _INK, font=_font(12))


def _to_size(pixels_HWC: Pixels, size: int) -> Image.Image:
    """Whole pixels where it can be (so that nothing looks smoother than it is), else Lanczos."""
    image = Image.fromarray(pixels_HWC)
    whole = size % max(image.size) == 0 and image.width == image.height
    return image.resize((size, size), Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


def _fitted(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    text = " ".join(text.split())[:400]
    if draw.textlength(text, font=_font(12)) <= width:
        return text
    while text and draw.textlength(text + "…", font=_font(12)) > width:
        text = text[:-1]
    return text + "…"


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def shrunk_to(pixels_HWC: Pixels, side: int) -> Pixels:
    """A picture neither wider nor higher than `side`; as it is where it is small enough."""
    image = Image.fromarray(pixels_HWC)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)


def draw_pair(left_HWC: Pixels, right_HWC: Pixels) -> Pixels:
    """Two pictures of one size side by side, a thin gap between them."""
    gap = np.full((left_HWC.shape[0], _GAP, 3), 255, np.uint8)
    return np.concatenate([left_HWC, gap, right_HWC], axis=1)
