"""The training loop on Ray Train: enough resources, workers, restarts after a loss, and what the driver sees of it.

Checkpoints do not pass through Ray Train: rank 0 publishes them under the output URL, and a restarted worker group
goes on from the newest one. So Train's own storage, which would have to be shared between machines once a checkpoint
is reported to it, holds one empty marker file, and is a temporary folder of the driver's machine (where the
controller is placed too).
"""

from __future__ import annotations

import logging
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import ray
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import WorkerGroupError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.cluster import SWITCH_INTERVAL_S, ClusterError, connected, describe_resources
from jobs.metrics import RayMeters
from jobs.metrics_train import TrainMetrics
from jobs.train_callbacks import LEAVING, ElasticTrainer, HearNotice, SaveBeforeResize, TellOfLosses, first_line
from jobs.train_config import RayConfig, TrainConfig
from jobs.train_progress import Board, Notes, Status, StepProgress, TrainingFailed, Wish, stop_signals
from jobs.train_ranks import Ranks
from jobs.train_worker import Ending, TrainJob, train
from model.config import ModelError
from pipeline import storage
from pipeline.errors import PipelineError, StorageError

log = logging.getLogger(__name__)
POLL_S = 0.5
SAY_EVERY_S = 60.0
OWN_CLUSTER_WAIT_S = 5.0  # one of this machine alone cannot grow
STOP_GRACE_S = 600.0  # for the step under way and its checkpoint on a slow store; asked twice, nobody waits


def train_on_ray(job: TrainJob, check: Callable[[], None]) -> Ending:
    """`check` is called all the while, and may raise. Raises TrainingFailed, ClusterError; KeyboardInterrupt at a
    second signal."""
    settings = job.config.ray
    ours = not (ray.is_initialized() or settings.address or os.environ.get("RAY_ADDRESS"))
    wait_s = min(settings.wait_s, OWN_CLUSTER_WAIT_S) if ours else settings.wait_s
    with connected(settings.address), stop_signals() as stop, Watch(job.config, check) as watch:
        _warn_of_a_local_output(job.config.output)
        while _resources_there(settings, wait_s, watch, stop):
            if (ending := _one_group(job, watch, stop)) != "left":
                return ending
            log.warning("the workers left a machine that is about to go, after a checkpoint; going on elsewhere")
            wait_s = math.inf
        return "stopped"


def _one_group(job: TrainJob, watch: Watch, stop: threading.Event) -> Ending:
    """Workers that Train starts again when one is lost, or when there is room for another number of them."""
    with tempfile.TemporaryDirectory(prefix="dvae-train-") as folder:
        ending = _in_thread(_trainer(job, watch.board, folder))
        return _result(ending, watch.board) if watch.until(ending, stop) else "stopped"


class Watch:
    """The driver's look at the board."""

    def __init__(self, config: TrainConfig, check: Callable[[], None]) -> None:
        self._check = check
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
        self._shown, self._num_losses, self._num_workers = StepProgress(config.steps), 0, 0
        self._metrics = TrainMetrics(RayMeters(config.output), config.steps, self._shown)
        self._started = False

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._shown.close()
        ray.kill(self.board)  # workers that still run end at their next report

    def until(self, ending: Future[Any], stop: threading.Event) -> bool:
        """Show progress until training ends. False: it was to stop, and would not within the grace."""
        while not ending.done() and not stop.wait(POLL_S):
            self.look()
        if stop.is_set() and self._started:
            log.warning("stopping: a checkpoint is saved first (once more to stop at once)")
            self.board.ask_to_stop.remote()
            wait([ending], timeout=STOP_GRACE_S)
        self._metrics.tell(*self._look())
        return ending.done()

    def look(self) -> None:
        """As often as one likes. Raises what `check` raises."""
        self._check()
        self._metrics.look(*self._look())

    def _look(self) -> tuple[Status | None, int]:
        """The newest status, and how many workers were lost."""
        notes: Notes = ray.get(self.board.read.remote())
        for loss in notes.losses[self._num_losses :] if notes.failure is None else ():
            log.warning("%s; training goes on from the newest checkpoint, as often as ray.max_failures allows", loss)
        self._num_losses = len(notes.losses)
        if notes.status is not None:
            if notes.status.num_workers != self._num_workers:
                self._num_workers = notes.status.num_workers
                log.info("training with %d workers from step %d on", self._num_workers, notes.status.step)
            self._started = True
            self._shown.show(notes.status)
        return notes.status, self._num_losses


