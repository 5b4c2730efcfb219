"""manifest.json: the totals and the parts of a run, there only while every shard is accounted for."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from pipeline import storage
from pipeline.output import OutputPrefix
from pipeline.records import ShardResult, ShardState
from pipeline.token_table import TableSpec


class Counted(Protocol):
    """A row of the ledger, or of the map of a compacted run."""

    @property
    def state(self) -> ShardState: ...

    @property
    def num_rows(self) -> int: ...

    @property
    def num_failed(self) -> int: ...


@dataclass(frozen=True)
class Totals:
    """Sums over shards."""

    num_done: int
    num_quarantined: int
    num_rows: int
    num_failed: int

    @classmethod
    def of(cls, rows: Iterable[Counted]) -> Totals:
        every = list(rows)
        num_done = sum(row.state is ShardState.DONE for row in every)
        num_failed = sum(row.num_failed for row in every)
        return cls(num_done, len(every) - num_done, sum(row.num_rows for row in every), num_failed)

    def plus(self, row: ShardResult) -> Totals:
        done = row.state is ShardState.DONE
        return Totals(
            self.num_done + done,
            self.num_quarantined + (not done),
            self.num_rows + row.num_rows,
            self.num_failed + row.num_failed,
        )

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.num_done + other.num_done,
            self.num_quarantined + other.num_quarantined,
            self.num_rows + other.num_rows,
            self.num_failed + other.num_failed,
        )

    @property
    def failed_share(self) -> float:
        return self.num_failed / max(1, self.num_rows + self.num_failed)


def write_manifest(
    output: OutputPrefix, table: TableSpec, rows: Sequence[ShardResult], removed: Sequence[ShardResult]
) -> None:
    """`rows`: of all shards of the plan; the totals and `parts` are theirs. `removed`: of shards that the input has no
    longer, whose parts are still in the table. Written only where it says something new."""
    url, data = output.file("manifest.json"), _manifest_bytes(table, rows, removed)
    try:
        if storage.read_bytes(url) == data:
            return
    except FileNotFoundError:
        pass
    storage.publish(url, data)


def _manifest_bytes(table: TableSpec, rows: Sequence[ShardResult], removed: Sequence[ShardResult]) -> bytes:
    """One line for each part: a million of them take the encoder that is written in C, one at a time."""
    done = (_part(row) for row in _sorted(rows) if row.state is ShardState.DONE)
    lost = ({"shard": r.shard, "reason": r.reason} for r in _sorted(rows) if r.state is ShardState.QUARANTINED)
    gone = (_part(row) for row in _sorted(removed) if row.state is ShardState.DONE)
    out = io.BytesIO()
    out.write(json.dumps({**table.to_json(), **asdict(Totals.of(rows))}, indent=1, sort_keys=True)[:-2].encode())
    for name, items in (("parts", done), ("quarantined", lost), ("removed", gone)):
        out.write(f',\n "{name}": ['.encode())
        for number, item in enumerate(items):
            out.write((",\n  " if number else "\n  ").encode() + json.dumps(item).encode())
        out.write(b"]")
    out.write(b"\n}\n")
    return out.getvalue()


def _sorted(rows: Sequence[ShardResult]) -> list[ShardResult]:
    return sorted(rows, key=lambda row: row.shard)


def _part(row: ShardResult) -> dict[str, Any]:
    return {
        "part": row.part, "shard": row.shard, "num_rows": row.num_rows, "num_failed": row.num_failed,
        "bytes": row.part_bytes, "sha256": row.sha256,
    }  # fmt: skip
