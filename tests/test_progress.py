"""Progress of a long job where a log is kept."""

from __future__ import annotations

import logging

import pytest

from jobs.progress import JobProgress


def test_the_end_is_said_once_however_often_it_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "jobs.progress"), JobProgress("steps", total=3) as progress:
        for count in (1, 2, 0, 0):
            progress.advance(count, "fast")
    assert [record.message for record in caplog.records] == ["steps 3 of 3, fast, 0 s left"]
