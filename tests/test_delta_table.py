"""A run as a Delta Lake table: just what is committed, a version for each state of the run, and no part is copied,
changed or removed."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from jobs.compact import run_compact
from jobs.register import run_register
from jobs.verify import run_verify
from pipeline import storage
from pipeline.delta_table import Registered, register
from pipeline.errors import NoRun, PipelineError, RunMismatch
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix
from pipeline.plan import make_plan
from pipeline.prune import drop_removed
from pipeline.shard_patterns import expand
from pipeline.token_run import TokenRun
from small_run import Squares, tokenize_all, write_captioned


@pytest.fixture
def output(tmp_path: Path) -> OutputPrefix:
    """A run of two shards of three images and one."""
    write_captioned(f"{tmp_path}/shards/a.tar", 0, ["one", "two", None, "three"])
    write_captioned(f"{tmp_path}/shards/b.tar", 10, ["four"])
    return tokenize_all(f"{tmp_path}/shards", f"{tmp_path}/run")


def registered(output: OutputPrefix) -> Registered:
    return register(output.url)


def keys_of(output: OutputPrefix, version: int | None = None) -> list[str]:
    rows = DeltaTable(output.url, version=version).to_pyarrow_table(columns=["key"])
    return sorted(rows["key"].to_pylist())


def files_of(output: OutputPrefix) -> dict[str, bytes]:
    """All but Delta Lake's own."""
    paths = (path for path in Path(output.url).rglob("*") if path.is_file() and "_delta_log" not in path.parts)
    return {str(path): path.read_bytes() for path in paths}


def test_the_table_has_the_rows_of_the_run_and_nothing_is_copied(output: OutputPrefix) -> None:
    before = files_of(output)
    assert registered(output) == Registered(output.url, 0, 2, 4, 2, 0)
    assert files_of(output) == before
    wanted = pa.concat_tables([TokenRun.open(output.url).read_part(part) for part in TokenRun.open(output.url).parts])
    rows = DeltaTable(output.url).to_pyarrow_table().sort_by("key")
    assert rows.to_pylist() == wanted.replace_schema_metadata().sort_by("key").to_pylist()


def test_a_second_time_says_that_nothing_has_changed(output: OutputPrefix) -> None:
    registered(output)
    assert registered(output) == Registered(output.url, 0, 2, 4, 0, 0)
    assert DeltaTable(output.url).version() == 0


def test_a_grown_run_is_a_new_version_and_the_old_one_stays(output: OutputPrefix, tmp_path: Path) -> None:
    registered(output)
    old = keys_of(output)
    write_captioned(f"{tmp_path}/shards/c.tar", 20, ["five"])
    tokenize_all(f"{tmp_path}/shards", output.url)
    assert registered(output) == Registered(output.url, 1, 3, 5, 1, 0)
    assert keys_of(output) == [*old, "img00020"]
    assert keys_of(output, version=0) == old