@dataclass(frozen=True)
class RemoteDriver:
    """The board, as the training loop sees it."""

    board: Any

    def report(self, status: Status) -> Wish:
        wish: Wish = ray.get(self.board.report.remote(status))
        return wish

    def must_leave(self) -> bool:
        return LEAVING.is_set()


def _trainer(job: TrainJob, board: Any, folder: str) -> TorchTrainer:
    settings = job.config.ray
    kind = TorchTrainer if isinstance(settings.num_workers, int) else ElasticTrainer
    return kind(
        _work,
        train_loop_config={"job": job, "board": board},
        scaling_config=ScalingConfig(
            num_workers=settings.num_workers,
            use_gpu=settings.use_gpu,
            resources_per_worker=_bundle(settings),
            elastic_resize_monitor_interval_s=settings.resize_every_s,
        ),
        run_config=RunConfig(
            name="train",
            storage_path=folder,
            failure_config=FailureConfig(max_failures=settings.max_failures),
            callbacks=[TellOfLosses(board), SaveBeforeResize(board), HearNotice()],
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _work(arguments: dict[str, Any]) -> Ending | None:
    """One worker, from its start to its end or loss."""
    job, board = arguments["job"], arguments["board"]
    if ray.get(board.read.remote()).failure is not None:
        return None  # Train started the workers again; there is nothing to gain
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        ranks = Ranks.join(use_gpu=job.config.ray.use_gpu, threads=job.config.threads)
        return train(job, ranks, RemoteDriver(board))
    except StorageError:
        raise  # the store may answer again
    except (PipelineError, ModelError) as error:
        ray.get(board.fail.remote(str(error), getattr(error, "exit_code", 2)))
        raise


def _result(ending: Future[Any], board: Any) -> Ending:
    notes: Notes = ray.get(board.read.remote())
    if notes.failure is not None:
        raise TrainingFailed.with_code(notes.failure, notes.exit_code)
    if (error := ending.exception()) is not None:
        log.error("%s", error)  # with the workers' tracebacks
        raise TrainingFailed(f"{_cause(error)}; the same command goes on from the newest checkpoint") from error
    last: Ending = ending.result().return_value
    return last


def _in_thread(trainer: TorchTrainer) -> Future[Any]:
    """`fit` beside the main thread, which signals belong to; the thread does not keep the process alive."""
    future: Future[Any] = Future()

    def fit() -> None:
        try:
            future.set_result(trainer.fit())
        except BaseException as error:  # noqa: BLE001 - it is raised again where the future is asked
            future.set_exception(error)

    threading.Thread(target=fit, name="ray-train", daemon=True).start()
    return future


def _bundle(settings: RayConfig) -> dict[str, float]:
    gpus = {"GPU": settings.gpus_per_worker} if settings.use_gpu else {}
    return {"CPU": settings.cpus_per_worker, **gpus}


def _resources_there(settings: RayConfig, wait_s: float, watch: Watch, stop: threading.Event) -> bool:
    """Wait for room for the workers, the fewest that will do (asking for it, so that a cluster that can grow does),
    and look on all the while. False: it was to stop. Raises ClusterError."""
    wanted = f"{settings.fewest_workers} workers with {_bundle(settings)} each"
    group = placement_group([_bundle(settings)] * settings.fewest_workers)
    give_up_at, say_at = time.monotonic() + wait_s, time.monotonic()
    try:
        while not group.wait(timeout_seconds=1):
            if stop.is_set():
                return False
            if time.monotonic() >= give_up_at:
                raise ClusterError(
                    f"no room for {wanted} within {wait_s:g} s (ray.wait_s): {describe_resources()}; "
                    "lower ray.num_workers, ray.gpus_per_worker or ray.cpus_per_worker, set ray.use_gpu=false, or add "
                    "machines to the cluster; configs/demo_train.yaml is a recipe for a laptop"
                )
            if time.monotonic() >= say_at:
                say_at = time.monotonic() + SAY_EVERY_S
                patience = f"up to {wait_s:g} s " if math.isfinite(wait_s) else ""
                log.warning("waiting %sfor %s: %s", patience, wanted, describe_resources())
            watch.look()
    finally:
        remove_placement_group(group)
    return True


def _warn_of_a_local_output(url: str) -> None:
    if storage.is_local(url) and len(ray.nodes()) > 1:
        log.warning("%s is a path: it must be the same folder on every machine of the cluster", url)


def _cause(error: BaseException) -> str:
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        rank, failure = min(error.worker_failures.items())
        return f"training failed once more than ray.max_failures allows; rank {rank}: {first_line(failure)}"
    return f"Ray Train failed: {first_line(error)}"
