"""An end in time: of what may never end (Ray waits for ever for a head that is frozen or cut off), and of a process in
which such a thing is left. Knows no Ray."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
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
