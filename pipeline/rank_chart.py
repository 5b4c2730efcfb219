"""How often each of many things occurs, most frequent first, as a picture with a logarithmic axis."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# K things that are counted, H W picture rows and columns, C = 3 colours

WIDTH, HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 18, 62, 46  # margins of the plot
_PAPER, _INK, _PALE, _GRID = (255, 255, 255), (20, 20, 24), (110, 110, 120), (228, 228, 233)
_BAR, _NONE, _EVEN = (58, 110, 165), (250, 226, 222), (200, 90, 60)
_FLOOR = 0.7  # where the axis begins: a count of one still shows


def draw_ranked(counts_K: NDArray[Any], *, title: str, note: str, x_label: str, y_label: str) -> NDArray[np.uint8]:
    """(H, W, 3). Pale red where things never occur; a line marks what each would have if all occurred alike."""
    sorted_K = np.sort(np.asarray(counts_K, dtype=np.float64))[::-1]
    image = Image.new("RGB", (WIDTH, HEIGHT), _PAPER)
    draw, plot = ImageDraw.Draw(image), _Plot(len(sorted_K), max(float(sorted_K[0]), 10.0))
    num_used = int((sorted_K > 0).sum())
    if num_used < len(sorted_K):
        draw.rectangle((plot.x(num_used), _TOP, plot.x(len(sorted_K)), HEIGHT - _BOTTOM), fill=_NONE)
    _axes(draw, plot, x_label, y_label)
    _bars(draw, plot, sorted_K)
    _even_share(draw, plot, float(sorted_K.mean()))
    draw.text((_LEFT, 10), title, fill=_INK, font=_font(16))
    draw.text((_LEFT, 34), note, fill=_PALE, font=_font(13))
    return np.asarray(image)


class _Plot:
    """Ranks and counts -> pixels."""

    def __init__(self, num: int, highest: float) -> None:
        self.num, self.highest = num, highest
        self._low, self._high = math.log10(_FLOOR), math.log10(highest) + 0.05

    def x(self, rank: float) -> float:
        return _LEFT + rank / self.num * (WIDTH - _LEFT - _RIGHT)

    def y(self, count: float) -> float:
        share = (math.log10(max(count, _FLOOR)) - self._low) / (self._high - self._low)
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)


def _bars(draw: ImageDraw.ImageDraw, plot: _Plot, sorted_K: NDArray[np.float64]) -> None:
    """One for each pixel column where there are more things than columns, the highest of its things."""
    edges = np.unique(np.linspace(0, plot.num, min(plot.num, WIDTH - _LEFT - _RIGHT) + 1).astype(int))
    for first, last in pairwise(edges):
        if sorted_K[first] > 0:
            right = max(plot.x(first) + 1, plot.x(last) - (1 if plot.num < 200 else 0))
            draw.rectangle((plot.x(first), plot.y(sorted_K[first]), right, HEIGHT - _BOTTOM), fill=_BAR)


def _axes(draw: ImageDraw.ImageDraw, plot: _Plot, x_label: str, y_label: str) -> None:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    for power in range(math.floor(math.log10(plot.highest)) + 1):
        y = plot.y(10**power)
        draw.line((_LEFT, y, right, y), fill=_GRID)
        draw.text((_LEFT - 8, y), f"{10**power:,}", fill=_PALE, font=_font(12), anchor="rm")
    draw.line((_LEFT, bottom, right, bottom), fill=_PALE)
    for rank in sorted({round(plot.num * quarter / 4) for quarter in range(5)}):
        draw.text((plot.x(rank), bottom + 5), f"{rank:,}", fill=_PALE, font=_font(12), anchor="ma")
    draw.text(((_LEFT + right) / 2, bottom + 22), x_label, fill=_PALE, font=_font(12), anchor="ma")
    draw.text((4, _TOP - 6), y_label, fill=_PALE, font=_font(12), anchor="ls")


def _even_share(draw: ImageDraw.ImageDraw, plot: _Plot, even: float) -> None:
    y, right = plot.y(even), WIDTH - _RIGHT
    for x in range(_LEFT, right, 8):
        draw.line((x, y, x + 3, y), fill=_EVEN)
    draw.text((right - 4, y - 4), f"all alike: {even:,.4g} each", fill=_EVEN, font=_font(12), anchor="rs")


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
