"""Progress of a long job where a log is kept."""

from __future__ import annotations

import logging

import pytest

from jobs.progress import NOTES_A_SECOND, JobProgress


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
