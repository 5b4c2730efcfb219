"""The rows of a run on their way into the ledger: none is lost, none is kept, and no store holds the run up."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import recording as recording_module
from jobs.recording import Recording
from pipeline import storage
from pipeline.errors import Damaged, StorageError
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
        assert self.go.wait(20)
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
    """A store that fails once."""

    fails = 1

    def append(self, results: Iterable[ShardResult]) -> None:
        if self.fails:
            self.fails -= 1
            raise StorageError("503")
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


def test_an_end_at_which_the_last_write_fails_still_tries_all_rows_and_says_so(
    output: OutputPrefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording_module, "LEDGER_EVERY_ROWS", 1)
    recording = Recording(Failing(output), NOTHING)
    recording.note(row(0))
    with pytest.raises(StorageError, match="503"):
        recording.close()
    assert len(recording.rows(())) == 1


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
