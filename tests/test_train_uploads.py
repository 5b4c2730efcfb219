"""Publishing beside the loop: in turn, whole, and a failure is the caller's."""

from __future__ import annotations

import logging
import threading

import pytest

from jobs.train_uploads import Uploads


class Held:
    """A publication that lasts until it is let go."""

    def __init__(self, error: Exception | None = None) -> None:
        self.begun, self.let_go, self.done = threading.Event(), threading.Event(), False
        self._error = error

    def __call__(self) -> None:
        self.begun.set()
        assert self.let_go.wait(60)
        if self._error is not None:
            raise self._error
        self.done = True


def test_the_caller_goes_on_while_an_upload_is_under_way() -> None:
    uploads, held = Uploads(), Held()
    uploads.start(held)
    assert held.begun.wait(60)
    uploads.check()
    assert not held.done
    held.let_go.set()
    uploads.wait()
    assert held.done


def test_an_upload_begins_when_the_one_before_is_done() -> None:
    uploads, first, second = Uploads(), Held(), Held()
    uploads.start(first)
    threading.Timer(0.1, first.let_go.set).start()
    uploads.start(second)
    assert first.done
    second.let_go.set()
    uploads.wait()


@pytest.mark.parametrize("call", ["start", "check", "wait"])
def test_what_an_upload_raised_comes_out_once_of_the_next_call(call: str) -> None:
    uploads, held = Uploads(), Held(OSError("no space left"))
    uploads.start(held)
    held.let_go.set()
    for thread in threading.enumerate():
        if thread.name == "upload":
            thread.join()
    with pytest.raises(OSError, match="no space left"):
        getattr(uploads, call)(*[lambda: None] * (call == "start"))
    uploads.wait()


def test_beside_another_error_a_failed_upload_is_said(caplog: pytest.LogCaptureFixture) -> None:
    uploads, held = Uploads(), Held(OSError("no space left"))
    uploads.start(held)
    held.let_go.set()
    with caplog.at_level(logging.ERROR):
        uploads.wait_beside(ValueError("first"))
    assert "no space left" in caplog.text and "ValueError" in caplog.text
