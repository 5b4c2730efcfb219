"""What failed in a run, by reason, with a few examples of each, from its errors files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.errors import StorageError
from pipeline.map_ahead import map_ahead
from pipeline.records import FailureReason, Stage
from pipeline.token_table import ERRORS_SCHEMA, read_table

EXAMPLES = 3  # of each reason
FILES_AT_ONCE = 32
READERS = 8
MOST_NAMED = 1000  # files that could not be read; the others are counted
UNKNOWN = "unknown"  # a reason that is none of ours
MOST_CHARACTERS = 300  # of a key or a message: captions and decoders say anything
_EXAMPLE = ("shard", "key", "stage", "message")


@dataclass
class Failures:
    """`counts` and `examples` by reason; `num_images` and `num_shards` that failed, the latter as a whole;
    `unreadable`: why errors files could not be read, by URL, MOST_NAMED at most of `num_unreadable`."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    num_images: int = 0
    num_shards: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    num_unreadable: int = 0

    def add(self, rows: pa.Table) -> None:
        num_shards = pc.sum(pc.equal(rows["stage"], Stage.SHARD.value)).as_py() or 0
        self.num_shards += num_shards
        self.num_images += rows.num_rows - num_shards
        rows = _with_known_reasons(rows)
        for pair in rows["reason"].value_counts().to_pylist():
            reason = pair["values"]
            self.counts[reason] = self.counts.get(reason, 0) + pair["counts"]
            kept = self.examples.setdefault(reason, [])
            if len(kept) < EXAMPLES:
                alike = rows.filter(pc.equal(rows["reason"], reason)).slice(0, EXAMPLES - len(kept))
                kept += [{name: plain_text(row[name]) for name in _EXAMPLE} for row in alike.to_pylist()]

    def leave_out(self, url: str, why: str) -> None:
        self.num_unreadable += 1
        if len(self.unreadable) < MOST_NAMED:
            self.unreadable[url] = why

    def most_frequent(self) -> list[tuple[str, int]]:
        return sorted(self.counts.items(), key=lambda pair: (-pair[1], pair[0]))


def _with_known_reasons(rows: pa.Table) -> pa.Table:
    """A file says anything: what is no reason of ours becomes UNKNOWN, so that there are only so many."""
    known = pc.is_in(rows["reason"], value_set=pa.array([reason.value for reason in FailureReason]))
    reasons = pc.if_else(known, rows["reason"], UNKNOWN)
    return rows.set_column(rows.schema.get_field_index("reason"), "reason", reasons)


def read_failures(urls: Sequence[str], into: Failures) -> Iterator[int]:
    """Adds the rows of these errors files; gives the number of files read, a few at a time."""
    groups = [urls[start : start + FILES_AT_ONCE] for start in range(0, len(urls), FILES_AT_ONCE)]
    for group, found in zip(groups, map_ahead(_read, groups, threads=READERS), strict=True):
        for rows in found:
            if isinstance(rows, pa.Table):
                into.add(rows)
            else:
                into.leave_out(*rows)
        yield len(group)


def _read(urls: Sequence[str]) -> list[pa.Table | tuple[str, str]]:
    """All at once, or one by one where one of them is damaged: then its URL and why."""
    try:
        return [read_table(urls, ERRORS_SCHEMA.names)]
    except FileNotFoundError:  # a driver at work took one away, whose shard it tries again
        return [] if len(urls) == 1 else [one for url in urls for one in _read([url])]
    except (pa.ArrowException, OSError, StorageError) as error:
        if len(urls) == 1:
            return [(storage.public_url(urls[0]), plain_text(str(error)) or "")]
        return [one for url in urls for one in _read([url])]


def plain_text(text: str | None) -> str | None:
    """One line of printable characters, none too many: no control characters, none that turn writing round."""
    if text is None:
        return None
    line = "".join(c if c.isprintable() else " " for c in text[: 2 * MOST_CHARACTERS]).strip()
    return line if len(line) <= MOST_CHARACTERS else line[: MOST_CHARACTERS - 1] + "…"
