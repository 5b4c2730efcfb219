"""Where the demo's data lies and its jobs run: here, on the disk and a Ray of each job's own, or on a cluster of this
machine with object storage. Both run the very jobs of `dvae train` and `dvae tokenize`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from jobs.config import Section, load_config
from jobs.local_servers import RayHead, S3Server
from jobs.tokenize_config import TokenizeConfig
from jobs.tokenize_dataset import run_tokenize
from jobs.train_config import TrainConfig
from jobs.train_dvae import run_training
from pipeline import storage
from pipeline.errors import PipelineError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TRAIN, TOKENIZE = "demo_train.yaml", "demo_tokenize.yaml"
CLUSTER_CPUS = 4  # logical ones: the demo's two workers or actors and Ray's own, also on two cores
BUCKET = "demo"
Settings = TypeVar("Settings", bound=Section)


class Site(Protocol):
    """`shards`, `training` and `tokenised` are URLs."""

    @property
    def shards(self) -> str: ...

    @property
    def training(self) -> str: ...

    @property
    def tokenised(self) -> str: ...

    def train(self) -> int:
        """The job's exit code."""

    def tokenize(self) -> int:
        """The job's exit code."""


@dataclass(frozen=True)
class _Places:
    root: str

    @property
    def shards(self) -> str:
        return storage.join(self.root, "shards")

    @property
    def training(self) -> str:
        return storage.join(self.root, "training")

    @property
    def tokenised(self) -> str:
        return storage.join(self.root, "tokenised")


@dataclass(frozen=True)
class Here(_Places):
    """Below a folder, which is named as the user did. `command`: the line to go on with."""

    command: str

    def train(self) -> int:
        config = _settings(TrainConfig, TRAIN)
        shards = {"train_shards": [f"{self.shards}/train-*.tar"], "val_shards": [f"{self.shards}/heldout-*.tar"]}
        places = {"output": self.training, "data": config.data.model_copy(update=shards)}
        return run_training(config.model_copy(update=places), self.command)

    def tokenize(self) -> int:
        config = _settings(TokenizeConfig, TOKENIZE)
        places = {"checkpoint": self.training, "shards": [f"{self.shards}/*.tar"], "output": self.tokenised}
        return run_tokenize(config.model_copy(update=places), self.command)


@dataclass(frozen=True)
class OnCluster(_Places):
    """Object storage, and jobs that are submitted as a person would. `job_folder`: the files that travel with them."""

    job_folder: Path
    dashboard: str
    client: Mapping[str, str]  # the environment with which other programs find the bucket

    def train(self) -> int:
        shards = (f"data.train_shards={self.shards}/train-*.tar", f"data.val_shards={self.shards}/heldout-*.tar")
        return self._submit("train", TRAIN, f"output={self.training}", *shards)

    def tokenize(self) -> int:
        places = (f"checkpoint={self.training}", f"shards={self.shards}/*.tar", f"output={self.tokenised}")
        return self._submit("tokenize", TOKENIZE, *places)

    def _submit(self, job: str, config: str, *overrides: str) -> int:
        return subprocess.call(
            [sys.executable, "-m", "jobs.cli", "submit", job, config, *overrides], cwd=self.job_folder
        )


@contextmanager
def local_cluster(folder: Path) -> Iterator[OnCluster]:
    """An S3 server, whose data stays below `folder`, and a Ray head, both gone with the block. Raises ServerError."""
    server, head = S3Server(folder / "s3", BUCKET), RayHead(folder / "ray", CLUSTER_CPUS)
    job_folder = folder / "job"
    job_folder.mkdir(parents=True, exist_ok=True)
    for name in (TRAIN, TOKENIZE):
        shutil.copy(_config(name), job_folder)
    before = dict(os.environ)
    os.environ.update({**server.environment, **head.environment})  # the cluster's jobs inherit it from the head
    try:
        server.start()
        head.start()
        yield OnCluster(f"s3://{BUCKET}", job_folder, head.dashboard, server.environment)
    finally:
        head.stop()
        server.stop()
        os.environ.clear()
        os.environ.update(before)


def _config(name: str) -> Path:
    path = CONFIGS / name
    if not path.exists():
        raise PipelineError(f"{path} is not there: the demo runs from a checkout of the repository")
    return path


def _settings(kind: type[Settings], name: str) -> Settings:
    return load_config(kind, str(_config(name)))