def test_a_run_that_grows_while_it_is_registered_is_not_taken_back(
    output: OutputPrefix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody registers a newer state just after this one has looked."""
    registered(output)
    write_captioned(f"{tmp_path}/shards/c.tar", 20, ["five"])
    tokenize_all(f"{tmp_path}/shards", output.url)
    early = TokenRun.open(output.url)
    write_captioned(f"{tmp_path}/shards/d.tar", 30, ["six"])
    tokenize_all(f"{tmp_path}/shards", output.url)
    assert len(early.parts) == 3

    def open_early(url: str) -> TokenRun:
        monkeypatch.undo()
        assert registered(output).num_rows == 6
        return early

    monkeypatch.setattr(TokenRun, "open", open_early)
    assert registered(output).num_rows == 6
    assert keys_of(output)[-2:] == ["img00020", "img00030"]


def test_two_that_make_the_table_at_once_make_one(output: OutputPrefix, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_late(url: str) -> TokenRun:
        monkeypatch.undo()
        registered(output)
        return TokenRun.open(url)

    monkeypatch.setattr(TokenRun, "open", open_late)
    assert registered(output) == Registered(output.url, 0, 2, 4, 0, 0)


@pytest.mark.parametrize("name", ["a b", "a#b", "a?b", "é", "[a]"])
def test_a_run_may_lie_in_a_folder_of_any_name(name: str, tmp_path: Path) -> None:
    write_captioned(f"{tmp_path}/shards/a.tar", 0, ["one"])
    output = tokenize_all(f"{tmp_path}/shards", f"{tmp_path}/{name}")
    assert (registered(output).num_added, registered(output).num_added) == (1, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "shards"])
    assert keys_of(output) == ["img00000"]


def test_a_name_that_deltalake_takes_for_another_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_captioned(f"{tmp_path}/shards/a.tar", 0, ["one"])
    output = tokenize_all(f"{tmp_path}/shards", f"{tmp_path}/a%20b")
    with pytest.raises(PipelineError, match="no path with a %"):
        registered(output)
    assert not (tmp_path / "a%20b/_delta_log").exists()


def test_a_shard_that_changed_has_its_new_rows_once(output: OutputPrefix, tmp_path: Path) -> None:
    registered(output)
    write_captioned(f"{tmp_path}/shards/b.tar", 30, ["six", "seven"])
    tokenize_all(f"{tmp_path}/shards", output.url)
    assert registered(output) == Registered(output.url, 1, 2, 5, 1, 0)
    assert keys_of(output) == ["img00000", "img00001", "img00003", "img00030", "img00031"]


def test_a_part_that_was_dropped_is_in_the_newest_version_no_more(output: OutputPrefix, tmp_path: Path) -> None:
    registered(output)
    (tmp_path / "shards/b.tar").unlink()
    ledger = Ledger(output)
    drop_removed(output, ledger, make_plan(expand([f"{tmp_path}/shards"]), output, ledger, Squares().table))
    assert registered(output) == Registered(output.url, 1, 1, 3, 0, 1)
    assert keys_of(output) == ["img00000", "img00001", "img00003"]


def test_what_is_no_part_of_the_run_is_not_in_the_table(output: OutputPrefix) -> None:
    (part, _) = TokenRun.open(output.url).parts
    storage.publish(output.part("copied.parquet"), storage.read_bytes(part.url))
    storage.publish(output.part("torn.parquet"), b"PAR1")
    registered(output)
    assert len(keys_of(output)) == 4


def test_a_reader_of_one_shard_opens_one_part(output: OutputPrefix, tmp_path: Path) -> None:
    registered(output)
    one = DeltaTable(output.url).to_pyarrow_dataset().get_fragments(
        filter=pa.compute.field("shard") == f"{tmp_path}/shards/a.tar"
    )  # fmt: skip
    assert len(list(one)) == 1


def test_vacuum_leaves_the_run_alone(output: OutputPrefix) -> None:
    registered(output)
    before = files_of(output)
    assert DeltaTable(output.url).vacuum(dry_run=False) == []
    with pytest.raises(Exception, match="minimum retention"):
        DeltaTable(output.url).vacuum(retention_hours=0, dry_run=False)
    assert files_of(output) == before


def test_the_run_goes_on_as_if_there_were_no_table(output: OutputPrefix, tmp_path: Path) -> None:
    registered(output)
    assert run_verify(output.url, as_json=True) == 0
    assert duckdb.sql(f"SELECT count(*) FROM '{output.url}/tokens/*.parquet'").fetchall() == [(4,)]
    assert [path.name for path in (tmp_path / "run/tokens").iterdir() if path.suffix != ".parquet"] == []


def test_a_compacted_run_can_be_registered_too(output: OutputPrefix, tmp_path: Path) -> None:
    run_compact(output.url, f"{tmp_path}/dest", target_bytes=1 << 30, as_json=True)
    dest = OutputPrefix(f"{tmp_path}/dest")
    assert registered(dest) == Registered(dest.url, 0, 1, 4, 1, 0)
    assert len(keys_of(dest)) == 4
    assert run_verify(dest.url, as_json=True) == 0


def test_a_run_without_a_part_yet_is_an_empty_table(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    write_captioned(f"{tmp_path}/shards/a.tar", 0, ["one"])
    output = tokenize_all(f"{tmp_path}/shards", f"{tmp_path}/run", lost={"a.tar": "it is cut"})
    assert registered(output) == Registered(output.url, 0, 0, 0, 0, 0)
    assert keys_of(output) == []


def test_another_runs_table_in_the_same_place_is_refused(output: OutputPrefix) -> None:
    registered(output)
    run = json.loads(storage.read_bytes(output.file("run.json")))
    for part in TokenRun.open(output.url).parts:
        storage.remove(part.url)
    storage.remove_folder(output.ledger_folder())
    storage.publish(output.file("run.json"), json.dumps({**run, "tokenizer_id": "another"}).encode())
    with pytest.raises(RunMismatch, match="remove its _delta_log"):
        registered(output)


def test_where_there_is_no_run_or_no_store_for_it_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(NoRun):
        run_register(str(tmp_path), as_json=False)
    write_captioned("memory://here/shards/a.tar", 0, ["one"])
    output = tokenize_all("memory://here/shards", "memory://here/run")
    with pytest.raises(PipelineError, match="are for disks"):
        registered(output)


def test_missing_parts_are_named_and_the_exit_code_says_so(
    output: OutputPrefix, capsys: pytest.CaptureFixture[str]
) -> None:
    part = TokenRun.open(output.url).parts[0]
    storage.remove(part.url)
    assert run_register(output.url, as_json=True) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["num_parts"], said["missing"]) == (1, [part.name])
    assert run_register(output.url, as_json=False) == 1
    assert f"({part.name}): dvae verify says more" in capsys.readouterr().out


@pytest.mark.server
def test_on_s3_a_run_is_compacted_registered_and_read(s3: str, tmp_path: Path) -> None:
    write_captioned(f"{s3}/delta/shards/a.tar", 0, ["one", None, "two"])
    write_captioned(f"{s3}/delta/shards/b.tar", 10, ["three"])
    output = tokenize_all(f"{s3}/delta/shards", f"{s3}/delta/run")
    assert registered(output) == Registered(output.url, 0, 2, 3, 2, 0)
    write_captioned(f"{s3}/delta/shards/c.tar", 20, ["four"])
    tokenize_all(f"{s3}/delta/shards", f"{s3}/delta/run")
    assert registered(output) == Registered(output.url, 1, 3, 4, 1, 0)

    def count(url: str, version: int | None = None) -> int:
        table = DeltaTable(url, version=version, storage_options={"allow_http": "true"})
        return int(table.to_pyarrow_table(columns=["key"]).num_rows)

    assert (count(output.url), count(output.url, version=0)) == (4, 3)
    dest = f"{s3}/delta/dest"
    assert run_compact(output.url, dest, target_bytes=1 << 30, as_json=True) == 0
    assert run_compact(output.url, dest, target_bytes=1 << 30, as_json=True) == 0
    assert run_register(dest, as_json=True) == 0
    assert run_verify(dest, as_json=True) == 0
    assert count(dest) == 4
