"""Where the figures of a run go beside its own output: Weights & Biases, MLflow, each behind one small protocol.

A tracker is told things on a thread of its own and can neither hold training up nor end it: at its first failure
it is dropped with one warning. What it has already, from before a kill, it isn't sent again.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from jobs.train_config import LogConfig
from pipeline import storage
from pipeline.errors import PipelineError
from pipeline.urls import public_text

log = logging.getLogger(__name__)
Line = Mapping[str, Any]  # of metrics.jsonl
CLOSE_WAIT_S = 10.0  # for what is still on its way, of all trackers together
MAX_WAITING = 256  # publications; a tracker so far behind is dropped
SECRETS = ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")  # in the environment
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}  # setting of `log` -> module


class TrackerMissing(PipelineError):
    """A tracker is configured, and its package isn't there."""


class NowhereToKeep(PipelineError):
    """A tracker would keep its files where nobody finds them."""


class Tracker(Protocol):
    """Made, called and closed on one thread. May raise anything."""

    def send(self, lines: Sequence[Line], pictures: Mapping[str, bytes]) -> None:
        """Lines of metrics.jsonl, and PNGs by name that belong to the last one's step."""

    def close(self, *, finished: bool) -> None: ...


@dataclass(frozen=True)
class RunFacts:
    """What a tracker is told of the run; nothing in it is secret. `run_id` is the same after a resume."""

    run_id: str
    name: str
    settings: Mapping[str, Any]
    folder: str  # local, for what a tracker keeps


def run_facts(output_url: str, run_id: str, settings: Mapping[str, Any]) -> RunFacts:
    folder = output_url if storage.is_local(output_url) else tempfile.mkdtemp(prefix="dvae-trackers-")
    return RunFacts(run_id, storage.base_name(output_url), settings, folder)


def check_trackers(config: LogConfig, output_url: str) -> None:
    """Raises TrackerMissing or NowhereToKeep, before anything starts."""
    for setting, module in PACKAGES.items():
        if getattr(config, setting) is not None and importlib.util.find_spec(module) is None:
            raise TrackerMissing(
                f"log.{setting} is set, but {module} is not installed: pip install 'dvae-ray[{setting}]', "
                f"or leave log.{setting} out"
            )
    if config.wandb is not None and config.wandb.mode == "offline" and not storage.is_local(output_url):
        raise NowhereToKeep(
            f"log.wandb.mode=offline keeps its files in the output, which must be a path for that, not {output_url}; "
            "use mode=online, or leave log.wandb out: metrics.jsonl has every figure"
        )


def open_trackers(config: LogConfig, facts: Callable[[], RunFacts]) -> Trackers:
    """Those that are configured; `facts` is asked where there is one."""
    makers = {"wandb": _wandb, "mlflow": _mlflow}
    wanted = [name for name in makers if getattr(config, name) is not None]
    if not wanted:
        return Trackers()
    known = facts()
    return Trackers([_Background(name, partial(makers[name], config, known)) for name in wanted])


def _wandb(config: LogConfig, facts: RunFacts) -> Tracker:
    from jobs.train_wandb import WandbTracker

    assert config.wandb is not None
    return WandbTracker(config.wandb, facts)


def _mlflow(config: LogConfig, facts: RunFacts) -> Tracker:
    from jobs.train_mlflow import MlflowTracker

    assert config.mlflow is not None
    return MlflowTracker(config.mlflow, facts)


class Trackers:
    """All of a run's."""

    def __init__(self, each: Sequence[_Background] = ()) -> None:
        self._each = each

    def send(self, lines: Sequence[Line], pictures: Mapping[str, bytes]) -> None:
        """Returns at once."""
        for one in self._each:
            one.put(_Publication(tuple(lines), dict(pictures)))

    def close(self, *, finished: bool) -> None:
        for one in self._each:
            one.put(_Close(finished))
        deadline = time.monotonic() + CLOSE_WAIT_S
        for one in self._each:
            one.wait(max(0.0, deadline - time.monotonic()))


@dataclass(frozen=True)
class _Publication:
    lines: tuple[Line, ...]
    pictures: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class _Close:
    finished: bool


class _Background:
    """One tracker and its thread, which does not keep the process alive."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self._name, self._make = name, make
        self._waiting: queue.Queue[_Publication | _Close] = queue.Queue(MAX_WAITING)
        self._dropped = self._is_behind = False
        self._thread = threading.Thread(target=self._run, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, thing: _Publication | _Close) -> None:
        if self._dropped:
            return
        try:
            self._waiting.put_nowait(thing)
        except queue.Full:
            self._is_behind = True
            self._drop(f"it is {MAX_WAITING} publications behind")

    def wait(self, timeout_s: float) -> None:
        self._thread.join(0.0 if self._is_behind else timeout_s)
        if self._thread.is_alive() and not self._dropped:
            self._drop(f"it did not take its last figures within {timeout_s:g} s")

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:  # noqa: BLE001 - whatever a tracker's client raises, training goes on
            self._drop(f"{type(error).__name__}: {_first_line(error)}")

    def _serve(self) -> None:
        tracker = self._make()
        while not self._dropped:
            match self._waiting.get():
                case _Publication(lines, pictures):
                    tracker.send(lines, pictures)
                case _Close(finished):
                    return tracker.close(finished=finished)

    def _drop(self, reason: str) -> None:
        self._dropped = True
        log.warning(
            "log.%s: %s; it gets nothing more of this attempt. metrics.jsonl has every figure", self._name, reason
        )


def _first_line(error: Exception) -> str:
    """Without URLs' credentials and without what stands in the environment as a secret."""
    text = public_text((str(error).strip().splitlines() or [""])[0][:300])
    for value in filter(None, map(os.environ.get, SECRETS)):
        text = text.replace(value, "…")
    return text


def newer(lines: Sequence[Line], step: int) -> list[Line]:
    """Those after `step`: a resumed run makes again, bit for bit, what came after its checkpoint."""
    return [line for line in lines if line["step"] > step]
