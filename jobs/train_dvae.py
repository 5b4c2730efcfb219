"""`dvae train`, the driver's side: check, find what is left to do, run it here or on Ray, say how it ended."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from jobs.leaving import signals_later
from jobs.train_config import TrainConfig
from jobs.train_health import standing
from jobs.train_output import TrainOutput, check, claim, identity
from jobs.train_progress import Status, StepProgress, TrainingFailed, Wish, stop_signals
from jobs.train_trackers import check_trackers
from pipeline import storage
from pipeline.errors import PipelineError, StorageError
from pipeline.lease import Lease
from pipeline.output import OutputPrefix
from pipeline.records import ObjectInfo
from pipeline.shard_patterns import expand

if TYPE_CHECKING:
    from jobs.train_worker import Ending, TrainJob

log = logging.getLogger(__name__)
FINISHED, STOPPED = 0, 130  # exit codes; an error brings its own


class TrainedOnHeldOut(PipelineError):
    """A shard is in both lists."""


class StepsPassed(PipelineError):
    """The output is further than training is to go."""


def run_training(config: TrainConfig, command: str) -> int:
    """Train until config.steps, from wherever the output is. The exit code; `command` is the line to run again.
    Raises PipelineError (with an exit code of its own) and ModelError."""
    output = TrainOutput(storage.normalize(config.output))
    config = config.model_copy(update={"output": output.url})  # workers have another working directory
    check_trackers(config.log, output.url)
    train, val = _shards(config)
    mine = identity(config, train, val)
    check(output, mine)
    console = Console(soft_wrap=True, highlight=False)
    done = output.finished_step()
    if done is not None and done >= config.steps:
        console.print(f"nothing to do: all {done} steps are done; the model is in {escape(output.model_folder())}")
        return FINISHED
    _refuse_to_go_back(output, config.steps)
    _announce(config, train, val)
    try:
        with Lease(OutputPrefix(output.url)) as lease:
            claim(output, mine)
            storage.remove_temporaries(output.url)
            ending = _train(config, train, val, partial(_check, lease))
    except KeyboardInterrupt:
        ending = "stopped"
    if ending == "stopped":
        console.print(f"[yellow]stopped[/]; go on with\n  {escape(command)}")
        return STOPPED
    console.print(
        f"[green]done[/]: {config.steps} steps{_quality(output)}; the model is in {escape(output.model_folder())}"
    )
    _say_what_is_wrong(output, console)
    return FINISHED


def _refuse_to_go_back(output: TrainOutput, steps: int) -> None:
    newest = output.newest_step()
    if newest > steps:
        raise StepsPassed(
            f"{output.url} has a checkpoint of step {newest:,} already, and steps={steps:,}: raise steps, choose "
            f"another output, or use that checkpoint as it is (`dvae tokenize … checkpoint={output.url}`)"
        )


def _announce(config: TrainConfig, train: list[ObjectInfo], val: list[ObjectInfo]) -> None:
    num_bytes = sum(shard.size_bytes for shard in train)
    streams = math.ceil(config.data.num_streams / max(1, config.ray.fewest_workers))
    waiting_bytes = 2 * streams * config.data.shuffle_shards * num_bytes // len(train)
    log.info(
        "training on %d shards (%.2f GB), %d held out; undecoded images of up to %.2f GB wait in each worker",
        len(train), num_bytes / 1e9, len(val), waiting_bytes / 1e9,
    )  # fmt: skip


def _quality(output: TrainOutput) -> str:
    evaluations = [line for line in output.read_metrics() if line["kind"] == "eval"]
    if not evaluations:
        return ""
    hard, soft, used = (evaluations[-1][name] for name in ("psnr_hard", "psnr_soft", "used_share"))
    return f", held-out PSNR {hard:.2f} dB from tokens ({soft:.2f} relaxed), {used:.0%} of the codes in use"


def _say_what_is_wrong(output: TrainOutput, console: Console) -> None:
    """As of the last evaluation."""
    for finding in standing(output.read_metrics()):
        console.print(f"[yellow]warning[/]: {escape(finding['text'])}")


def _shards(config: TrainConfig) -> tuple[list[ObjectInfo], list[ObjectInfo]]:
    train, val = expand(config.data.train_shards), expand(config.data.val_shards)
    if both := {shard.url for shard in train} & {shard.url for shard in val}:
        raise TrainedOnHeldOut(
            f"{min(both)} is in data.train_shards and in data.val_shards: train on it or hold it out"
        )
    return train, val


def _check(lease: Lease) -> None:
    """Raises RunHeld once another driver has the output. A store that is away is no reason to end: what is saved asks
    it again, and the lease says so itself."""
    with suppress(StorageError):
        lease.check()


def _train(config: TrainConfig, train: list[ObjectInfo], val: list[ObjectInfo], check: Callable[[], None]) -> Ending:
    with signals_later():  # torch and Ray are imported only where there is work
        from jobs.train_worker import TrainJob

        if config.ray.num_workers != 0:
            from jobs.train_ray import train_on_ray
    job = TrainJob(config, tuple(train), tuple(val))
    try:
        if config.ray.num_workers == 0:
            return _train_here(job, check)
        return train_on_ray(job, check)
    except StorageError as error:
        raise TrainingFailed(f"{error}; the same command goes on from the newest checkpoint") from error


def _train_here(job: TrainJob, check: Callable[[], None]) -> Ending:
    """The same loop, in this process."""
    from jobs.train_ranks import Ranks
    from jobs.train_worker import train

    ranks = Ranks.join(use_gpu=job.config.ray.use_gpu, threads=job.config.threads)
    with closing(StepProgress(job.config.steps)) as progress, stop_signals() as stop:
        return train(job, ranks, HereDriver(progress, stop, check))


@dataclass(frozen=True)
class HereDriver:
    """The driver, as the loop in its own process sees it."""

    progress: StepProgress
    stop: threading.Event
    check: Callable[[], None]

    def report(self, status: Status) -> Wish:
        self.check()
        self.progress.show(status)
        return "stop" if self.stop.is_set() else "go on"

    def must_leave(self) -> bool:
        return False
