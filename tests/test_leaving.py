"""Ends that never come, of a cluster or of a process, are waited for a stated time."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from jobs import cluster
from jobs.cluster import HeadGone, connected
from jobs.leaving import no_signal_lost, signals_later

PROGRAM = """
import atexit, sys, threading
from jobs.leaving import end_in_time, exit_process, leave_for_good
atexit.register(threading.Event().wait, float(sys.argv[1]))
if sys.argv[2] == "gone":
    leave_for_good()
else:
    end_in_time(threading.Event().wait if sys.argv[2] == "stuck" else print, 0.1)
print("the last word")
exit_process(3)
"""


@pytest.mark.parametrize(("at_exit_s", "ending"), [("600", "stuck"), ("600", "gone"), ("0", "ends")])
def test_a_process_ends_with_its_code_and_its_last_word_whatever_is_stuck(at_exit_s: str, ending: str) -> None:
    """As Ray's own farewell at the exit is, when its head is frozen."""
    command = [sys.executable, "-c", PROGRAM, at_exit_s, ending]
    ended = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout.strip()) == (3, "the last word"), ended.stderr


def test_a_cluster_that_never_answers_to_a_farewell_is_left_without_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = threading.Event()
    monkeypatch.setattr(cluster, "_connect", lambda *_: None)
    monkeypatch.setattr(cluster, "FAREWELL_S", 0.1)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: answers.wait(60))
    with caplog.at_level(logging.WARNING), connected("10.0.0.1:6379"):
        pass
    assert "left without one" in caplog.text and not answers.is_set()
    answers.set()


def test_a_head_that_is_gone_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    monkeypatch.setattr(cluster, "_connect", lambda *_: None)
    monkeypatch.setattr(cluster, "leave_for_good", lambda: told.append(False))
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: told.append(True))
    with pytest.raises(HeadGone), connected("10.0.0.1:6379"):
        raise HeadGone
    assert told == [False]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_within_an_import_that_swallows_it_is_heard_after_it(number: signal.Signals) -> None:
    before, done = signal.getsignal(number), []
    with pytest.raises(KeyboardInterrupt), signals_later():
        with suppress(BaseException):
            signal.raise_signal(number)
            done.append("the import")
        done.append("all of it")
    assert done == ["the import", "all of it"] and signal.getsignal(number) is before
    with signals_later():
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_other_handlers_swallow_is_not_lost(number: signal.Signals) -> None:
    """As Ray's are, while it starts."""
    before = signal.getsignal(number)
    try:
        with pytest.raises(KeyboardInterrupt), no_signal_lost():
            signal.signal(number, lambda *_: None)
            signal.raise_signal(number)
        with no_signal_lost():
            signal.raise_signal(signal.SIGCHLD)
        with pytest.raises(ZeroDivisionError), no_signal_lost():
            signal.raise_signal(number)
            raise ZeroDivisionError
    finally:
        signal.signal(number, before)
    assert signal.set_wakeup_fd(-1) == -1
