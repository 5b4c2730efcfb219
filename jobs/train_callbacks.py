"""What Ray Train calls of ours: a loss is told, an elastic group counts its room and has a checkpoint before a resize,
a machine's notice is heard.

A worker learns that it must leave from SIGTERM, or from Ray, which knows of a spot machine's notice and of an
autoscaler's wish (the node is *draining*). Nothing here stops a step: the training loop asks at its next beat.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerCallback
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.api.callback import UserCallback

from jobs.cluster import draining_nodes, this_node
from jobs.train_progress import Notes

log = logging.getLogger(__name__)
SAVE_WAIT_S = 60.0  # for a checkpoint, before a group is resized without
POLL_S = 0.2
LOOK_EVERY_S = 2.0
LEAVING = threading.Event()  # this process, a worker, must leave its machine


class TellOfLosses(UserCallback):  # type: ignore[misc]  # Ray has no types here
    """Runs in Train's controller."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for rank, error in worker_exceptions.items():
            self._board.lose.remote(f"the worker of rank {rank} was lost ({first_line(error)})")


class SaveBeforeResize(ControllerCallback):  # type: ignore[misc]
    """Runs in Train's controller, which would end the workers of an elastic group as they are."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if type(current_state).__name__ != "ResizingState":  # the workers still run then
            return
        try:
            _save_now(self._board)
        except RayError as error:  # raised on, it would end the run
            log.warning("no checkpoint before the group is resized: %s", error)


def _save_now(board: Any) -> None:
    """Returns when a checkpoint of at least the step now reported is whole, or after a while."""
    asked: Notes = ray.get(board.ask_to_save.remote())
    give_up_at = time.monotonic() + SAVE_WAIT_S
    while asked.status is not None and time.monotonic() < give_up_at:
        now: Notes = ray.get(board.read.remote())
        if now.status is not None and now.status.saved_step >= asked.status.step:
            return
        time.sleep(POLL_S)


class Staying(ElasticScalingPolicy):  # type: ignore[misc]
    """Counts no room on nodes that are about to go, or have just gone: Train does, and then waits a minute for workers
    that Ray places nowhere."""

    def _count_possible_workers(self, reserved_resources: dict[str, Any]) -> int:
        there = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - (draining_nodes() or frozenset())
        stays = {node: resources for node, resources in reserved_resources.items() if node in there}
        return int(super()._count_possible_workers(stays))


class ElasticTrainer(TorchTrainer):  # type: ignore[misc]
    """With our way of counting, for which Train has no setting."""

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        return super()._initialize_and_run_controller(**{**arguments, "scaling_policy": Staying(self.scaling_config)})


class HearNotice(WorkerCallback):  # type: ignore[misc]
    """Runs in each worker's main thread, the only one to which signals come; training runs in another."""

    def after_init_train_context(self) -> None:
        signal.signal(signal.SIGTERM, _leave)
        threading.Thread(target=_watch_node, name="notice", daemon=True).start()


def _leave(number: int, frame: FrameType | None) -> None:
    LEAVING.set()


def _watch_node() -> None:
    here = this_node()
    while not LEAVING.wait(LOOK_EVERY_S):
        if here in (draining_nodes() or ()):
            LEAVING.set()


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
