"""What a training driver tells of its run, as of rank 0's newest status: the workers tell nothing themselves."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from jobs.metrics import TELL_EVERY_S, Meters
from jobs.train_progress import Status, StepProgress
from jobs.waiting import Every

_OF_STEPS = {  # gauge -> figure of a training line of metrics.jsonl
    "train_loss": "loss",
    "train_learning_rate": "lr",
    "train_temperature": "temperature",
    "train_grad_norm": "grad_norm",
    "train_skipped_steps": "skipped_steps",
    "train_bad_images": "num_bad_images",
    "train_failed_shards": "num_failed_shards",
    "train_used_share": "used_share",
    "train_perplexity": "perplexity",
}


class TrainMetrics:
    """`now` is the clock, in seconds."""

    def __init__(
        self, meters: Meters, steps: int, progress: StepProgress, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._meters, self._steps, self._progress = meters, steps, progress
        self._is_due = Every(TELL_EVERY_S, now).is_due
        self._step, self._saved = Unchanged(now), Unchanged(now)

    def look(self, status: Status | None, num_lost: int) -> None:
        """As often as one likes. `num_lost`: workers so far."""
        if self._is_due():
            self.tell(status, num_lost)

    def tell(self, status: Status | None, num_lost: int) -> None:
        meters = self._meters
        meters.set("train_steps", self._steps)
        meters.set("train_lost_workers", num_lost)
        meters.set("train_silent_seconds", self._step.age_s(status and status.step))
        meters.set("train_checkpoint_age_seconds", self._saved.age_s(status and status.saved_step))
        if status is not None:
            self._tell_status(status)

    def _tell_status(self, status: Status) -> None:
        meters = self._meters
        meters.set("train_step", status.step)
        meters.set("train_left_seconds", self._progress.left_s)
        meters.set("train_images_per_second", status.images_per_s)
        meters.set("train_workers", status.num_workers)
        meters.set("train_checkpoint_step", status.saved_step)
        meters.set("train_psnr_decibels", status.psnr_soft, way="soft")
        meters.set("train_psnr_decibels", status.psnr_hard, way="hard")
        for name, figure in _OF_STEPS.items():
            meters.set(name, status.figures.get(figure))


class Unchanged:
    """How long something has been what it is."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now, self._value, self._since = now, None, now()

    def age_s(self, value: Any) -> float:
        if value != self._value:
            self._value, self._since = value, self._now()
        return self._now() - self._since
