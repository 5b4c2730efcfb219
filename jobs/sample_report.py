"""What `dvae verify --sample` was asked and what it found, and how that is told. Comparing is verify_sample.py's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAX_SHOWN = 20  # images that differ
WHY_SKIPPED = {
    "failed": "failed then, so they have no tokens",
    "compressed": "in compressed shards, of which no byte range can be fetched",
    "changed": "in shards that changed since: the same tokenize command does those anew",
    "gone": "in shards that are not there any more",
}


@dataclass(frozen=True)
class SampleSettings:
    """`device`: None for that of the run."""

    share: float
    checkpoint: str
    seed: int = 0
    device: str | None = None


@dataclass(frozen=True)
class SampleReport:
    """`margins`: least, median and largest of what the logit of the token that is chosen now has above that of the
    stored one, where they differ. `differing`: the first images that do."""

    share: float
    seed: int
    numerics: dict[str, Any]
    num_chosen: int
    num_compared: int
    num_equal: int
    num_tokens: int
    num_equal_tokens: int
    skipped: dict[str, int]
    margins: tuple[float, float, float] | None
    differing: tuple[dict[str, Any], ...]

    @property
    def is_right(self) -> bool:
        """Something was compared, and no token differs."""
        return 0 < self.num_compared == self.num_equal


def sample_lines(report: SampleReport) -> Iterator[tuple[str, str]]:
    """What was compared and how it came out, as (name, text)."""
    yield "sample", f"{report.num_chosen:,} images chosen (share {report.share:g}, seed {report.seed})"
    for why, count in report.skipped.items():
        yield "skipped", f"{count:,} {WHY_SKIPPED[why]}"
    yield "computed", ", ".join(f"{name} {value}" for name, value in report.numerics.items())
    yield "images", _rate(report.num_equal, report.num_compared)
    yield "tokens", _rate(report.num_equal_tokens, report.num_tokens)
    if report.margins is not None:
        least, median, most = report.margins
        yield "margin", f"of differing tokens: least {least:.3g}, median {median:.3g}, largest {most:.3g} logits"
    for one in report.differing[:MAX_SHOWN]:
        what = one["problem"] or f"{one['num_tokens']} tokens differ, margin up to {one['margin']:.3g}"
        yield "differs", f"{one['shard']} {one['key']}: {what}"


def _rate(num_equal: int, number: int) -> str:
    share = f"{num_equal / number:.4%}" if number else "nothing"
    return f"{num_equal:,} of {number:,} compared are the same: {share}"
