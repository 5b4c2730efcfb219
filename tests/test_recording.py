"""The rows of a run on their way into the ledger: none is lost, none is kept, and no store holds the run up."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import recording as recording_module
from jobs.recording import Recording
from jobs.tokenize_dataset import Session, run_tokenize
from make_data import write_checkpoint, write_shards
from make_run import run_config
from pipeline import storage
from pipeline.errors import Damaged, PipelineError, RunHeld, StorageError
from pipeline.ledger import Ledger
from pipeline.manifest import Totals
from pipeline.output import OutputPrefix
from pipeline.plan import Plan
from pipeline.records import ShardResult, ShardState

NOTHING = Plan((), (), ())


def row(number: int, **changes: object) -> ShardResult:
    done = ShardResult(
        f"s3://b/{number:06}.tar", 10, "e", ShardState.DONE, f"{number}.parquet", 90, 10, 4096, "sha", 1.5
    )
    return replace(done, **changes)  # type: ignore[arg-type]


@pytest.fixture
def output(tmp_path: Path) -> OutputPrefix:
    return OutputPrefix(str(tmp_path))


def test_all_that_was_noted_is_in_the_ledger_and_no_row_is_kept(output: OutputPrefix) -> None:
    recording = Recording(Ledger(output), NOTHING)
    rows, most = [row(n) for n in range(5500)], 0
    for one in rows:
        recording.note(one)
        most = max(most, len(recording._rows))
    recording.close()
    assert not recording._rows and most <= recording_module.MAX_UNWRITTEN
    assert len(storage.list_files(output.ledger_folder())) >= 2
    assert sorted(recording.rows(()), key=lambda one: one.shard) == rows
    assert recording.totals == Totals.of(rows) and recording.num_new == 5500


class Stuck(Ledger):
    """A store that takes its time."""

    go = threading.Event()

    def append(self, results: Iterable[ShardResult]) -> None:
        assert self.go.wait(60)
        super().append(results)


def test_a_slow_store_holds_the_run_up_only_when_very_many_rows_wait(
    output: OutputPrefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording_module, "LEDGER_EVERY_ROWS", 10)
    monkeypatch.setattr(recording_module, "MAX_UNWRITTEN", 100)
    recording = Recording(Stuck(output), NOTHING)
    for number in range(99):
        recording.note(row(number))  # none of these waits
    threading.Timer(0.2, Stuck.go.set).start()
    recording.note(row(99))
    assert Stuck.go.is_set()
    recording.close()
    assert len(recording.rows(())) == 100


class Failing(Ledger):
    """A store that fails once, or more often."""

    fails, error = 1, StorageError

    def append(self, results: Iterable[ShardResult]) -> None:
        if self.fails:
            self.fails -= 1
            raise self.error("503")
        super().append(results)


def test_what_could_not_be_written_is_said_and_is_written_at_the_end(
    output: OutputPrefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording_module, "LEDGER_EVERY_ROWS", 2)
    recording = Recording(Failing(output), NOTHING)
    recording.note(row(0))
    recording.note(row(1))
    recording._writer.submit(int).result()  # the write has failed by now
    with pytest.raises(StorageError, match="503"):
        recording.note(row(2))
    recording.close()
    assert len(recording.rows(())) == 3


def test_a_last_write_that_fails_and_is_made_good_is_no_error_of_the_run(
    output: OutputPrefix, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All is in the ledger: a run that ended here would have no manifest, and nothing left to do."""
    monkeypatch.setattr(recording_module, "LEDGER_EVERY_ROWS", 1)
    recording = Recording(Failing(output), NOTHING)
    recording.note(row(0))
    with caplog.at_level(logging.WARNING):
        recording.close()
    assert len(recording.rows(())) == 1 and "503" in caplog.text


@pytest.mark.parametrize(("fails", "error"), [(2, StorageError), (1, RunHeld), (2, RunHeld)])
def test_a_last_write_that_is_not_made_good_or_has_lost_the_run_is_raised(
    output: OutputPrefix, monkeypatch: pytest.MonkeyPatch, fails: int, error: type[PipelineError]
) -> None:
    monkeypatch.setattr(recording_module, "LEDGER_EVERY_ROWS", 1)
    monkeypatch.setattr(Failing, "fails", fails)
    monkeypatch.setattr(Failing, "error", error)
    recording = Recording(Failing(output), NOTHING)
    recording.note(row(0))
    with pytest.raises(error, match="503"):
        recording.close()


def test_rows_are_those_of_the_plan_and_reasons_are_counted(output: OutputPrefix) -> None:
    lost = row(1, state=ShardState.QUARANTINED, part=None, reason="shard_truncated", message="cut")
    gone, dropped = row(8), row(9, state=ShardState.REMOVED)
    ledger = Ledger(output)
    ledger.append([row(0), lost, gone, dropped])
    recording = Recording(ledger, Plan((), (row(0), lost), (row(2),), (gone,)))
    recording.note(row(3, state=ShardState.QUARANTINED, reason="shard_damaged"))
    assert recording.reasons == {"shard_truncated": 1, "shard_damaged": 1} and recording.num_shards == 3
    recording.close()
    assert row(2) in Ledger(output).read().values(), "an adopted row is written"


def test_a_ledger_that_lost_a_segment_meanwhile_gives_no_manifest(output: OutputPrefix) -> None:
    recording = Recording(Ledger(output), NOTHING)
    recording.note(row(0))
    recording.close()
    for segment in storage.list_files(output.ledger_folder()):
        storage.remove(segment.url)
    with pytest.raises(Damaged, match="--rebuild-ledger"):
        recording.rows(())


def test_a_fault_of_our_own_says_how_to_go_on_and_what_was_done_is_in_the_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "in", [2, 3])
    config = run_config(write_checkpoint(tmp_path / "checkpoint"), tmp_path / "in", tmp_path / "out")

    def tokenize(self: Session, source: object) -> None:
        self._recording.note(row(0))
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(Session, "_tokenize", tokenize)
    with pytest.raises(ZeroDivisionError):
        run_tokenize(config, "dvae tokenize again")
    said = capsys.readouterr().out
    assert "1 shards are done, 1 are left; go on with" in said and "dvae tokenize again" in said
    assert len(Ledger(OutputPrefix(str(tmp_path / "out"))).read()) == 1
