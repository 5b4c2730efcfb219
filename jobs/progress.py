"""Progress of a long job: a bar where a person looks, a line now and then where a log is kept."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)
LINE_EVERY_S = 10.0


class JobProgress:
    """`advance` by units of the bar, with a text beside it."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self._what, self._total, self._done = what, total, done
        self._started_at, self._first = time.monotonic(), done
        self._last_line = self._started_at
        self._bar = _bar() if sys.stderr.isatty() else None
        self._task = None if self._bar is None else self._bar.add_task(what, total=total, completed=done, text="")

    def __enter__(self) -> JobProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, line: str) -> None:
        """A line for the log; where a person looks at the bar it would be in the way."""
        if self._bar is None:
            log.info("%s", line)

    def advance(self, count: int, text: str) -> None:
        self._done += count
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, text=text)
        elif time.monotonic() - self._last_line >= LINE_EVERY_S or (count and self._done == self._total):
            self._last_line = time.monotonic()
            log.info("%s %d of %d, %s, %s left", self._what, self._done, self._total, text, self._left())

    def _left(self) -> str:
        made = self._done - self._first
        if made <= 0:
            return "unknown time"
        left_s = (time.monotonic() - self._started_at) / made * (self._total - self._done)
        return (
            f"{left_s / 3600:.1f} h"
            if left_s > 5400
            else f"{left_s / 60:.0f} min"
            if left_s > 90
            else f"{left_s:.0f} s"
        )


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
