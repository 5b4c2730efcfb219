"""What `dvae bench` measured, and what follows from it by arithmetic: the ideal, and each rate as a share of it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from jobs.stage_costs import StageCosts
from pipeline.stage_times import StageTimes

DECODE, ENCODE, NO_RAY, RAY = "decode", "encode", "no_ray", "ray"  # what is measured in rounds
FREE = "free"  # for a tokenizer_id
TITLES = {
    DECODE: "read and decode",
    ENCODE: "encode",
    NO_RAY: "all, without Ray",
    RAY: "all, with Ray",
}


@dataclass(frozen=True)
class Setting:
    """What was measured, as the run would have it on this machine. `cores`: that this process may use; `gpus`: that
    the actors take."""

    encoder: str  # the checkpoint's tokenizer_id, or FREE
    device: str
    precision: str
    compiled: bool
    batch_size: int
    image_size: int  # pixels of a side, decoded
    cores: int
    gpus: float
    num_actors: int
    gpus_per_actor: float
    threads: int  # of torch, in an actor
    decode_threads: int  # in an actor, or in a task
    decodes_in_tasks: bool
    shards_in_flight: int  # of an actor

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def is_free(self) -> bool:
        return self.encoder == FREE

    @property
    def threads_a_process(self) -> int:
        """That decode where there is a process for each actor, and no tasks."""
        return max(1, self.cores // self.num_actors) if self.decodes_in_tasks else self.decode_threads

    @property
    def batch_bytes(self) -> int:
        """Of pixels."""
        return self.batch_size * 3 * self.image_size**2


@dataclass(frozen=True)
class Rates:
    """Images a second of the same thing in each round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def low(self) -> float:
        return min(self.rounds)

    @property
    def high(self) -> float:
        return max(self.rounds)


@dataclass(frozen=True)
class Startup:
    """Seconds from the start of Ray until it was up, until all actors had their tokenizer, and until the first batch
    was encoded."""

    ray_s: float
    actors_s: float
    first_image_s: float


@dataclass(frozen=True)
class BatchRate:
    """What one encoder does with batches of this size; None where it doesn't fit or takes too long to try."""

    batch_size: int
    images_per_s: float | None


@dataclass(frozen=True)
class Figures:
    """`cpu` and `wall`: each stage alone, on one thread. `source_read_s`: reading an image of the configured shards, by
    the clock; the rest is measured on copies of `num_images` of them beside the output. `rates` by the names above; a
    round has `num_round_images`. `times`: of all actors with Ray, in all rounds. `sweep`: empty where the encoder is
    free, or would be compiled for each size. `load`: processes that wanted a core in the minute before."""

    setting: Setting
    cpu: StageCosts
    wall: StageCosts
    source_read_s: float
    image_bytes: float
    part_bytes: float
    num_failed: int
    num_images: int
    num_round_images: int
    rates: Mapping[str, Rates]
    times: StageTimes
    startup: Startup
    sweep: tuple[BatchRate, ...]
    load: float

    @property
    def core_s(self) -> float:
        """CPU seconds an image of what the cores do."""
        return self.cpu.total_s - (self.cpu.encode_s if self.setting.on_gpu else 0.0)

    @property
    def cores_rate(self) -> float:
        """Images a second of cores that never wait."""
        return self.setting.cores / self.core_s

    @property
    def ideal(self) -> float:
        """The cores' rate where they do everything, else the smaller of theirs and the GPUs'."""
        return min(self.cores_rate, self.rates[ENCODE].median) if self.setting.on_gpu else self.cores_rate

    def share(self, name: str) -> float:
        """Of the ideal."""
        return self.rates[name].median / self.ideal

    @property
    def ray_share(self) -> float:
        """Of the rate of the same engine without Ray: the median over the rounds, in which both ran side by side."""
        pairs = zip(self.rates[RAY].rounds, self.rates[NO_RAY].rounds, strict=True)
        return statistics.median(with_ray / without for with_ray, without in pairs)
