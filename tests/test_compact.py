"""A compacted run: the same rows in fewer files, in a stated order, the same bytes however often it was killed; and
what each command says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.compact import run_compact
from jobs.show import Originals, rows_to_show
from jobs.status import run_status
from jobs.verify import run_verify
from make_data import Killed, MortalStore, fake_table
from pipeline import storage
from pipeline.compact import Compaction
from pipeline.compact_file import Held, cut, merged_rows, require_same_rows
from pipeline.errors import Damaged, PipelineError, RunMismatch
from pipeline.metadata import MetadataColumn
from pipeline.output import OutputPrefix, RunDescription, check_run, require_run
from pipeline.records import DecodedSample, ObjectInfo
from pipeline.token_run import TokenRun
from pipeline.token_table import TableSpec, part_bytes, token_schema
from small_run import Squares, tokenize_all, write_captioned

SHARDS: list[list[str | None]] = [["a", "b", None], ["c"], [], ["d\nd", None, "", "<e>"], ["f"], ["g"]]
LOST = {"photos-4": "it is cut"}  # of `f`
NUM_ROWS, NUM_FAILED = 7, 2


def make_run(folder: str, output: str) -> OutputPrefix:
    first = 0
    for number, captions in enumerate(SHARDS):
        write_captioned(f"{folder}/shards/photos-{number}.tar", first, captions)
        first += max(1, len(captions))
    return tokenize_all(f"{folder}/shards", output, lost=LOST)


@pytest.fixture
def source(tmp_path: Path) -> OutputPrefix:
    return make_run(str(tmp_path), f"{tmp_path}/run")


def two_parts(source: OutputPrefix) -> int:
    """A target that two or three of the parts fit into."""
    return 2 * max(part.size_bytes for part in TokenRun.open(source.url).parts)


def compact(source: OutputPrefix, dest: str, **options: Any) -> int:
    return run_compact(source.url, dest, **{"target_bytes": two_parts(source), "as_json": True, **options})


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
    source = make_run("mortal://in", "mortal://run")
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
    done = {file.name: file for file in compaction.begin()}
    files = [done.get(group.name) or compaction.copy(group) for group in compaction.groups]
    compaction.finish(files)


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


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def test_a_damaged_part_ends_it_with_1_and_what_to_do(
    source: OutputPrefix, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(max(Path(source.tokens_folder()).iterdir(), key=lambda path: path.name))
    assert compact(source, f"{tmp_path}/dest") == 1
    said = capsys.readouterr().err
    assert "has other bytes than were recorded" in said and "dvae verify says more" in said and "To go on:" in said
    assert not (tmp_path / "dest/manifest.json").exists()
    assert run_status(f"{tmp_path}/dest", as_json=False) == 1


def test_a_damaged_errors_file_is_named(
    source: OutputPrefix, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = min(Path(source.errors_folder()).iterdir())
    path.write_bytes(path.read_bytes()[:-9])
    assert compact(source, f"{tmp_path}/dest") == 1
    assert f"{path}: it is no whole Parquet file" in capsys.readouterr().err


def test_a_file_that_the_store_damages_is_not_called_done(
    source: OutputPrefix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = storage.publish

    def damaging(url: str, data: bytes) -> None:
        publish(url, data)
        if "/dest/tokens/" in url:
            damage(Path(url))

    monkeypatch.setattr(storage, "publish", damaging)
    assert compact(source, f"{tmp_path}/dest") == 1
    monkeypatch.undo()
    assert list((tmp_path / "dest").glob("shards/*")) == []
    assert compact(source, f"{tmp_path}/dest") == 0


REFUSED: dict[str, tuple[Callable[[OutputPrefix], Any], str, str]] = {
    "no run": (lambda run: storage.remove(run.file("run.json")), "dest", "holds no run"),
    "not complete": (lambda run: storage.remove(run.file("manifest.json")), "dest", "is not complete"),
    "a strange file": (lambda run: storage.publish(run.part("x.parquet"), b""), "dest", "x.parquet"),
    "a part is gone": (lambda run: next(Path(run.tokens_folder()).iterdir()).unlink(), "dest", "dvae verify says"),
    "inside the run": (lambda run: None, "run/tokens/dest", "lie in each other"),
    "around the run": (lambda run: None, "", "lie in each other"),
    "the run itself": (lambda run: None, "run/", "lie in each other"),
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


def test_another_compaction_in_the_same_place_is_refused(source: OutputPrefix, tmp_path: Path) -> None:
    compact(source, f"{tmp_path}/dest")
    with pytest.raises(RunMismatch, match="holds another compaction"):
        compact(source, f"{tmp_path}/dest", target_bytes=1 << 30)
    with pytest.raises(PipelineError, match="is compacted already"):
        compact(OutputPrefix(f"{tmp_path}/dest"), f"{tmp_path}/again", target_bytes=1)
    with pytest.raises(RunMismatch, match="compacted is"):
        run = RunDescription(Squares().table, {}, {})
        check_run(OutputPrefix(f"{tmp_path}/dest"), run, accept_numerics=True)


def test_status_and_verify_say_that_it_is_complete(
    source: OutputPrefix, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compact(source, f"{tmp_path}/dest")
    capsys.readouterr()
    assert run_status(f"{tmp_path}/dest", as_json=True) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["state"], status["num_rows"], status["compacted"]["source"]) == ("complete", NUM_ROWS, source.url)
    for quick in (True, False):
        assert run_verify(f"{tmp_path}/dest", as_json=True, quick=quick) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["num_images"], report["num_failed"], report["num_done"]) == (NUM_ROWS, NUM_FAILED, 5)
        assert (report["num_quarantined"], report["problems"]) == (1, [])


def test_show_finds_the_originals_by_the_map(source: OutputPrefix, tmp_path: Path) -> None:
    compact(source, f"{tmp_path}/dest")
    dest = OutputPrefix(f"{tmp_path}/dest")
    rows, originals = rows_to_show(dest, None, 16), Originals(dest, require_run(dest))
    assert [originals.of(row).problem for row in rows] == [""] * NUM_ROWS
    write_captioned(f"{tmp_path}/shards/photos-0.tar", 50, ["another"])
    assert ["has changed" in Originals(dest, require_run(dest)).of(row).problem for row in rows][:3] == [
        True,
        True,
        False,
    ]


def other_tokens(path: Path) -> None:
    """Whole, and with other rows than the map says."""
    rows = pq.read_table(path)
    pq.write_table(rows.slice(0, rows.num_rows - 1), path)


@pytest.mark.parametrize(
    ("what", "deed", "kind"),
    [
        ("tokens", damage, "torn"), ("tokens", Path.unlink, "missing"), ("tokens", other_tokens, "torn"),
        ("errors", damage, "torn"), ("errors", Path.unlink, "missing"),
        ("shards", damage, "manifest or torn"), ("shards", Path.unlink, "foreign"),
        ("manifest.json", Path.unlink, "incomplete"),
    ],
)  # fmt: skip
def test_verify_finds_what_is_wrong(
    what: str, deed: Callable[[Path], None], kind: str, source: OutputPrefix, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    compact(source, f"{tmp_path}/dest")
    capsys.readouterr()
    place = tmp_path / "dest" / what
    deed(min(place.iterdir()) if place.is_dir() else place)
    assert run_verify(f"{tmp_path}/dest", as_json=True) == 1
    kinds = {problem["kind"] for problem in json.loads(capsys.readouterr().out)["problems"]}
    assert kinds & set(kind.split(" or "))


# One file


def part(first: int, num_rows: int, scores: list[float | None]) -> Held:
    table = scored()
    samples = [
        DecodedSample(f"k{first + n}", n, None if n % 2 else n, 1, 2, 3, {"score": scores[n % len(scores)]})
        for n in range(num_rows)
    ]
    tokens_BN = np.arange(first, first + num_rows * 4).reshape(num_rows, 4) % 16
    shard = ObjectInfo(f"s{first}.tar", 10_000, "e")
    return Held(f"{first}.parquet", part_bytes(table, shard, samples, tokens_BN, 0))


def scored() -> TableSpec:
    return fake_table(columns=(MetadataColumn("score", "json.score", "float32"),))


def test_rows_fill_row_groups_across_parts_and_nan_and_null_come_through() -> None:
    parts = [part(0, 1500, [1.0, float("nan"), None]), part(5000, 0, []), part(6000, 3000, [None])]
    merged = merged_rows(scored(), parts, {"num_rows": 4500})
    metadata = pq.read_metadata(pa.BufferReader(merged))
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [2048, 2048, 404]
    require_same_rows(merged, parts, token_schema(scored()))
    assert merged == merged_rows(scored(), parts, {"num_rows": 4500})


@pytest.mark.parametrize("others", [[(0, 5), (9, 5)], [(9, 5), (0, 4)], [(9, 5)], [(0, 5), (9, 4)], []])
def test_other_rows_than_those_of_the_parts_are_noticed(others: list[tuple[int, int]]) -> None:
    merged = merged_rows(scored(), [part(9, 5, [0.5]), part(0, 5, [None, float("nan")])], {})
    with pytest.raises(Damaged):
        require_same_rows(merged, [part(*other, [0.5]) for other in others], token_schema(scored()))


def test_cut_gives_the_pieces_asked_for() -> None:
    schema = pa.schema([("n", pa.int64())])
    tables = [pa.table({"n": list(values)}, schema=schema) for values in (range(5), [], range(5, 6), range(6, 11))]
    pieces = [piece["n"].to_pylist() for piece in cut(iter(tables), [0, 2, 4, 0, 9], schema)]
    assert pieces == [[], [0, 1], [2, 3, 4, 5], [], [6, 7, 8, 9, 10]]
