"""Training in processes of its own, which kill themselves with SIGKILL where they are told: at a step, or in the middle
of writing a checkpoint. They are forked from a server that has imported torch once, so that they start in no time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

from make_training import settings
from pipeline import local_disk

OTHERS_END_S = 20.0  # once a rank is dead
END_S = 120.0


@dataclass(frozen=True)
class Kill:
    """As this step begins, or when so many files of checkpoints are written and the next is about to be put in its
    place; of the process with this rank."""

    step: int | None = None
    num_files: int | None = None
    rank: int = 0

    def arm(self, rank: int) -> None:
        if rank == self.rank:
            if self.step is not None:
                _die_at_step(self.step)
            if self.num_files is not None:
                _die_at_file(self.num_files)


def run_alone(folder: Path, output: Path, kill: Kill | None = None, **changes: Any) -> int:
    """`dvae train` with ray.num_workers=0. Its exit code: −9 where it was killed."""
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings(folder, output=str(output), **changes)))
    return _ended([_started(_command, str(path), kill)])[0]


def run_two(folder: Path, output: Path, kill: Kill | None = None, **changes: Any) -> list[int]:
    return run_ranks(2, folder, output, kill, **changes)


def run_ranks(number: int, folder: Path, output: Path, kill: Kill | None = None, **changes: Any) -> list[int]:
    """The training loop on so many ranks over Gloo, as under Ray Train. Their exit codes."""
    given = settings(folder, output=str(output), ray={"num_workers": number}, **changes)
    store = output.with_suffix(".store")
    store.unlink(missing_ok=True)
    return _ended([_started(_rank, given, str(store), rank, kill) for rank in range(number)])


def _started(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jobs.cli", "jobs.train_dvae", "jobs.train_worker"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def _ended(processes: list[BaseProcess]) -> list[int]:
    """Those that wait for a dead one are killed after a while, as Ray Train does."""
    limit_s = END_S
    for process in processes:
        process.join(limit_s)
        limit_s = OTHERS_END_S
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode or 0 for process in processes]


def _command(path: str, kill: Kill | None) -> None:
    from jobs.cli import main

    if kill is not None:
        kill.arm(0)
    sys.argv = ["dvae", "train", path]
    main()


def _rank(given: dict[str, Any], store: str, rank: int, kill: Kill | None) -> None:
    from torch import distributed

    from jobs.train_config import TrainConfig
    from jobs.train_dvae import _shards
    from jobs.train_ranks import Ranks
    from jobs.train_worker import TrainJob, train

    if kill is not None:
        kill.arm(rank)
    config = TrainConfig.model_validate(given)
    size = config.ray.fewest_workers
    distributed.init_process_group("gloo", store=distributed.FileStore(store, size), rank=rank, world_size=size)
    job = TrainJob(config, *map(tuple, _shards(config)))
    assert train(job, Ranks.join(use_gpu=False, threads=1), _Silent()) == "finished"


class _Silent:
    """A driver that lets training run."""

    def report(self, status: object) -> str:
        return "go on"

    def must_leave(self) -> bool:
        return False


def _die_at_step(step: int) -> None:
    from model.trainer import Trainer

    train_step = Trainer.train_step

    def dies(self: Trainer, *arguments: Any) -> dict[str, float]:
        if self.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(self, *arguments)

    Trainer.train_step = dies  # type: ignore[method-assign]


def _die_at_file(num_files: int) -> None:
    """What is about to be put in its place lies beside it as a temporary file, whole."""
    finish, num_written = os.replace, 0

    def dies(temporary: Path, path: Path) -> None:
        nonlocal num_written
        if path.parent.parent.name == "checkpoints":
            if num_written == num_files:
                os.kill(os.getpid(), signal.SIGKILL)
            num_written += 1
        finish(temporary, path)

    local_disk.os = _Os(dies)  # type: ignore[assignment]


class _Os:
    """The module, with another `replace`, for one file alone."""

    def __init__(self, replace: Callable[[Path, Path], None]) -> None:
        self.replace = replace

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)
