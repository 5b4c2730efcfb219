"""A compacted run: the same rows in fewer files, in a stated order, the same bytes however often it was killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from make_data import Killed, MortalStore
from pipeline import storage
from pipeline.compact import Compaction
from pipeline.errors import PipelineError, RunMismatch
from pipeline.output import OutputPrefix, RunDescription, check_run
from pipeline.token_run import TokenRun
from pipeline.token_table import token_schema
from small_run import NUM_FAILED, NUM_ROWS, SHARDS, Squares, compact, six_shards, two_parts


@pytest.fixture
def source(tmp_path: Path) -> OutputPrefix:
    return six_shards(str(tmp_path), f"{tmp_path}/run")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """All rows, as a reader of the folder finds them: file by file, by name."""
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def files_below(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_same_rows_in_fewer_files_sorted_by_shard_and_index(source: OutputPrefix, tmp_path: Path) -> None:
    before = files_below(Path(source.url))
    assert compact(source, f"{tmp_path}/dest") == 0

    rows = rows_of(tmp_path / "dest/tokens")
    wanted = sorted(rows_of(Path(source.url) / "tokens"), key=lambda row: (row["shard"], row["index"]))
    assert rows == wanted and len(rows) == NUM_ROWS
    assert len(list((tmp_path / "dest/tokens").iterdir())) < len(list(Path(source.tokens_folder()).iterdir()))
    schemas = {str(pq.read_schema(p).remove_metadata()) for p in (tmp_path / "dest/tokens").iterdir()}
    assert schemas == {str(token_schema(Squares().table))}
    assert files_below(Path(source.url)) == before


def test_the_errors_come_along_so_that_every_image_is_still_accounted_for(source: OutputPrefix, tmp_path: Path) -> None:
    compact(source, f"{tmp_path}/dest")
    there = rows_of(tmp_path / "dest/errors")
    assert there == sorted(rows_of(Path(source.errors_folder())), key=lambda row: row["shard"])
    assert [row["reason"] for row in there] == ["not_an_image", "not_an_image", "shard_truncated"]


def test_the_map_finds_the_rows_of_a_shard(source: OutputPrefix, tmp_path: Path) -> None:
    compact(source, f"{tmp_path}/dest")
    places = rows_of(tmp_path / "dest/shards")
    assert [place["shard"] for place in places] == [f"{tmp_path}/shards/photos-{n}.tar" for n in range(6)]
    assert [place["state"] for place in places] == ["done"] * 4 + ["quarantined", "done"]
    for place in places:
        rows = pq.read_table(tmp_path / "dest/tokens" / place["file"]).slice(place["first_row"], place["num_rows"])
        assert rows["shard"].unique().to_pylist() == [place["shard"]] * (place["num_rows"] > 0)


@pytest.mark.parametrize("target_bytes", [1, 1 << 30])
def test_a_part_is_never_split_and_one_file_may_hold_all(
    target_bytes: int, source: OutputPrefix, tmp_path: Path
) -> None:
    compact(source, f"{tmp_path}/dest", target_bytes=target_bytes)
    num_files = len(list((tmp_path / "dest/tokens").iterdir()))
    assert num_files == (len(SHARDS) if target_bytes == 1 else 1)
    assert len(rows_of(tmp_path / "dest/tokens")) == NUM_ROWS


def test_every_reader_opens_it_as_a_run(source: OutputPrefix, tmp_path: Path) -> None:
    compact(source, f"{tmp_path}/dest")
    run = TokenRun.open(f"{tmp_path}/dest")
    assert (run.num_rows, run.table, run.missing) == (NUM_ROWS, Squares().table, ())
    assert [part.shard for part in run.parts] == [None] * len(run.parts)
    tokens = [batch.tokens_BN for batch in run.batches(run.parts)]
    assert np.concatenate(tokens).tolist() == [row["tokens"] for row in rows_of(tmp_path / "dest/tokens")]


def test_killed_before_any_write_and_run_again_the_bytes_are_the_same(tmp_path: Path) -> None:
    MortalStore.fresh()
    source = six_shards("mortal://in", "mortal://run")
    run_here(source, "mortal://wanted")
    wanted = {path.removeprefix("/wanted"): data for path, data in MortalStore.objects("/wanted").items()}
    MortalStore.alive()
    run_here(source, "mortal://count")
    num_writes = len(MortalStore.log)
    for kill_before in range(num_writes):
        dest = f"mortal://dest{kill_before}"
        MortalStore.alive(kill_before)
        with pytest.raises(Killed):
            run_here(source, dest)
        MortalStore.alive()
        run_here(source, dest)
        there = MortalStore.objects(f"/dest{kill_before}/")
        assert {path.removeprefix(f"/dest{kill_before}"): data for path, data in there.items()} == wanted


def run_here(source: OutputPrefix, dest: str) -> None:
    """As the command, without its lease and its console."""
    compaction = Compaction(source, OutputPrefix(dest), two_parts(source))
    compaction.begin()
    compaction.finish([compaction.kept(group) or compaction.copy(group) for group in compaction.groups])


def test_what_was_done_is_not_done_again(
    source: OutputPrefix, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compact(source, f"{tmp_path}/dest")
    capsys.readouterr()
    monkeypatch.setattr(Compaction, "copy", None)
    assert compact(source, f"{tmp_path}/dest") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_files_before"] == report["num_files"] == 3
    assert (report["num_rows"], report["num_failed"], report["num_quarantined"]) == (NUM_ROWS, NUM_FAILED, 1)


REFUSED: dict[str, tuple[Callable[[OutputPrefix], Any], str, str]] = {
    "no run": (lambda run: storage.remove(run.file("run.json")), "dest", "holds no run"),
    "not complete": (lambda run: storage.remove(run.file("manifest.json")), "dest", "is not complete"),
    "a strange file": (lambda run: storage.publish(run.part("x.parquet"), b""), "dest", "x.parquet"),
    "a part is gone": (lambda run: next(Path(run.tokens_folder()).iterdir()).unlink(), "dest", "dvae verify says"),
    "inside the run": (lambda run: None, "run/tokens/dest", "lie in each other"),
    "around the run": (lambda run: None, "", "lie in each other"),
    "the run itself": (lambda run: None, "run/", "lie in each other"),
    "a file of others": (
        lambda run: storage.publish(f"{run.url}/../dest/a.tar", b""),
        "dest",
        "and no run.json",
    ),
    "around the shards": (lambda run: None, "shards", "photos-0.tar, and"),
    "not empty": (lambda run: storage.publish(f"{run.url}/../dest/tokens/a", b""), "dest", "name an empty place"),
    "another run": (lambda run: storage.publish(f"{run.url}/../dest/run.json", b"{}"), "dest", "run of its own"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_written(case: str, source: OutputPrefix, tmp_path: Path) -> None:
    target_bytes = two_parts(source)
    deed, dest, message = REFUSED[case]
    deed(source)
    before = files_below(tmp_path)
    with pytest.raises(PipelineError, match=message):
        compact(source, f"{tmp_path}/{dest}", target_bytes=target_bytes)
    assert files_below(tmp_path) == before


def test_of_two_that_begin_in_one_place_only_the_first_goes_on(source: OutputPrefix, tmp_path: Path) -> None:
    dest = OutputPrefix(f"{tmp_path}/dest")
    one, other = Compaction(source, dest, 1), Compaction(source, dest, 1 << 30)
    one.begin()
    one.finish([one.copy(group) for group in one.groups])
    before = files_below(Path(dest.url))
    with pytest.raises(RunMismatch, match="holds another compaction"):
        other.begin()
    assert files_below(Path(dest.url)) == before


def test_another_compaction_in_the_same_place_is_refused(source: OutputPrefix, tmp_path: Path) -> None:
    compact(source, f"{tmp_path}/dest")
    with pytest.raises(RunMismatch, match="holds another compaction"):
        compact(source, f"{tmp_path}/dest", target_bytes=1 << 30)
    with pytest.raises(PipelineError, match="is compacted already"):
        compact(OutputPrefix(f"{tmp_path}/dest"), f"{tmp_path}/again", target_bytes=1)
    with pytest.raises(RunMismatch, match="compacted is"):
        run = RunDescription(Squares().table, {}, {})
        check_run(OutputPrefix(f"{tmp_path}/dest"), run, accept_numerics=True)
