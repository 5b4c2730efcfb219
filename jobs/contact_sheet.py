"""Contact sheets: images side by side with what the model makes of them, and how close it comes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.pictures import Group, Pixels, draw_groups, encode_png

# B images, H W pixel rows and columns, C colours

SMALLEST_PX, LARGEST_PX = 128, 256  # how large a picture is shown
SHEET_WIDTH_PX = 1150  # about as wide as a page shows without shrinking it


def contact_sheet_png(
    columns: Mapping[str, Sequence[Pixels | None] | Pixels],
    labels: Sequence[str],
    *,
    title: str,
    notes: Sequence[str] | None = None,
) -> bytes:
    """A PNG with one group of pictures per label: the nth picture of each column, `{"original": ...}` first.

    Each column holds as many uint8 pictures (H, W, 3) as there are labels; None marks one that could not be
    had. Below each group stand its label, the PSNR of its last picture against its first, and its note.
    """
    if not labels:
        raise ValueError("a contact sheet needs at least one picture")
    pictures = zip(*columns.values(), strict=True)
    groups = [_group(*one) for one in zip(pictures, labels, notes or [""] * len(labels), strict=True)]
    picture_px = _picture_px(groups)
    per_row = max(1, SHEET_WIDTH_PX // (picture_px * len(columns)))
    headings = list(columns)
    sheet = draw_groups(groups, title=title, headings=headings, groups_per_row=per_row, picture_px=picture_px)
    return encode_png(sheet)


def _group(pictures: tuple[Pixels | None, ...], label: str, note: str) -> Group:
    return Group(pictures, (label, "  ".join(filter(None, (_closeness(pictures[0], pictures[-1]), note)))))


def _picture_px(groups: Sequence[Group]) -> int:
    sides = [int(one.shape[0]) for group in groups for one in group.pictures if one is not None]
    return min(max([*sides[:1], SMALLEST_PX]), LARGEST_PX)


def psnr_db(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of uint8 pictures in decibels: 10 log10(255² / mean squared error)."""
    mean_square = float(np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2))
    return math.inf if mean_square == 0 else 10 * math.log10(255**2 / mean_square)


def _closeness(original: Pixels | None, made: Pixels | None) -> str:
    return "" if original is None or made is None else f"{psnr_db(original, made):.1f} dB"
