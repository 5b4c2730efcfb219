"""Durations, sizes, rates and counts as a person reads them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`, `4.2 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:,.1f} days"


def counted(number: int, what: str) -> str:
    """`1 part`, `2,000 parts`."""
    return f"{number:,} {what}" + "s" * (number != 1)


def size(num_bytes: float) -> str:
    """In the decimal units of stores' bills."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if num_bytes >= 10**power:
            return f"{num_bytes / 10**power:,.1f} {unit}"
    return f"{num_bytes:,.0f} bytes"


def rate(images_per_s: float) -> str:
    """Of images a second: three digits at least say something."""
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.3g}"


def about(number: float) -> str:
    """Three digits, for what is estimated."""
    return f"{float(f'{number:.3g}'):,.0f}"
