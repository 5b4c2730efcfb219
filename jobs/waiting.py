"""What goes by the clock: what is done now and then only, and how long is waited for an actor."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TypeVar

from jobs.cluster import ClusterError, HeadGone
from jobs.pool_settings import PoolSettings

log = logging.getLogger(__name__)
T = TypeVar("T")
SAY_EVERY_S = 10.0
# Whoever cannot reach the head for so long is ended by Ray, without a word to the program; this is its own setting.
RAY_ENDS_AFTER_S = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60"))  # noqa: SIM112
HEAD_PATIENCE_S = RAY_ENDS_AFTER_S / 2  # the rest is for an orderly end


class Every:
    """`is_due` at most once in so many seconds. `now` is the clock."""

    def __init__(self, seconds: float, now: Callable[[], float]) -> None:
        self._seconds, self._now, self._last = seconds, now, now()

    def is_due(self) -> bool:
        now = self._now()
        due = now - self._last >= self._seconds
        if due:
            self._last = now
        return due


class Head:
    """Whether the cluster's head answers: what is asked of it in vain takes a minute, and then the program with it.
    `now` is the clock, in seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._silent_since: float | None = None  # when the first question was asked that it has not answered

    def ask(self, question: Callable[[], T | None]) -> T | None:
        """Its answer; None where there is none. Raises HeadGone when there has been none for too long. (How long
        nobody asked says nothing of the head: whoever asks may have been held up.)"""
        asked, answer = self._now(), question()
        if answer is not None:
            self._silent_since = None
            return answer
        self._silent_since = asked if self._silent_since is None else self._silent_since
        if (silent_s := self._now() - self._silent_since) > HEAD_PATIENCE_S:
            raise HeadGone(
                f"the cluster's head has not answered for {silent_s:.0f} s; once there is one again, the same command "
                "goes on from here"
            )
        return None


class Waiting:
    """Says what is waited for while no actor is there, and gives up after a stated time. `now` is the clock, in
    seconds; `resources` says what the cluster has."""

    def __init__(self, settings: PoolSettings, now: Callable[[], float], resources: Callable[[], str]) -> None:
        self._settings, self._now, self._resources = settings, now, resources
        self._said = now()
        self._since = self._said - settings.waited_s

    def check(self, any_ready: bool, last_loss: str) -> None:
        """Raises ClusterError when no actor was ready for longer than ray.wait_s, also saying what the last one was
        lost to."""
        now, wait_s = self._now(), self._settings.wait_s
        if any_ready:
            self._since = now
        elif now - self._since > wait_s:
            raise ClusterError(
                f"no actor could start within {wait_s:.0f} s (ray.wait_s): asked for {self._wanted()}; the cluster has "
                f"{self._resources()}; add nodes, or lower ray.gpus_per_actor or ray.cpus_per_actor"
                + (f" (the last actor: {last_loss})" if last_loss else "")
            )
        elif now - self._said > SAY_EVERY_S:
            self._said = now
            log.warning("waiting for %s; the cluster has %s", self._wanted(), self._resources())

    def _wanted(self) -> str:
        gpus = f" and {self._settings.gpus_per_actor:g} GPU" if self._settings.gpus_per_actor else ""
        return f"{self._settings.num_actors} actors of {self._settings.cpus_per_actor:g} CPU{gpus}"
