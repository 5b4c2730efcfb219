"""What is damaged before, while or after a run is compacted is found, and made anew; and what each command says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.register import run_register
from jobs.show import Originals, rows_to_show
from jobs.status import run_status
from jobs.verify import run_verify
from pipeline import storage
from pipeline.compact import Compaction
from pipeline.errors import Damaged, PipelineError
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix, part_name, require_run
from pipeline.token_run import TokenRun
from small_run import NUM_FAILED, NUM_ROWS, compact, damage, six_shards, two_parts, write_captioned


@pytest.fixture
def source(tmp_path: Path) -> OutputPrefix:
    return six_shards(str(tmp_path), f"{tmp_path}/run")


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


def test_errors_of_another_shard_end_it_before_anything_is_written(
    source: OutputPrefix, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost, other = (source.errors(part_name(f"{tmp_path}/shards/photos-{n}.tar")) for n in (0, 3))
    storage.publish(lost, storage.read_bytes(other))
    assert compact(source, f"{tmp_path}/dest") == 1
    assert "photos-0.tar: 2 rows and 0 errors of 2 and 1" in capsys.readouterr().err
    assert not (tmp_path / "dest/tokens").exists() and not (tmp_path / "dest/shards").exists()


def test_rows_that_the_ledger_does_not_tell_of_end_it(
    source: OutputPrefix, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row, *_) = (row for row in Ledger(source).read().values() if row.num_rows == 2)
    Ledger(source).append([replace(row, num_rows=1)])
    assert compact(source, f"{tmp_path}/dest") == 1
    assert "the run is not what its ledger says" in capsys.readouterr().err


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


def test_what_is_there_once_is_said_in_the_singular(
    source: OutputPrefix, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compact(source, f"{tmp_path}/dest", target_bytes=1 << 30, as_json=False)
    said = capsys.readouterr().out
    assert "compacted   5 parts, " in said and " -> 1 file, " in said and "7, of 6 shards; 2 errors" in said


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


DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("tokens", damage, "torn"), ("tokens", Path.unlink, "missing"), ("tokens", other_tokens, "torn"),
    ("errors", damage, "torn"), ("errors", Path.unlink, "missing"),
    ("shards", damage, "manifest or torn"), ("shards", Path.unlink, "incomplete"),
    ("manifest.json", Path.unlink, "incomplete"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "deed", "kind"), DAMAGE)
def test_verify_finds_what_is_wrong_and_the_same_command_mends_it(
    what: str, deed: Callable[[Path], None], kind: str, source: OutputPrefix, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    compact(source, f"{tmp_path}/dest")
    place = tmp_path / "dest" / what
    path = min(place.iterdir()) if place.is_dir() else place
    before = path.read_bytes()
    deed(path)
    capsys.readouterr()
    assert run_verify(f"{tmp_path}/dest", as_json=True) == 1
    kinds = {problem["kind"] for problem in json.loads(capsys.readouterr().out)["problems"]}
    assert kinds & set(kind.split(" or "))

    assert compact(source, f"{tmp_path}/dest") == 0
    assert json.loads(capsys.readouterr().out)["num_files_before"] == 3 - (place.is_dir())
    assert path.read_bytes() == before
    assert run_verify(f"{tmp_path}/dest", as_json=True) == 0


def test_a_map_of_other_places_is_made_anew(source: OutputPrefix, tmp_path: Path) -> None:
    """Whole, and not what its name says."""
    compact(source, f"{tmp_path}/dest")
    one, other, _ = sorted((tmp_path / "dest/shards").iterdir())
    before = one.read_bytes()
    one.write_bytes(other.read_bytes())
    assert compact(source, f"{tmp_path}/dest") == 0 and one.read_bytes() == before


@pytest.mark.parametrize("deed", [Path.unlink, other_tokens])
def test_readers_learn_which_files_are_missing(
    deed: Callable[[Path], None], source: OutputPrefix, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compact(source, f"{tmp_path}/dest")
    whole = TokenRun.open(f"{tmp_path}/dest")
    deed(Path(whole.parts[0].url))
    run = TokenRun.open(f"{tmp_path}/dest")
    assert (run.parts, run.missing) == (whole.parts[1:], (whole.parts[0].name,))
    capsys.readouterr()
    assert run_register(f"{tmp_path}/dest", as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["missing"] == [whole.parts[0].name]


def test_a_compaction_that_did_not_come_to_its_end_is_no_run_yet(source: OutputPrefix, tmp_path: Path) -> None:
    dest = OutputPrefix(f"{tmp_path}/dest")
    compaction = Compaction(source, dest, two_parts(source))
    compaction.begin()
    compaction.copy(compaction.groups[0])
    with pytest.raises(PipelineError, match="the same dvae compact goes on"):
        TokenRun.open(dest.url)
    storage.publish(dest.file("manifest.json"), b'{"parts": [{}]}')
    with pytest.raises(Damaged, match=r"manifest\.json is damaged"):
        TokenRun.open(dest.url)
