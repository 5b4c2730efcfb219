"""The figures of a run, gathered over steps, and published under its output.

A figure of a training line is the mean over the steps since the last line. The same numbers come out after a kill:
what a line still waits for is part of the checkpoint.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from jobs.train_health import History, findings, standing
from jobs.train_output import TrainOutput
from jobs.train_tensorboard import event_file
from jobs.train_trackers import Trackers
from model.config import ScheduleConfig
from pipeline.pictures import encode_png

# H W pixel rows and columns, C = 3 colours

log = logging.getLogger(__name__)
CLOCK_FIELDS = ("unix_s", "images_per_s")  # the only ones that differ from one run to the next
Figures = dict[str, float]
Row = dict[str, float | None]  # None: not finite


class Window:
    """Figures of the steps since the last training line: the global batch's, so the same on all ranks."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._rows = list(rows)

    def add(self, figures: Figures) -> None:
        self._rows.append({name: value if math.isfinite(value) else None for name, value in figures.items()})

    def rows(self) -> tuple[Row, ...]:
        return tuple(self._rows)

    def close(self) -> Row:
        """The mean over the steps; the next window begins."""
        rows, self._rows = self._rows, []
        return {name: _mean([row[name] for row in rows]) for name in rows[0]}


def _mean(values: Iterable[float | None]) -> float | None:
    """Of those that are numbers: a skipped step has no loss. Added up one after the other, so that it is the same
    however the sum was interrupted."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


class Journal:
    """metrics.jsonl, TensorBoard's events and what trackers are told; rank 0's. Lines after the step from which a run
    goes on are dropped."""

    def __init__(self, output: TrainOutput, step: int, *, events: bool, trackers: Trackers | None = None) -> None:
        output.forget_after(step)
        kept = output.read_metrics()
        self._output, self._events, self._trackers = output, events, trackers or Trackers()
        self._lines = [line for line in kept if line["step"] <= step]
        self._num_published = len(self._lines)
        if len(self._lines) < len(kept):
            output.write_metrics(self._lines)
        self._trackers.send(self._lines, {})  # they leave out what they have

    def add(self, kind: str, step: int, figures: dict[str, Any]) -> None:
        self._lines.append({"kind": kind, "step": step, **figures, "unix_s": round(time.time(), 3)})

    def close(self, *, finished: bool) -> None:
        self._trackers.close(finished=finished)

    @property
    def lines(self) -> tuple[dict[str, Any], ...]:
        return tuple(self._lines)

    def judge(self, schedules: ScheduleConfig, steps: int, codebook_size: int) -> list[str]:
        """What is wrong at the evaluation that was added last. A line is added where that is something else than
        before, also where it is nothing any more. Returns the words for what is new."""
        found = findings(History(self._lines, schedules, steps, codebook_size))
        before = {each["name"] for each in standing(self._lines)}
        if {each.name for each in found} != before:
            self.add("health", self._lines[-1]["step"], {"findings": [asdict(each) for each in found]})
        return [each.text for each in found if each.name not in before]

    def publish(self, step: int, pictures: Mapping[str, np.ndarray] | None = None) -> None:
        """Write what is new; nothing where nothing is."""
        new = self._lines[self._num_published :]
        if not new:
            return
        pngs = {name: encode_png(picture_HWC) for name, picture_HWC in (pictures or {}).items()}
        for name, png in pngs.items():
            self._output.save_picture(step, name, png)
        if self._events:
            self._output.save_events(step, event_file(new, pngs))
        self._output.write_metrics(self._lines)
        self._trackers.send(new, pngs)
        self._num_published = len(self._lines)

    def publish_beside(self, error: BaseException, step: int) -> None:
        """Before `error` ends the run: the lines that led to it."""
        try:
            self.publish(step)
        except Exception as other:  # noqa: BLE001 - said, and the first error is raised on
            log.error("the last metrics could not be written: %s (beside %s)", other, type(error).__name__)
