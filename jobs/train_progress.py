"""Between rank 0 and the driver: how far training is, what went wrong, and what is wished of the workers."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Literal, get_args

from jobs.progress import JobProgress
from pipeline.errors import PipelineError

log = logging.getLogger(__name__)
Wish = Literal["go on", "save", "leave", "stop"]
"""Of the training loop, from weak to strong: a checkpoint now; one, and then the workers end, to go on elsewhere; one,
and then training ends."""


@dataclass(frozen=True)
class Status:
    """What rank 0 says about once a second."""

    step: int
    loss: float | None = None
    images_per_s: float = 0.0
    psnr_soft: float | None = None
    psnr_hard: float | None = None
    figures: Mapping[str, float | None] = field(default_factory=dict)  # of the newest training line
    num_bad_images: int = 0
    num_workers: int = 1
    saved_step: int = 0  # of the newest whole checkpoint
    warnings: tuple[str, ...] = ()  # all of this attempt

    def __str__(self) -> str:
        parts = [] if self.loss is None else [f"loss {self.loss:.4f}"]
        parts.append(f"{self.images_per_s:.0f} images/s")
        if self.psnr_hard is not None:
            parts.append(f"PSNR {self.psnr_hard:.2f} dB")
        if self.num_bad_images:
            parts.append(f"{self.num_bad_images} bad images")
        return ", ".join(parts)


class TrainingFailed(PipelineError):
    """Training ended before its last step, and starting again by itself would only repeat it."""

    exit_code = 1

    @classmethod
    def with_code(cls, message: str, exit_code: int) -> TrainingFailed:
        error = cls(message)
        error.exit_code = exit_code
        return error


@dataclass(frozen=True)
class Notes:
    """What is pinned to the board."""

    status: Status | None = None
    losses: tuple[str, ...] = ()  # of workers, with the reason
    failure: str | None = None  # an error that another start would only repeat
    exit_code: int = 0
    stopping: bool = False
    saving: bool = False


class Board:
    """Where the workers leave notes for the driver, and the driver for them. Made an actor by train_ray.py, for
    Train's own controller is one as well and tells the driver nothing before the end."""

    def __init__(self) -> None:
        self._notes = Notes()

    def read(self) -> Notes:
        return self._notes

    def report(self, status: Status) -> Wish:
        """From rank 0; the wish holds after this step."""
        wish: Wish = "stop" if self._notes.stopping else "save" if self._notes.saving else "go on"
        self._notes = replace(self._notes, status=status, saving=False)
        return wish

    def lose(self, reason: str) -> None:
        self._notes = replace(self._notes, losses=(*self._notes.losses, reason))

    def fail(self, message: str, exit_code: int) -> None:
        self._notes = replace(self._notes, failure=message, exit_code=exit_code)

    def ask_to_stop(self) -> None:
        self._notes = replace(self._notes, stopping=True)

    def ask_to_save(self) -> Notes:
        self._notes = replace(self._notes, saving=True)
        return self._notes


def strongest(wishes: Iterable[Wish]) -> Wish:
    return max(wishes, key=get_args(Wish).index)


class StepProgress:
    """The bar (or lines in a log), from the first status on."""

    def __init__(self, steps: int) -> None:
        self._steps, self._shown = steps, 0
        self._told: set[str] = set()
        self._bar: JobProgress | None = None

    @property
    def left_s(self) -> float | None:
        """To the last step, by the pace of late; None as long as nothing is known."""
        return None if self._bar is None else self._bar.left_s

    def show(self, status: Status) -> None:
        if self._bar is None:
            self._bar, self._shown = JobProgress("steps", self._steps, status.step), status.step
            self._bar.__enter__()
        ahead, self._shown = status.step - self._shown, status.step
        move = self._bar.advance if ahead >= 0 else self._bar.skip  # back at a checkpoint: steps come once more
        move(ahead, str(status))
        for warning in status.warnings:
            if warning not in self._told:
                log.warning("%s", warning)
        self._told.update(status.warnings)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C or SIGTERM; the second one raises KeyboardInterrupt. Elsewhere than in the main thread
    signals stay as they are."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
