"""Rules for single settings, each with a message that names the setting, its value and the rule."""

from __future__ import annotations

import math


class ModelError(ValueError):
    """Something that the caller gave to the model wing is wrong; the message names it and the remedy."""


def at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ModelError(f"{name} {value!r} must be a whole number of at least {least}")


def between(name: str, value: int, least: int, most: int) -> None:
    at_least(name, value, least)
    if value > most:
        raise ModelError(f"{name} {value!r} must be at most {most:,}")


def above(name: str, value: float, bound: float) -> None:
    if not (math.isfinite(value) and value > bound):
        raise ModelError(f"{name} {value!r} must be a finite number above {bound}")


def not_negative(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0.0):
        raise ModelError(f"{name} {value!r} must be a finite number, zero or more")


def share(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ModelError(f"{name} {value!r} must lie in [0, 1)")


def one_of(name: str, value: object, choices: tuple[object, ...], remark: str = "") -> None:
    if value not in choices:
        raise ModelError(f"{name} {value!r} must be {_listed(choices)}{remark}")


def _listed(choices: tuple[object, ...]) -> str:
    return ("one of " if len(choices) > 1 else "") + ", ".join(map(repr, choices))
