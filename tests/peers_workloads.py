"""What all peers of bench_peers.py get to do: the shards, the models, the rows of the table. Plain data, which travels
to other processes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jobs.checkpoints import TokenizerSource, read_head
from make_data import image_bytes, tar_bytes
from pipeline import storage
from pipeline.image_spec import ImageSpec, Resample
from pipeline.output import OutputPrefix
from pipeline.plan import ShardTask, part_name
from pipeline.records import ImageTokenizer
from pipeline.shard_patterns import expand
from pipeline.token_table import TableSpec
from pipeline.tokenize_shard import TokenizeJob

CORES = len(os.sched_getaffinity(0))
IMAGES_PER_SHARD = 256
BATCH_SIZE = 64
WARM_IMAGES = 64
GPU_S = 0.001  # an image, on the simulated GPU
_GPU = threading.Lock()  # one batch at a time, as on a real one


def make_shards(folder: Path, num_images: int, per_shard: int = IMAGES_PER_SHARD) -> None:
    """JPEGs of 320 to 512 pixels a side; 64 different ones under ever new keys."""
    rng = np.random.default_rng(0)
    sides = rng.integers(320, 513, (64, 2)).tolist()
    pictures = [image_bytes(n, width=width, height=height) for n, (width, height) in enumerate(sides)]
    for first in range(0, num_images, per_shard):
        members = [(f"{n:08d}.jpg", pictures[n % 64]) for n in range(first, min(first + per_shard, num_images))]
        (folder / f"bench-{first:08d}.tar").write_bytes(tar_bytes(members))


def make_warm_shards(folder: Path) -> None:
    """A small one for each actor."""
    folder.mkdir()
    make_shards(folder, CORES * WARM_IMAGES, per_shard=WARM_IMAGES)


@dataclass(frozen=True)
class FreeTokenizer:
    """A token for each 8x8 pixels, of 8,192 codes, for nothing, or for `image_s` of waiting an image."""

    size: int
    image_s: float = 0.0
    codebook_size: int = 8192
    tokenizer_id: str = "free"

    @property
    def grid(self) -> tuple[int, int]:
        return self.size // 8, self.size // 8

    def load(self) -> FreeTokenizer:
        return self

    def encode(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        if self.image_s:
            with _GPU:
                time.sleep(self.image_s * len(pixels_BHWC))
        return pixels_BHWC[:, ::8, ::8, 0].astype(np.int64)


def write_cpu_model(folder: Path, size: int = 128) -> str:
    """A small dVAE of 8,192 codes, as a checkpoint: about 6 ms of one core an image of 128 pixels."""
    from model.checkpoint import checkpoint_files
    from model.config import DVAEConfig
    from model.dvae import seeded_dvae

    config = DVAEConfig(codebook_size=8192, width=40, decoder_init=16, blocks_per_group=1, stem="strided")
    spec, weights = ImageSpec(size, small="upscale").to_json(), dict(seeded_dvae(config, 0).state_dict())
    files = checkpoint_files(
        weights=weights, dvae_config=config, image_spec=spec, step=0, training_state=None, extra={}
    )
    for name, data in files.items():
        storage.publish(str(folder / name), data)
    return str(folder)


@dataclass(frozen=True)
class Row:
    """One row of the table. Images of a run: of ours and the ceiling; of the peers; and of Ray Data's defaults, which
    are slow. Our fast decoder knows Lanczos only: with other filters Pillow decodes for everybody."""

    name: str
    title: str
    size: int
    resample: Resample
    num_images: int
    peer_images: int
    slow_images: int
    image_s: float = 0.0
    on_gpu: bool = True  # a stand-in: one actor holds the model, as on a machine with one GPU


ROWS = (
    Row("free", "free model, 128 px, Lanczos", 128, "lanczos", 6144, 2048, 512),
    Row("gpu", "simulated GPU of 1,000 images/s, 128 px, Lanczos", 128, "lanczos", 6144, 1024, 512, image_s=GPU_S),
    Row("cpu", "small CPU model, 128 px, Lanczos", 128, "lanczos", 2048, 1024, 256, on_gpu=False),
    Row("pillow256", "free model, 256 px, bicubic: Pillow decodes for all", 256, "bicubic", 2048, 1024, 512),
    Row("pillow128", "free model, 128 px, box filter: Pillow decodes for all", 128, "box", 4096, 3072, 512),
)
DEFAULT_ROWS = tuple(row.name for row in ROWS if row.name != "pillow128")


@dataclass(frozen=True)
class Work:
    """One run of one peer: these shards into that folder."""

    row: Row
    shards: tuple[str, ...]
    output: str
    checkpoint: str  # of the CPU model
    warm: tuple[str, ...] = ()  # small shards, for engines whose processes are new in each run

    def source(self, threads: int) -> FreeTokenizer | TokenizerSource:
        """What gives the tokenizer; `threads`: of torch, for a real model."""
        if self.row.on_gpu:
            return FreeTokenizer(self.row.size, self.row.image_s)
        return TokenizerSource(self.checkpoint, "cpu", "fp32", BATCH_SIZE, threads)

    def tokenizer(self, threads: int) -> ImageTokenizer:
        return self.source(threads).load()

    @property
    def spec(self) -> ImageSpec:
        return ImageSpec(self.row.size, self.row.resample, small="upscale")

    @property
    def table(self) -> TableSpec:
        """The token table, for our engine."""
        spec = self.spec.to_json()
        if self.row.on_gpu:
            free = FreeTokenizer(self.row.size)
            return TableSpec(free.tokenizer_id, free.grid, free.codebook_size, spec)
        head = read_head(self.checkpoint)
        return TableSpec(head.tokenizer_id, head.grid, head.codebook_size, spec)

    @property
    def tasks(self) -> list[ShardTask]:
        return tasks(self.shards)

    def job(self, decode_threads: int, **options: Any) -> TokenizeJob:
        return TokenizeJob(OutputPrefix(self.output), self.table, BATCH_SIZE, decode_threads, **options)


@dataclass(frozen=True)
class Ran:
    """What a peer says of a run. `started`: its clock, by time.monotonic, where loading and starting came before.
    `num_images`: of what writes no rows. `stages`: CPU seconds an image of each, of what measures these."""

    started: float | None = None
    num_images: int | None = None
    stages: dict[str, float] | None = None


def tasks(shards: Sequence[str]) -> list[ShardTask]:
    return [ShardTask(shard, part_name(shard.url)) for shard in expand(list(shards))]
