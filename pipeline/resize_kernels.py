"""Pillow's antialiased Lanczos of 8-bit pixels, compiled by numba: the same integers, so the same bytes. fast_resize.py
says when. Importing this takes half a second, and seconds where nothing is compiled yet.

As Pillow does (github.com/python-pillow/Pillow, src/libImaging/Resample.c): weights in double precision, rounded to 22
bits behind the point; rows first, rounded to 8 bits, then columns. Sums of integers do not depend on their order, so
here many lanes are summed at a time, and only what the crop keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import config, njit
from numpy.typing import NDArray

F = TypeVar("F", bound=Callable[..., Any])

ROWS = 32  # at a time: their turned pixels stay in the nearest caches
LANES = 4 * ROWS  # four bytes a pixel
_BITS = 22
_HALF = 1 << (_BITS - 1)
HAS_OTHER_SINES = bool(config.USING_SVML)  # Intel's, where its library is installed: of another rounding


def _compiled(function: F) -> F:
    try:
        return njit(nogil=True, cache=True)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # there is no folder to keep it in
        return njit(nogil=True)(function)  # type: ignore[no-any-return]


@_compiled
def _lanczos(x: float) -> float:
    return _sinc(x) * _sinc(x / 3) if -3.0 <= x < 3.0 else 0.0


@_compiled
def _sinc(x: float) -> float:
    if x == 0.0:
        return 1.0
    x = x * math.pi
    return math.sin(x) / x


@_compiled
def weights(length: int, target: int, start: int, first: NDArray[Any], taps: NDArray[Any], k: NDArray[Any]) -> None:
    """Of the outputs `start` on, of `target` in all, made from `length`: where each begins, how many it takes, and its
    weights. The operations and their order are Pillow's, for another order rounds in another way."""
    scale = length / target
    wide = scale if scale > 1.0 else 1.0
    support, narrow = 3.0 * wide, 1.0 / wide
    for n in range(len(first)):
        center = (start + n + 0.5) * scale
        low = max(0, int(center - support + 0.5))
        high = min(length, int(center + support + 0.5))
        first[n], taps[n] = low, high - low
        raw, total = np.empty(high - low), 0.0
        for t in range(high - low):
            raw[t] = _lanczos((t + low - center + 0.5) * narrow)
            total += raw[t]
        for t in range(high - low):
            share = raw[t] / total if total != 0.0 else raw[t]
            k[n, t] = int(-0.5 + share * (1 << _BITS)) if share < 0 else int(0.5 + share * (1 << _BITS))


@_compiled
def _sum(data: NDArray[np.uint8], at: int, lanes: int, k: NDArray[Any], taps: int, sums: NDArray[np.int32]) -> None:
    """Each of `lanes` sums of `taps` bytes that lie `lanes` apart, from `at` on, times their weights, and a half."""
    for j in range(lanes):
        sums[j] = _HALF
    done = 0
    while done + 4 <= taps:  # four at a time: the sums are loaded and stored less often
        start = at + done * lanes
        a, b = data[start : start + lanes], data[start + lanes : start + 2 * lanes]
        c, d = data[start + 2 * lanes : start + 3 * lanes], data[start + 3 * lanes : start + 4 * lanes]
        k0, k1, k2, k3 = k[done], k[done + 1], k[done + 2], k[done + 3]
        for j in range(lanes):
            sums[j] += np.int32(a[j]) * k0 + np.int32(b[j]) * k1 + np.int32(c[j]) * k2 + np.int32(d[j]) * k3
        done += 4
    while done < taps:
        start = at + done * lanes
        a, k0 = data[start : start + lanes], k[done]
        for j in range(lanes):
            sums[j] += np.int32(a[j]) * k0
        done += 1


@_compiled
def resample(
    pixels_HW: NDArray[np.uint32],
    first_x: NDArray[Any],
    taps_x: NDArray[Any],
    k_x: NDArray[Any],
    first_y: NDArray[Any],
    taps_y: NDArray[Any],
    k_y: NDArray[Any],
    out_HWC: NDArray[np.uint8],
) -> None:
    """Pixels of four bytes, the last of which counts for nothing -> RGB. `_x` and `_y`: what `weights` gave for the
    columns and rows of `out_HWC`."""
    size, left, top = len(out_HWC), first_x[0], first_y[0]
    columns, rows = first_x[-1] + taps_x[-1] - left, first_y[-1] + taps_y[-1] - top
    narrow_HW, sums = np.empty((rows, size), np.uint32), np.empty(max(LANES, 4 * size), np.int32)
    turned_WH, line = np.empty((columns, ROWS), np.uint32), np.empty(ROWS, np.uint32)
    turned, narrow = turned_WH.reshape(-1).view(np.uint8), narrow_HW.reshape(-1).view(np.uint8)
    line_bytes = line.view(np.uint8)
    for at in range(0, rows, ROWS):
        count = min(ROWS, rows - at)
        for y in range(count):
            row = pixels_HW[top + at + y]
            for x in range(columns):
                turned_WH[x, y] = row[left + x]
        for x in range(size):
            _sum(turned, (first_x[x] - left) * LANES, LANES, k_x[x], taps_x[x], sums)
            for j in range(LANES):
                line_bytes[j] = min(max(sums[j] >> _BITS, 0), 255)
            for y in range(count):
                narrow_HW[at + y, x] = line[y]
    for y in range(size):
        _sum(narrow, (first_y[y] - top) * 4 * size, 4 * size, k_y[y], taps_y[y], sums)
        for x in range(size):
            for c in range(3):
                out_HWC[y, x, c] = min(max(sums[4 * x + c] >> _BITS, 0), 255)
