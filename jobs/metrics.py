"""What a run tells of itself while it is at work: counters and gauges that every node of a Ray cluster exports for
Prometheus, with nothing to set up. ray.util.metrics' one door; Ray puts `ray_` before each name, and `_total` behind
that of a counter. infra/monitoring/ has what reads them.

Labels are few and from closed sets; `run`, which all have, is the output's name and a short hash. A figure is no part
of the run: one that cannot be told ends nothing, and is said once.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ray.util import metrics as ray_metrics

from pipeline import storage

log = logging.getLogger(__name__)
TELL_EVERY_S = 2.0
NAME_CHARACTERS = 40  # of an output's last name, in a label
SHARD_SECONDS = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0)


@dataclass(frozen=True)
class Metric:
    """`labels` beside `run`. A counter only grows and begins at 0 with each driver; a gauge is as of now, and is gone
    soon after its driver is."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    what: str
    labels: tuple[str, ...] = ()


def _named(metrics: Iterable[Metric]) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}


METRICS = _named((
    # dvae tokenize: the driver's, as of what it has recorded
    Metric("tokenize_images", "counter", "images that got their tokens"),
    Metric("tokenize_failed_images", "counter", "images that got a row of errors", ("reason",)),
    Metric("tokenize_input_bytes", "counter", "bytes of the shards that were tokenised"),
    Metric("tokenize_output_bytes", "counter", "bytes of their parts"),
    Metric("tokenize_ended_shards", "counter", "shards that came to an end: done or quarantined", ("state",)),
    Metric("tokenize_failed_attempts", "counter", "attempts at a shard that came to nothing", ("reason",)),
    Metric("tokenize_lost_actors", "counter", "actors that were replaced", ("reason",)),
    Metric("tokenize_stage_seconds", "counter", "seconds that open shards spent in each stage", ("stage",)),
    Metric("tokenize_encoder_busy_seconds", "counter", "seconds in which an actor's encoder had work, of all actors"),
    Metric("tokenize_open_seconds", "counter", "seconds in which an actor had a shard open, of all actors"),
    Metric("tokenize_shard_seconds", "histogram", "seconds from a shard's opening to its part"),
    Metric("tokenize_shards", "gauge", "shards of the plan: done, quarantined, waiting, in_flight", ("state",)),
    Metric("tokenize_actors", "gauge", "places for actors: ready, starting, away (out of reach), empty", ("state",)),
    Metric("tokenize_failed_share", "gauge", "failed images to all images, which max_failed_samples bounds"),
    Metric("tokenize_left_seconds", "gauge", "seconds to the end, by the pace of late"),
    Metric("tokenize_silent_seconds", "gauge", "seconds since a shard came to an end, or since the start"),
    Metric("tokenize_unwritten_rows", "gauge", "rows that the ledger does not have yet"),
    # in each actor: not the account, for a shard that is tried again counts again
    Metric("tokenize_decoded_images", "counter", "images that came to an actor's encoder"),
    # dvae train: the driver's, as rank 0 says
    Metric("train_step", "gauge", "steps done"),
    Metric("train_steps", "gauge", "steps to do in all"),
    Metric("train_silent_seconds", "gauge", "seconds since the step changed, or since the start"),
    Metric("train_left_seconds", "gauge", "seconds to the last step, by the pace of late"),
    Metric("train_images_per_second", "gauge", "images that all workers take a second"),
    Metric("train_workers", "gauge", "workers that take part"),
    Metric("train_lost_workers", "gauge", "workers that were lost so far"),
    Metric("train_checkpoint_step", "gauge", "step of the newest whole checkpoint"),
    Metric("train_checkpoint_age_seconds", "gauge", "seconds since it was published, or since the start"),
    Metric("train_loss", "gauge", "of the newest training line, the mean over its steps"),
    Metric("train_learning_rate", "gauge", "as above"),
    Metric("train_temperature", "gauge", "as above"),
    Metric("train_grad_norm", "gauge", "as above, before clipping"),
    Metric("train_skipped_steps", "gauge", "steps that were skipped for NaN or Inf, since step 0"),
    Metric("train_bad_images", "gauge", "images that could not be used, since step 0"),
    Metric("train_failed_shards", "gauge", "shards that could not be read, since step 0"),
    Metric("train_used_share", "gauge", "codes in use to all codes, over the images of the newest training line"),
    Metric("train_perplexity", "gauge", "of the codes, as above"),
    Metric("train_psnr_decibels", "gauge", "of held-out images, relaxed (soft) and from tokens (hard)", ("way",)),
))  # fmt: skip


def run_label(output_url: str) -> str:
    """What a run is called: the last name of its output, without credentials, and a hash of the whole: the same for
    every spelling, and the same as in its job's name (submit.py)."""
    public = storage.public_url(storage.normalize(output_url))
    name = storage.base_name(public)[:NAME_CHARACTERS] or "output"  # of a whole bucket
    return f"{name}-{hashlib.sha256(public.encode()).hexdigest()[:8]}"


class Meters(Protocol):
    """Where figures go. Names are those of METRICS."""

    def add(self, name: str, amount: float, **labels: str) -> None:
        """To a counter."""

    def set(self, name: str, value: float | None, **labels: str) -> None:
        """A gauge; None leaves it as it was."""

    def observe(self, name: str, value: float) -> None:
        """One more for a histogram."""


class RayMeters:
    """Of one run, in a process that is connected to Ray. For any thread."""

    def __init__(self, output_url: str) -> None:
        self._run, self._has_failed = run_label(output_url), False
        self._made: dict[str, Any] = {}

    def add(self, name: str, amount: float, **labels: str) -> None:
        if amount > 0:
            self._tell(name, "inc", amount, labels)

    def set(self, name: str, value: float | None, **labels: str) -> None:
        if value is not None and math.isfinite(value):
            self._tell(name, "set", value, labels)

    def observe(self, name: str, value: float) -> None:
        self._tell(name, "observe", value, {})

    def _tell(self, name: str, verb: str, value: float, labels: dict[str, str]) -> None:
        if self._has_failed:
            return
        try:
            meter = self._made.get(name) or self._make(name)
            getattr(meter, verb)(value, tags={"run": self._run, **labels})
        except Exception as error:  # noqa: BLE001 - whatever it is, the run is worth more than its figures
            self._has_failed = True
            log.warning("no more figures for Prometheus from this process: %s: %s", type(error).__name__, error)

    def _make(self, name: str) -> Any:
        metric = METRICS[name]
        keys, full = ("run", *metric.labels), f"dvae_{name}"
        if metric.kind == "histogram":
            made = ray_metrics.Histogram(full, metric.what, list(SHARD_SECONDS), keys)
        else:
            made = {"counter": ray_metrics.Counter, "gauge": ray_metrics.Gauge}[metric.kind](full, metric.what, keys)
        self._made[name] = made
        return made
