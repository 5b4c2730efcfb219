"""`dvae verify --rebuild-ledger`: from the files alone the same ledger, also when it is killed on the way."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.tokenize_config import TokenizeConfig
from jobs.verify import rebuild_ledger, verify
from make_data import Killed, MortalStore, write_checkpoint
from make_run import part_of, run_config, tokenize_here, write_shard
from pipeline import ledger as ledger_module
from pipeline import storage
from pipeline.errors import NoRun, RunHeld
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix
from pipeline.records import ShardResult, ShardState


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("ck"))


@pytest.fixture
def config(checkpoint: Path, tmp_path: Path) -> TokenizeConfig:
    """A complete run of three shards, one with failed images."""
    for number, (name, good) in enumerate({"a": "++++", "b": "-++-", "c": ""}.items()):
        write_shard(tmp_path / "in" / f"{name}.tar", 10 * number, good)
    made = run_config(checkpoint, tmp_path / "in", tmp_path / "out", max_failed_samples=0.5)
    assert tokenize_here(made) == 0
    return made


@pytest.fixture
def with_lost(config: TokenizeConfig) -> TokenizeConfig:
    """The same with a fourth shard that is cut short, so that it is quarantined."""
    path = Path(config.shards[0]) / "lost.tar"
    write_shard(path, 90, "+++")
    path.write_bytes(path.read_bytes()[:1500])
    assert tokenize_here(config) == 1
    return config


def prefix(config: TokenizeConfig) -> OutputPrefix:
    return OutputPrefix(config.output)


def knowable(rows: dict[str, ShardResult]) -> dict[str, ShardResult]:
    """Without what no file says: how long and how often a shard was tried, and which bytes a quarantined one had."""

    def known(row: ShardResult) -> ShardResult:
        row = replace(row, seconds=0.0, attempts=1)
        return row if row.state is ShardState.DONE else replace(row, size_bytes=0, etag="")

    return {shard: known(row) for shard, row in rows.items()}


def test_a_ledger_made_from_nothing_has_all_that_can_be_known(with_lost: TokenizeConfig) -> None:
    output = prefix(with_lost)
    before = Ledger(output).read()
    assert {row.state for row in before.values()} == {ShardState.DONE, ShardState.QUARANTINED}
    shutil.rmtree(Path(output.url) / "ledger")
    rebuild_ledger(output)
    assert Ledger(output).read() == knowable(before)
    assert [p.kind.value for p in verify(output, quick=False).problems] == ["quarantined", "incomplete"]


def test_after_it_there_is_nothing_to_do_and_no_shard_is_read(
    config: TokenizeConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = prefix(config)
    shutil.rmtree(Path(output.url) / "ledger")
    manifest = storage.read_bytes(output.file("manifest.json"))
    assert rebuild_ledger(output).complete
    opened: list[str] = []
    monkeypatch.setattr(storage, "open_read", lambda url: opened.append(url))
    assert tokenize_here(config) == 0
    assert "nothing to do" in capsys.readouterr().out and not opened
    assert storage.read_bytes(output.file("manifest.json")) == manifest
    assert verify(output, quick=False).complete


def test_it_records_the_sha256_of_parts_that_were_found_after_a_kill(config: TokenizeConfig) -> None:
    output = prefix(config)
    before = Ledger(output).read()
    shutil.rmtree(Path(output.url) / "ledger")
    assert tokenize_here(config) == 0
    assert verify(output, quick=False).num_without_sha256 == 3
    report = rebuild_ledger(output)
    assert report.complete and report.num_without_sha256 == 0
    assert Ledger(output).read() == knowable(before)


@pytest.mark.parametrize("content", [b"", b"x" * 100])
def test_a_torn_ledger_is_no_obstacle(config: TokenizeConfig, content: bytes) -> None:
    output = prefix(config)
    before = Ledger(output).read()
    (Path(output.url) / "ledger" / "00000001.parquet").write_bytes(content)
    assert rebuild_ledger(output).complete
    assert Ledger(output).read() == knowable(before)
    assert len(storage.list_files(output.ledger_folder())) == 1


def test_a_part_that_is_not_whole_gets_no_row(config: TokenizeConfig) -> None:
    output = prefix(config)
    path = part_of(Path(output.url), "a")
    data = bytearray(path.read_bytes())
    data[-8 - pq.read_metadata(path).serialized_size - 3] ^= 1
    path.write_bytes(data)
    problems = rebuild_ledger(output).problems
    assert {p.kind.value for p in problems} == {"torn", "incomplete", "manifest"}
    assert [p.file for p in problems if p.kind == "torn"] == [f"tokens/{path.name}"]
    assert path.name not in {row.part for row in Ledger(output).read().values()}
    path.unlink()
    assert tokenize_here(config) == 0
    assert verify(output, quick=False).complete


def test_beside_a_driver_at_work_it_does_nothing(config: TokenizeConfig) -> None:
    output = prefix(config)
    before = storage.list_files(output.ledger_folder())
    with Lease(output), pytest.raises(RunHeld):
        rebuild_ledger(output)
    assert storage.list_files(output.ledger_folder()) == before


def test_where_no_run_is_it_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(NoRun):
        rebuild_ledger(OutputPrefix(str(tmp_path / "nothing")))
    assert not (tmp_path / "nothing").exists()


def test_an_output_without_a_part_gets_an_empty_ledger(config: TokenizeConfig) -> None:
    output = prefix(config)
    for folder in ("tokens", "errors"):
        shutil.rmtree(Path(output.url) / folder)
    rebuild_ledger(output)
    assert Ledger(output).read() == {}
    assert tokenize_here(config) == 0
    assert verify(output, quick=False).complete


def test_a_kill_at_any_step_leaves_a_good_ledger(with_lost: TokenizeConfig) -> None:
    """Some segments of old rows, one of them wrong: each shard has the old row or the new one, never none."""
    files = {path: path.read_bytes() for path in Path(with_lost.output).rglob("*") if path.is_file()}
    output = OutputPrefix("mortal://out")
    for kill_before in itertools.count():
        MortalStore.fresh()
        for path, data in files.items():
            storage.publish(storage.join(output.url, path.relative_to(with_lost.output).as_posix()), data)
        old = Ledger(output).read()
        for row in old.values():
            Ledger(output).append([replace(row, attempts=7)])
        MortalStore.alive(kill_before)
        try:
            rebuild_ledger(output)
        except Killed:
            _check_after_a_kill(output, old)
        else:
            break
    assert kill_before >= 4 + len(old)  # the lease, the new segment, each old one, the lease
    assert Ledger(output).read() == knowable(old)


def _check_after_a_kill(output: OutputPrefix, old: dict[str, ShardResult]) -> None:
    MortalStore.alive()
    storage.remove(output.file("lease.json"))  # its process is gone
    for shard, row in Ledger(output).read().items():
        assert row in (replace(old[shard], attempts=7), knowable(old)[shard])
    assert set(Ledger(output).read()) == set(old)
    rebuild_ledger(output)
    assert Ledger(output).read() == knowable(old)
    assert len(storage.list_files(output.ledger_folder())) == 1


def test_a_ledger_of_many_segments_is_one_afterwards(config: TokenizeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "COMPACT_SEGMENTS", 100)
    output = prefix(config)
    before = Ledger(output).read()
    for _ in range(5):
        Ledger(output).append(before.values())
    rebuild_ledger(output)
    assert len(storage.list_files(output.ledger_folder())) == 1
    assert Ledger(output).read() == knowable(before)
