"""What any version ever wrote can be read: a small run of each is checked in (make_golden_run.py writes one)."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.status import read_status
from jobs.verify import verify
from make_golden_run import GOLDEN
from pipeline import part_check, storage
from pipeline.errors import Damaged, RunMismatch
from pipeline.output import OutputPrefix, require_run
from pipeline.records import DecodedSample, FailureReason, ObjectInfo
from pipeline.token_reader import ReaderOptions, TokenReader
from pipeline.token_run import TokenRun
from pipeline.token_table import READABLE_VERSIONS, SCHEMA_VERSION, part_bytes, read_errors, read_footer, token_schema

VERSIONS = sorted(READABLE_VERSIONS)


def test_a_run_of_each_version_is_checked_in_and_the_newest_is_written() -> None:
    assert {int(path.name.removeprefix("run-v")) for path in GOLDEN.glob("run-v*") if path.is_dir()} == set(VERSIONS)
    assert max(VERSIONS) == SCHEMA_VERSION


@pytest.mark.parametrize("version", VERSIONS)
def test_its_rows_are_what_they_always_were(version: int) -> None:
    run = TokenRun.open(str(GOLDEN / f"run-v{version}"))
    wanted = json.loads((GOLDEN / f"run-v{version}-rows.json").read_text())
    assert [row for part in run.parts for row in run.read_part(part).to_pylist()] == wanted
    assert [part.num_rows for part in run.parts] == [4, 2, 0] and run.missing == ()
    assert {read_footer(part.url)["schema_version"] for part in run.parts} == {version} == {run.table.schema_version}
    columns = ("key", "score", "caption")
    (batch,) = TokenReader(run, ReaderOptions(10, columns, shuffle_rows=0))
    assert batch.tokens_BN.tolist() == [row["tokens"] for row in wanted]
    assert [batch.columns[name] for name in ("key", "caption")] == [
        [row[name] for row in wanted] for name in ("key", "caption")
    ]


@pytest.mark.parametrize("version", VERSIONS)
def test_all_its_files_are_understood(version: int, tmp_path: Path) -> None:
    output = OutputPrefix(str(shutil.copytree(GOLDEN / f"run-v{version}", tmp_path / "run")))
    for quick in (False, True):
        assert verify(output, quick=quick).problems == ()
    status = read_status(output)
    assert (status.state, status.num_images, status.num_failed) == ("complete", 6, 2)
    (errors,) = storage.list_files(output.errors_folder())
    assert [(one.key, one.reason) for one in read_errors(errors.url)] == [
        ("img00010", FailureReason.NOT_AN_IMAGE), ("img00013", FailureReason.NOT_AN_IMAGE),
    ]  # fmt: skip
    shutil.rmtree(output.ledger_folder())
    assert TokenRun.open(output.url).num_rows == 6


def test_the_newest_is_what_is_written_now() -> None:
    """Whoever changes what a part holds gives the schema another number, and makes a golden run of it."""
    run = TokenRun.open(str(GOLDEN / f"run-v{SCHEMA_VERSION}"))
    for part in run.parts:
        footer, rows = read_footer(part.url), pq.read_table(part.url)
        own = ("key", "index", "offset", "size", "width", "height")
        samples = [
            DecodedSample(**{name: row[name] for name in own}, metadata=row) for row in rows.drop("tokens").to_pylist()
        ]
        tokens_BN = np.array(rows["tokens"].to_pylist(), run.table.token_dtype).reshape(-1, run.table.num_tokens)
        shard = ObjectInfo(footer["shard"], footer["shard_size"], footer["shard_etag"])
        written = pq.read_table(io.BytesIO(part_bytes(run.table, shard, samples, tokens_BN, footer["num_failed"])))
        assert written.equals(rows) and written.schema.equals(rows.schema, check_metadata=True)
        assert rows.schema.remove_metadata() == token_schema(run.table)


# A newer one


@pytest.fixture
def output(tmp_path: Path) -> OutputPrefix:
    return OutputPrefix(str(shutil.copytree(GOLDEN / f"run-v{SCHEMA_VERSION}", tmp_path / "run")))


def test_a_run_of_a_newer_version_is_refused_by_every_reader_with_both_versions(output: OutputPrefix) -> None:
    url = output.file("run.json")
    newer = {**json.loads(storage.read_bytes(url)), "schema_version": SCHEMA_VERSION + 1}
    storage.publish(url, json.dumps(newer).encode())
    said = (
        f"run.json is of another version: .*schema {SCHEMA_VERSION + 1}, this version knows {SCHEMA_VERSION}; install"
    )
    for read in (lambda: TokenRun.open(output.url), lambda: require_run(output), lambda: read_status(output)):
        with pytest.raises(RunMismatch, match=said):
            read()


def test_a_single_part_of_a_newer_version_is_refused(output: OutputPrefix) -> None:
    run = TokenRun.open(output.url)
    part = run.parts[0]
    newer = replace(run.table, schema_version=SCHEMA_VERSION + 1)
    empty = part_bytes(newer, ObjectInfo(str(part.shard), 1, "e"), [], np.zeros((0, 4), np.int16), 0)
    storage.publish(part.url, empty)
    with pytest.raises(Damaged, match=f"is of another run: schema_version is {SCHEMA_VERSION + 1} there"):
        run.read_part(part)
    content = part_check.read_part(ObjectInfo(part.url, len(empty), ""), run.table)
    assert f"its footer says schema_version {SCHEMA_VERSION + 1}, the run has {SCHEMA_VERSION}" in content.faults
