"""Progress of a long job: a bar where a person looks, a line now and then where a log is kept."""

from __future__ import annotations

import logging
import math
import re
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jobs.time_left import TimeLeft

log = logging.getLogger(__name__)
LINE_EVERY_S = 10.0
NOTES_A_SECOND = 10  # more than these nobody reads
BAR_EVERY_S = 0.1
_UNKNOWN = "unknown time"
PROGRESS_LINE = re.compile(r"\S+ \S+ INFO (\w+ [\d,]+ of [\d,]+, .* left)")
"""Of a log: what `advance` writes where nobody looks; in a group without the time of day."""


class JobProgress:
    """`advance` by units of the bar, with a text beside it."""

    def __init__(self, what: str, total: int, done: int = 0, *, amount: float | None = None) -> None:
        """`amount`: of all that is left to do, where units differ in size (see `advance`): the time left goes by it."""
        self._what, self._total, self._done = what, total, done
        self._left = TimeLeft(total - done if amount is None else amount, time.monotonic)
        self._last_line = self._second = time.monotonic()
        self._said, self._unsaid = 0, 0  # notes of this second
        self._bar_at = -math.inf
        self._bar = _bar() if sys.stderr.isatty() else None
        self._task = (
            None if self._bar is None else self._bar.add_task(what, total=total, completed=done, text="", left=_UNKNOWN)
        )

    def __enter__(self) -> JobProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._count_unsaid()
        if self._bar is not None:
            self._bar.stop()

    def note(self, line: str, *, always: bool = False) -> None:
        """A line for the log; where a person looks at the bar it would be in the way. When they come too fast to be
        read, the others of a second are only counted, but for those that are `always` said."""
        if self._bar is not None:
            return
        if time.monotonic() - self._second >= 1.0:
            self._count_unsaid()
        if always or self._said < NOTES_A_SECOND:
            log.info("%s", line)
            self._said += not always
        else:
            self._unsaid += 1

    def _count_unsaid(self) -> None:
        if self._unsaid:
            log.info("and %d more %s", self._unsaid, self._what)
        self._second, self._said, self._unsaid = time.monotonic(), 0, 0

    @property
    def left_s(self) -> float | None:
        """Until the end, by the pace of late; None as long as nothing is known."""
        return self._left.left_s

    def advance(self, count: int, text: str, amount: float | None = None, took_s: float | None = None) -> None:
        """`amount`: how much of the whole amount these units were; `took_s`: what they took by themselves."""
        self._left.note(count if amount is None else amount, took_s)
        self._move(count, text)

    def skip(self, count: int, text: str, amount: float | None = None) -> None:
        """Units that were given up; negative ones are to be done once more. They say nothing of the pace."""
        self._left.skip(count if amount is None else amount)
        self._move(count, text)

    def _move(self, count: int, text: str) -> None:
        self._done += count
        now, at_end = time.monotonic(), self._done == self._total
        if self._bar is not None and self._task is not None:
            if now - self._bar_at >= BAR_EVERY_S or at_end:
                self._bar_at = now
                self._bar.update(self._task, completed=self._done, text=text, left=_shown(self.left_s))
        elif now - self._last_line >= LINE_EVERY_S or (count and at_end):
            self._last_line = now
            log.info("%s %d of %d, %s, %s left", self._what, self._done, self._total, text, _shown(self.left_s))


def _shown(left_s: float | None) -> str:
    if left_s is None:
        return _UNKNOWN
    if left_s > 5400:
        return f"{left_s / 3600:.1f} h"
    return f"{left_s / 60:.0f} min" if left_s > 90 else f"{left_s:.0f} s"


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]} left"),
        console=Console(stderr=True),
    )
