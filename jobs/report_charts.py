"""Small charts as inline SVG. Colours are the page's CSS variables, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 440, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 26, 36  # margins of the plot


@dataclass(frozen=True)
class Series:
    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class _Scale:
    """Data range -> pixels, with round ticks."""

    low: float
    high: float
    first_px: float
    last_px: float

    def px(self, value: float) -> float:
        span = (self.high - self.low) or 1.0
        return self.first_px + (value - self.low) / span * (self.last_px - self.first_px)

    def ticks(self, count: int = 5) -> list[float]:
        rough = ((self.high - self.low) or 1.0) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * n for n in (1, 2, 5, 10) if power * n >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str) -> Markup:
    """One line per series over a shared x; points that are not finite are left out."""
    kept = [Series(s.name, tuple(p for p in s.points if all(map(math.isfinite, p)))) for s in series]
    xs = [x for s in kept for x, _ in s.points]
    ys = [y for s in kept for _, y in s.points]
    if not xs:
        return Markup("<p>Nothing was measured.</p>")
    x = _Scale(min(xs), max(xs), _LEFT, WIDTH - _RIGHT)
    y = _padded(min(ys), max(ys))
    lines = [_line(s, n, x, y) for n, s in enumerate(kept)]
    return _svg(f"{y_label} over {x_label}", _axes(x, y, x_label, y_label) + Markup("").join(lines))


def bar_chart(
    values: Sequence[float],
    titles: Sequence[str],
    *,
    x_label: str,
    y_label: str,
    x_to: float | None = None,
    limits: Sequence[float] = (),
) -> Markup:
    """One thin bar per value, each with its title for whoever points at it. The axis counts them, or goes to `x_to`.
    `limits`: one for each bar or none, a line across it; bars above theirs have another colour."""
    x = _Scale(0, max(1, len(values)), _LEFT, WIDTH - _RIGHT)
    axis = x if x_to is None else _Scale(0, x_to, _LEFT, WIDTH - _RIGHT)
    furthest = max([*values, 1e-9])
    highest = max([furthest, *(limit for limit in limits if limit <= 2 * furthest)])  # others are far above
    y = _Scale(0.0, highest, HEIGHT - _BOTTOM, _TOP)
    width = (x.px(1) - x.px(0)) * (0.8 if len(values) < 64 else 1.0)
    bars = [
        Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
            "bar odd" if limits and value > limits[n] else "bar",
            *(_n(x.px(n)), _n(y.px(value)), _n(width), _n(y.px(0) - y.px(value)), title),
        )
        for n, (value, title) in enumerate(zip(values, titles, strict=True))
    ]
    bars += [_limit(x.px(n), width, y.px(limit)) for n, limit in enumerate(limits) if limit <= highest]
    return _svg(f"{y_label} by {x_label}", _axes(axis, y, x_label, y_label) + Markup("").join(bars))


def _limit(x_px: float, width: float, y_px: float) -> Markup:
    line = Markup('<line class="limit" x1="{}" x2="{}" y1="{}" y2="{}"/>')
    return line.format(_n(x_px - 0.5), _n(x_px + width + 0.5), _n(y_px), _n(y_px))


def grid_map(values: Sequence[Sequence[float]], *, label: str) -> Markup:
    """A square for each place of a grid, the fuller its colour the higher its value; beside it the scale."""
    every = [value for row in values for value in row]
    low, high = min(every), max(every)
    side = (HEIGHT - _TOP - 10) / max(len(values), len(values[0]))
    squares = [
        _square(_LEFT + column * side, _TOP + row * side, side, _opacity(value, low, high))
        + Markup("<title>row {}, column {}: {}</title></rect>").format(row, column, _tick(round(value, 3)))
        for row, cells in enumerate(values)
        for column, value in enumerate(cells)
    ]
    steps = [(_TOP + 20 * n, value) for n, value in enumerate((high, (high + low) / 2, low))]
    scale = [
        _square(300, y, 16, _opacity(value, low, high))
        + Markup('</rect><text x="322" y="{}">{}</text>').format(_n(y + 12), _tick(round(value, 3)))
        for y, value in steps
    ]
    heading = Markup('<text x="0" y="17">{}</text>').format(label)
    return _svg(label, Markup("").join([heading, *squares, *scale]))


def _square(x: float, y: float, side: float, opacity: float) -> Markup:
    """Left open, for what belongs into it."""
    return Markup('<rect class="bar" x="{}" y="{}" width="{}" height="{}" fill-opacity="{}">').format(
        _n(x), _n(y), _n(side), _n(side), _n(opacity)
    )


def _opacity(value: float, low: float, high: float) -> float:
    return 0.08 + 0.92 * (value - low) / ((high - low) or 1.0)


def _padded(low: float, high: float) -> _Scale:
    room = (high - low) * 0.08 or abs(high) * 0.08 or 1.0
    return _Scale(low - room, high + room, HEIGHT - _BOTTOM, _TOP)


def _line(series: Series, number: int, x: _Scale, y: _Scale) -> Markup:
    path = " ".join(f"{_n(x.px(a))},{_n(y.px(b))}" for a, b in series.points)
    key_x = _LEFT + 8 + number * 130
    return Markup(
        '<polyline class="line line{0}" points="{1}"/>'
        '<line class="line line{0}" x1="{2}" x2="{3}" y1="13" y2="13"/><text x="{4}" y="17">{5}</text>'
    ).format(number, path, key_x, key_x + 18, key_x + 24, series.name)


def _axes(x: _Scale, y: _Scale, x_label: str, y_label: str) -> Markup:
    rows = [
        Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="end" x="{}" y="{}">{}</text>').format(
            _LEFT, WIDTH - _RIGHT, _n(y.px(t)), _n(y.px(t)), _LEFT - 5, _n(y.px(t) + 4), _tick(t)
        )
        for t in y.ticks()
    ]
    columns = [
        Markup('<text class="middle" x="{}" y="{}">{}</text>').format(_n(x.px(t)), HEIGHT - _BOTTOM + 16, _tick(t))
        for t in x.ticks()
    ]
    middle = (_LEFT + WIDTH - _RIGHT) // 2
    labels = Markup('<text class="middle" x="{}" y="{}">{}</text><text x="0" y="17">{}</text>').format(
        middle, HEIGHT - 4, x_label, y_label
    )
    return Markup("").join([*rows, *columns, labels])


def _svg(description: str, body: Markup) -> Markup:
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}">'
    return Markup(head) + body + Markup("</svg>")


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _tick(value: float) -> str:
    return f"{value:,.6g}" if abs(value) < 1e6 else f"{value:.3g}"
