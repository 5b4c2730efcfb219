"""What is counted of a run, as pictures with an axis: a map of the grid, and shards against their limits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# H, W rows and columns of the token grid, or of a picture; S shards, the furthest from the others first
Pixels = NDArray[np.uint8]

WIDTH, HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 18, 62, 46  # margins of the plot
_PAPER, _INK, _PALE, _GRID = (255, 255, 255), (20, 20, 24), (110, 110, 120), (228, 228, 233)
_DOT, _ODD = (58, 110, 165), (200, 60, 50)
_LOW, _HIGH = np.array((246, 248, 251)), np.array((24, 72, 128))  # of the map's colours
_MAP_PX = 300


def draw_map(values_HW: NDArray[np.float64], *, title: str, note: str) -> Pixels:
    """(height, width, 3). A square for each place of the grid, the darker the higher; the scale is beside it."""
    image = Image.new("RGB", (WIDTH, HEIGHT), _PAPER)
    draw = ImageDraw.Draw(image)
    low, high = float(values_HW.min()), float(values_HW.max())
    shares_HW = (values_HW - low) / ((high - low) or 1.0)
    rows, columns = values_HW.shape
    side = max(1, _MAP_PX // max(rows, columns))
    picture = Image.fromarray(_colours(shares_HW)).resize((columns * side, rows * side), Image.Resampling.NEAREST)
    image.paste(picture, (_LEFT, _TOP))
    scale = Image.fromarray(_colours(np.linspace(1, 0, _MAP_PX)[:, None])).resize((18, _MAP_PX))
    x = _LEFT + columns * side + 30
    image.paste(scale, (x, _TOP))
    draw.text((x + 26, _TOP), f"{high:.3f}", fill=_PALE, font=_font(12))
    draw.text((x + 26, _TOP + _MAP_PX - 14), f"{low:.3f}", fill=_PALE, font=_font(12))
    _headings(draw, title, note)
    return np.asarray(image)


def draw_against_limits(
    values_S: NDArray[np.float64], limits_S: NDArray[np.float64], *, title: str, note: str, x_label: str, y_label: str
) -> Pixels:
    """(height, width, 3). A dot for each of S values, red above its limit, and a grey dash at each limit."""
    image = Image.new("RGB", (WIDTH, HEIGHT), _PAPER)
    draw, bottom, right = ImageDraw.Draw(image), HEIGHT - _BOTTOM, WIDTH - _RIGHT
    furthest = float(values_S.max(initial=1e-9))
    highest = max(furthest, float(np.minimum(limits_S, 2 * furthest).max(initial=0.0)))  # a limit may be far above
    _levels(draw, highest)
    for number, (value, limit) in enumerate(zip(values_S, limits_S, strict=True)):
        x = _LEFT + (number + 0.5) / len(values_S) * (right - _LEFT)
        y, y_limit = (bottom - min(1.0, one / highest) * (bottom - _TOP) for one in (value, limit))
        draw.line((x - 2, y_limit, x + 2, y_limit), fill=_PALE)
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=_ODD if value > limit else _DOT)
    draw.text(((_LEFT + right) / 2, bottom + 22), x_label, fill=_PALE, font=_font(12), anchor="ma")
    draw.text((4, _TOP - 6), y_label, fill=_PALE, font=_font(12), anchor="ls")
    _headings(draw, title, note)
    return np.asarray(image)


def _levels(draw: ImageDraw.ImageDraw, highest: float) -> None:
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = HEIGHT - _BOTTOM - share * (HEIGHT - _BOTTOM - _TOP)
        draw.line((_LEFT, y, WIDTH - _RIGHT, y), fill=_GRID)
        draw.text((_LEFT - 8, y), f"{share * highest:.3g}", fill=_PALE, font=_font(12), anchor="rm")


def _headings(draw: ImageDraw.ImageDraw, title: str, note: str) -> None:
    draw.text((_LEFT, 10), title, fill=_INK, font=_font(16))
    draw.text((_LEFT, 34), note, fill=_PALE, font=_font(13))


def _colours(shares_HW: NDArray[np.float64]) -> Pixels:
    return np.asarray(_LOW + shares_HW[..., None] * (_HIGH - _LOW), np.uint8)


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
