"""An end in time: of what may never end (Ray waits for ever for a head that is frozen or cut off), of a process in
which such a thing is left, and of one that is told to stop while it imports. Knows no Ray."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

log = logging.getLogger(__name__)
_endings: list[threading.Thread] = []
_for_good = threading.Event()


def end_in_time(ending: Callable[[], None], within_s: float) -> None:
    """Call it, and wait for so long. What takes longer is left to itself, until the process ends."""
    thread = threading.Thread(target=ending, daemon=True)
    _endings.append(thread)
    thread.start()
    thread.join(within_s)
    if thread.is_alive():
        log.warning("the cluster does not answer to a farewell within %g s: left without one", within_s)


@contextmanager
def signals_later() -> Iterator[None]:
    """For imports: some libraries catch whatever is raised in the midst of theirs, and Ctrl-C and SIGTERM would be
    lost. Inside, these are only noted; at the end KeyboardInterrupt is raised. Elsewhere than in the main thread
    signals stay as they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        asked.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked.is_set():
        raise KeyboardInterrupt


@contextmanager
def no_signal_lost() -> Iterator[None]:
    """For code that may catch what our handlers raise, or puts handlers of its own: where SIGINT or SIGTERM came in the
    midst of it and it ends well all the same, KeyboardInterrupt is raised. In the main thread; elsewhere it is as if
    it weren't there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came, comes = socket.socketpair()
    with came, comes:
        for end in (came, comes):
            end.setblocking(False)
        before = signal.set_wakeup_fd(comes.fileno(), warn_on_full_buffer=False)  # Python writes each signal's number
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
        with suppress(BlockingIOError):  # nothing came
            if {signal.SIGINT, signal.SIGTERM} & set(came.recv(4096)):
                raise KeyboardInterrupt


def leave_for_good() -> None:
    """What others do at the exit of this process would wait for ever too."""
    _for_good.set()


def exit_process(code: int) -> NoReturn:
    """As sys.exit does; where an ending goes on for ever, without what would wait for it."""
    if _for_good.is_set() or any(thread.is_alive() for thread in _endings):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
