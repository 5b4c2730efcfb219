"""Progress of a long job where a log is kept."""

from __future__ import annotations

import logging

import pytest

from jobs.dispatch import GivenUp, Work
from jobs.progress import NOTES_A_SECOND, JobProgress
from jobs.tokenize_dataset import _advance
from jobs.train_progress import Status, StepProgress
from pipeline.plan import ShardTask
from pipeline.records import FailureReason, ObjectInfo, ShardResult, ShardState


def test_the_end_is_said_once_however_often_it_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "jobs.progress"), JobProgress("steps", total=3) as progress:
        for count in (1, 2, 0, 0):
            progress.advance(count, "fast")
    assert [record.message for record in caplog.records] == ["steps 3 of 3, fast, 0 s left"]


def test_notes_that_come_too_fast_to_be_read_are_counted_and_the_important_ones_are_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("jobs.progress.time.monotonic", lambda: now)
    with caplog.at_level(logging.INFO, "jobs.progress"), JobProgress("shards", total=1000) as progress:
        for number in range(300):  # 100 a second
            now = number / 100
            progress.note(f"lost {number}" if number % 70 == 69 else f"done {number}", always=number % 70 == 69)
    said = [record.message for record in caplog.records]
    assert [line for line in said if line.startswith("lost")] == ["lost 69", "lost 139", "lost 209", "lost 279"]
    assert sum(line.startswith("done") for line in said) == 3 * NOTES_A_SECOND
    assert [line for line in said if line.startswith("and")] == ["and 89 more shards"] * 2 + ["and 88 more shards"]


def test_notes_at_the_pace_of_a_reader_are_all_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("jobs.progress.time.monotonic", lambda: now)
    with caplog.at_level(logging.INFO, "jobs.progress"), JobProgress("shards", total=1000) as progress:
        for number in range(30):
            now = number / 5
            progress.note(f"done {number}")
    assert [record.message for record in caplog.records] == [f"done {number}" for number in range(30)]


def test_a_shard_that_is_quarantined_says_nothing_of_what_the_others_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut tar after 3 s, before 999 of 400 s each on 8 actors."""
    now = 0.0
    monkeypatch.setattr("jobs.progress.time.monotonic", lambda: now)
    task = ShardTask(ObjectInfo("s0", 100, "e"), "s0.parquet")
    cut = GivenUp(Work(task), FailureReason.SHARD_TRUNCATED, "no end")
    done = ShardResult("s1", 100, "e", ShardState.DONE, num_rows=10, seconds=400.0)
    with JobProgress("shards", total=1000, amount=100_000) as progress:
        now = 3.0
        _advance(progress, cut, "")
        assert progress.left_s is None
        now = 403.0
        for _ in range(8):
            _advance(progress, done, "")
        assert progress.left_s == pytest.approx(991 / 8 * 400)
        for _ in range(91):
            _advance(progress, cut, "")
        assert progress.left_s == pytest.approx(900 / 8 * 400)


def test_training_that_falls_back_to_a_checkpoint_still_knows_its_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("jobs.progress.time.monotonic", lambda: clock[0])
    progress = StepProgress(1000)
    for clock[0], step in ((0.0, 0), (100.0, 100), (200.0, 200), (200.0, 150), (250.0, 200)):
        progress.show(Status(step=step))
        assert step == 0 or progress.left_s == pytest.approx(1000 - step, rel=0.05)
    progress.close()


def test_a_bar_is_told_the_end_and_not_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []

    class Bar:
        def add_task(self, what: str, **fields: object) -> int:
            return 0

        def update(self, task: int, *, completed: int, text: str, left: str) -> None:
            told.append(completed)

        def start(self) -> None: ...
        def stop(self) -> None: ...

    monkeypatch.setattr("jobs.progress.sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("jobs.progress._bar", Bar)
    with JobProgress("shards", total=10_000) as progress:
        for _ in range(10_000):
            progress.advance(1, "fast")
    assert told[-1] == 10_000 and len(told) < 1000
