"""What `dvae train` can be told, checked once at the door. configs/train_dalle.yaml shows every key.

The defaults are DALL·E's (arXiv 2102.12092). Reading files and `key=value` is config.py's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from jobs.config import KindOf, Patterns, Section
from model.config import (
    DVAEConfig,
    LossConfig,
    ModelConfig,
    ModelError,
    OptimConfig,
    ScheduleConfig,
    config_class,
)
from pipeline.images import Augment, ImageSpec

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]


class DataConfig(Section):
    train_shards: Annotated[Patterns, Field(min_length=1)]
    """Shards to learn from: URLs, globs, braces or folders."""
    val_shards: Patterns = Field(default=[])
    """Shards held out for evaluation; none of them may be among train_shards."""
    num_streams: Positive = 8
    """Fixed streams that feed a batch, shared out over the workers, so that order doesn't depend on their number."""
    shuffle_shards: Positive = 1
    """Shards of a stream whose samples are mixed. Memory: up to 2 × this many undecoded shards a stream."""
    augment: Augment = "dalle"
    decode_threads: Positive = 4
    """Of each worker."""
    prefetch_batches: Positive = 2
    max_failed_samples: Annotated[float, Field(ge=0, le=1)] = 0.05
    """The share of bad images over which training stops."""
    max_failed_shards: NotNegative = 0
    """The number of unreadable shards over which training stops."""


class EvalConfig(Section):
    every_steps: NotNegative = 5000
    """0: never."""
    num_images: Positive = 512
    """The first ones of data.val_shards."""
    batch_size: Positive = 16
    """Of each worker."""
    num_pictures: NotNegative = 8
    """Images shown beside their reconstructions in pictures/."""


class CheckpointConfig(Section):
    every_steps: Positive = 5000
    keep_last: Positive = 3


class WandbConfig(Section):
    """The key is the client's business: WANDB_API_KEY, or `wandb login`."""

    project: str
    entity: str | None = None
    name: str | None = None
    """Of the run; null: the last name of `output`."""
    mode: Literal["online", "offline"] = "online"


class MlflowConfig(Section):
    """Credentials are the client's business: MLFLOW_TRACKING_USERNAME, _PASSWORD, _TOKEN."""

    experiment: str
    tracking_uri: str | None = None
    """null: MLFLOW_TRACKING_URI."""


class LogConfig(Section):
    every_steps: Positive = 100
    """One line in metrics.jsonl, the mean over these steps."""
    tensorboard: bool = True
    """Event files under tensorboard/."""
    wandb: WandbConfig | None = None
    mlflow: MlflowConfig | None = None


def _workers(value: Any) -> int | tuple[int, int]:
    if type(value) is int and value >= 0:
        return value
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(each) is int for each in value):
        fewest, most = value
        if 1 <= fewest <= most:
            return fewest, most
    raise ValueError("must be a whole number of at least 0, or [fewest, most] with 1 <= fewest <= most")


class RayConfig(Section):
    num_workers: Annotated[int | tuple[int, int], BeforeValidator(_workers)] = 1
    """So many, or [fewest, most]: as many as there is room for. 0: in this process, without Ray."""
    use_gpu: bool = True
    gpus_per_worker: Annotated[float, Field(gt=0)] = 1
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    address: str | None = None
    """Of a running cluster, or `auto`. null: $RAY_ADDRESS, or a cluster of this machine for this run."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Restarts from the newest checkpoint after the loss of a worker; -1: without end."""
    wait_s: Annotated[float, Field(ge=0)] = 300
    """For the GPUs and CPUs asked for."""
    resize_every_s: Annotated[float, Field(gt=0)] = 60
    """How often a group of [fewest, most] workers looks whether there is room for another number."""

    @property
    def fewest_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class TrainConfig(Section):
    output: str
    """The URL under which everything is written; running again with the same one resumes."""
    data: DataConfig
    model: Annotated[ModelConfig, KindOf(config_class, "architecture")] = DVAEConfig()
    """DALL·E's; with `architecture: dalle_pytorch` its DiscreteVAE, which has keys of its own."""
    image: ImageSpec = ImageSpec()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    ray: RayConfig = RayConfig()
    seed: NotNegative = 0
    steps: Positive = 3_000_000
    batch_size: Positive = 512
    """Global: shared out over the workers."""
    micro_batch_size: Positive | None = None
    """Images of one forward pass of a worker; null: all that it has of a batch."""
    max_skipped_steps: Positive = 10
    """Steps in a row without a finite loss and gradient, after which training stops."""
    license: str | None = None
    """What the model card says of the weights: apache-2.0, say."""
    precision: Literal["fp32", "bf16"] = "bf16"
    compile: bool = False
    """The convolutions with torch.compile: half a minute or more at the start, faster steps, other rounding."""
    checkpoint_activations: bool = False
    """Keep fewer activations and compute the others twice: the same bits in less memory, slower."""
    threads: Positive = 1
    """torch threads of each worker; another number may give other rounding."""

    @field_validator("schedule", mode="before")
    @classmethod
    def _complete_ramps(cls, value: Any) -> Any:
        """A ramp may be given in part; the rest is DALL·E's."""
        return _onto(dataclasses.asdict(ScheduleConfig()), value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _check_together(self) -> TrainConfig:
        if problems := list(self._problems()):
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        data, workers = self.data, self.ray.most_workers
        if self.batch_size % data.num_streams:
            yield f"batch_size {self.batch_size} is not a multiple of data.num_streams {data.num_streams}"
        if workers > data.num_streams:
            yield f"ray.num_workers {workers} is more than data.num_streams {data.num_streams}: each needs one at least"
        if self.eval.every_steps and not data.val_shards:
            yield "data.val_shards is empty: name shards to evaluate on, or set eval.every_steps=0"
        try:
            self.model.grid(self.image.size)
        except ModelError as error:
            yield f"image.size with model.downsample: {error}"
        try:
            self.loss.check_fits(self.model)
        except ModelError as error:
            yield f"loss with model: {error}"


def _onto(default: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` laid over `default`, section by section."""
    merged = dict(default)
    for name, value in given.items():
        below = default.get(name)
        merged[name] = _onto(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
