"""`dvae eval`: how good a checkpoint is on held-out shards. Everything is streamed: memory holds a few batches.

The figures are computed as training computes its own, so the two can be compared; LPIPS and rFID come on top where
their weights are given.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.checkpoints import file_reader, find_checkpoint, read_head
from jobs.progress import JobProgress
from jobs.train_evaluation import side_by_side
from model import losses
from model.checkpoint import Checkpoint, read_checkpoint
from model.config import LossConfig, Ramp
from model.evaluation import Evaluator, PixelMetric
from model.inference import find_device
from model.metrics import EvalSums
from model.perceptual import pixel_metrics
from model.schedules import ramp_at
from pipeline import storage
from pipeline.batches import pixel_batches
from pipeline.errors import PipelineError
from pipeline.images import ImageSpec
from pipeline.records import ObjectInfo, PixelBatch, RawSample
from pipeline.shard_patterns import expand
from pipeline.shards import read_samples

# B images, H W pixel rows and columns, C = 3 colours, K codes

DECODE_THREADS = 4
NUM_PICTURES = 8
SOFT = ("psnr_soft", "ssim_soft", *losses.FIGURES.values())  # what needs the temperature of training


class NothingToEvaluate(PipelineError):
    """The shards hold no image that can be used."""


class WeightsMissing(PipelineError):
    """A path of weights that leads nowhere."""


@dataclass(frozen=True)
class EvalSettings:
    num_images: int | None = None  # None: all
    batch_size: int = 16
    device: str = "auto"
    precision: str = "fp32"
    lpips_weights: str | None = None  # URLs
    fid_weights: str | None = None


@dataclass(frozen=True)
class EvalResult:
    """`figures`: model/metrics.py's, with those in `_of_codes`, LPIPS and rFID. `temperature` None: the checkpoint does
    not say it, so there are no figures of the relaxed reconstruction."""

    checkpoint: Checkpoint
    folder: str
    shards: tuple[str, ...]  # patterns, without credentials
    num_shards: int
    num_images: int
    num_bad_images: int
    bad_by_reason: Mapping[str, int]
    batch_size: int
    device: str
    precision: str
    temperature: float | None
    seconds: float
    figures: Mapping[str, float]
    histogram_K: NDArray[np.float64]
    picture_HWC: NDArray[np.uint8] = field(repr=False)  # original | soft | hard of the first images; no soft without τ

    @property
    def positions(self) -> int:
        """Tokens of an image."""
        return math.prod(self.grid)

    @property
    def grid(self) -> tuple[int, int]:
        return self.checkpoint.dvae_config.grid(self.checkpoint.image_spec["size"])


def evaluate(url: str, patterns: Sequence[str], settings: EvalSettings) -> EvalResult:
    """Raises CheckpointNotFound, NoShardsMatched, NothingToEvaluate, ShardError, StorageError, ModelError."""
    started, found = time.monotonic(), find_checkpoint(url)
    read_head(found).require_decoder()
    shards, device = expand(patterns), find_device(settings.device)
    checkpoint = read_checkpoint(file_reader(found))
    temperature, loss = _as_trained(checkpoint)
    metrics = pixel_metrics(_read(settings.lpips_weights), _read(settings.fid_weights), device)
    seed = int(checkpoint.extra.get("training_config", {}).get("seed", 0))
    evaluator = Evaluator.of_checkpoint(checkpoint, loss, seed=seed, device=device, precision=settings.precision)
    tally = _Tally(evaluator, temperature, metrics)
    with JobProgress(*_extent(settings, shards)) as progress:
        for batch in _batches(shards, ImageSpec.from_json(checkpoint.image_spec), settings, progress):
            tally.add(batch)
            progress.advance(len(batch.samples) if settings.num_images else 0, f"PSNR {tally.psnr_hard():.2f} dB")
    if not tally.num_images:
        raise NothingToEvaluate(
            f"not one of {tally.num_bad} images can be used ({dict(tally.bad)}); the checkpoint takes images of "
            f"{checkpoint.image_spec['size']} pixels or larger: name other shards"
        )
    return EvalResult(
        checkpoint=checkpoint,
        folder=found,
        shards=tuple(storage.public_url(pattern) for pattern in patterns),
        num_shards=len(shards),
        num_images=tally.num_images,
        num_bad_images=tally.num_bad,
        bad_by_reason=dict(tally.bad),
        batch_size=settings.batch_size,
        device=str(device),
        precision=settings.precision,
        temperature=temperature,
        seconds=round(time.monotonic() - started, 1),
        figures=tally.figures(checkpoint),
        histogram_K=tally.sums.histogram_K,
        picture_HWC=tally.picture(),
    )


class _Tally:
    """What is added up over the batches."""

    def __init__(self, evaluator: Evaluator, temperature: float | None, metrics: Sequence[PixelMetric]) -> None:
        self._evaluator, self._temperature, self._metrics = evaluator, temperature, metrics
        self.sums = EvalSums.zeros(evaluator.codebook_size)
        self.num_images, self.bad = 0, Counter[str]()
        self._shown: list[NDArray[np.uint8]] = []

    @property
    def num_bad(self) -> int:
        return self.bad.total()

    def add(self, batch: PixelBatch) -> None:
        self.bad.update(str(failure.reason) for failure in batch.failures)
        if not batch.samples:
            return
        pixels_BHWC = batch.pixels_BHWC[: len(batch.samples)]
        places_B = self.num_images + np.arange(len(pixels_BHWC))
        made = self._evaluator.reconstruct(pixels_BHWC, places_B, self._temperature or 1.0)
        self.sums += made.sums()
        for metric in self._metrics:
            metric.add(made.x_BCHW, made.hard_BCHW)
        if not self._shown:
            soft_BHWC, hard_BHWC = (pictures[:NUM_PICTURES] for pictures in made.pictures())
            soft = () if self._temperature is None else (soft_BHWC,)
            self._shown.append(side_by_side(pixels_BHWC[:NUM_PICTURES], *soft, hard_BHWC))
        self.num_images += len(batch.samples)

    def psnr_hard(self) -> float:
        return self.sums.metrics()["psnr_hard"] if self.num_images else math.nan

    def figures(self, checkpoint: Checkpoint) -> dict[str, float]:
        figures = self.sums.metrics(self._evaluator.likelihood)
        if self._temperature is None:
            figures = {name: value for name, value in figures.items() if name not in SOFT}
        positions = math.prod(checkpoint.dvae_config.grid(checkpoint.image_spec["size"]))
        figures |= _of_codes(figures["perplexity"], positions, self._evaluator.codebook_size)
        for metric in self._metrics:
            figures |= metric.figures()
        return figures

    def picture(self) -> NDArray[np.uint8]:
        return self._shown[0]


def _of_codes(perplexity: float, positions: int, codebook_size: int) -> dict[str, float]:
    """Of the histogram of codes: entropy in bits, and what an image takes under it and without it."""
    bits = math.log2(perplexity)
    return {
        "code_entropy_bits": bits,
        "bits_per_image": bits * positions,
        "raw_bits_per_image": math.log2(codebook_size) * positions,
    }


def _as_trained(checkpoint: Checkpoint) -> tuple[float | None, LossConfig]:
    """The temperature of the checkpoint's step and the likelihood, where the checkpoint says how it was trained."""
    settings: dict[str, Any] = checkpoint.extra.get("training_config", {})
    ramp = settings.get("schedule", {}).get("temperature")
    loss = settings.get("loss", {"likelihood": checkpoint.dvae_config.likelihoods[0]})
    return None if ramp is None else ramp_at(Ramp(**ramp), checkpoint.step), LossConfig(**loss)


def _read(url: str | None) -> bytes | None:
    """Raises WeightsMissing."""
    if url is None:
        return None
    try:
        return storage.read_bytes(storage.normalize(url))
    except FileNotFoundError as error:
        raise WeightsMissing(f"no file of weights at {storage.public_url(url)}") from error


def _extent(settings: EvalSettings, shards: Sequence[ObjectInfo]) -> tuple[str, int]:
    """What the bar counts: how many images the shards hold is known only at their ends."""
    return ("images", settings.num_images) if settings.num_images else ("shards", len(shards))


def _batches(
    shards: Sequence[ObjectInfo], spec: ImageSpec, settings: EvalSettings, progress: JobProgress
) -> Iterator[PixelBatch]:
    """The first images in shard order. Raises ShardError: the yardstick must not change without a word."""

    def samples() -> Iterator[RawSample]:
        for shard in shards:
            yield from read_samples(shard)
            if settings.num_images is None:
                progress.advance(1, storage.base_name(shard.url))

    with ThreadPoolExecutor(DECODE_THREADS, "decode") as threads:
        first = itertools.islice(samples(), settings.num_images)
        with closing(pixel_batches(first, spec, settings.batch_size, threads)) as batches:
            yield from batches
