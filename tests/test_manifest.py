"""manifest.json: totals of what was listed, a line for each part, and what is in the table beside them."""

from __future__ import annotations

import json
from pathlib import Path

from make_data import fake_table
from pipeline.manifest import Totals, write_manifest
from pipeline.output import OutputPrefix
from pipeline.records import ShardResult, ShardState

DONE = [
    ShardResult(f"s3://b/{n}.tar", 9, "e", ShardState.DONE, f"{n}.parquet", 10 * n, n, 100, "ab") for n in (3, 1, 2)
]
LOST = ShardResult("s3://b/lost.tar", 9, "e", ShardState.QUARANTINED, reason="shard_truncated", message="cut")
GONE = ShardResult("s3://b/gone.tar", 9, "e", ShardState.DONE, "gone.parquet", 7, 0, 100, None)


def test_the_manifest_counts_what_was_listed_and_names_the_rest(tmp_path: Path) -> None:
    write_manifest(OutputPrefix(str(tmp_path)), fake_table(), [*DONE, LOST], [GONE])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest == {
        **fake_table().to_json(), "num_done": 3, "num_quarantined": 1, "num_rows": 60, "num_failed": 6,
        "parts": [
            {"part": f"{n}.parquet", "shard": f"s3://b/{n}.tar", "num_rows": 10 * n, "num_failed": n, "bytes": 100,
             "sha256": "ab"} for n in (1, 2, 3)
        ],
        "quarantined": [{"shard": "s3://b/lost.tar", "reason": "shard_truncated"}],
        "removed": [{"part": "gone.parquet", "shard": "s3://b/gone.tar", "num_rows": 7, "num_failed": 0, "bytes": 100,
                     "sha256": None}],
    }  # fmt: skip
    assert len((tmp_path / "manifest.json").read_text().splitlines()) < 40


def test_an_empty_run_has_a_manifest_too(tmp_path: Path) -> None:
    write_manifest(OutputPrefix(str(tmp_path)), fake_table(), [], [])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["num_done"], manifest["parts"], manifest["quarantined"], manifest["removed"]) == (0, [], [], [])


def test_it_is_the_same_in_any_order_and_not_written_again(tmp_path: Path) -> None:
    output = OutputPrefix(str(tmp_path))
    write_manifest(output, fake_table(), DONE, [])
    before = (tmp_path / "manifest.json").stat().st_mtime_ns
    write_manifest(output, fake_table(), DONE[::-1], [])
    assert (tmp_path / "manifest.json").stat().st_mtime_ns == before
    write_manifest(output, fake_table(), DONE, [GONE])
    assert (tmp_path / "manifest.json").stat().st_mtime_ns != before


def test_totals_of_rows_are_those_of_one_row_after_another() -> None:
    totals = Totals.of([])
    for row in [*DONE, LOST]:
        totals = totals.plus(row)
    assert totals == Totals.of([*DONE, LOST]) == Totals(3, 1, 60, 6)
    assert totals.failed_share == 6 / 66
