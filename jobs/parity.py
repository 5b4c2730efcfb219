"""`dvae parity`: whose tokens are whose. Each precision of a checkpoint, or of another one, against its own fp32.

Each variant encodes the same images in this process, without Ray. Where a token differs, its margin is by how much
fp32 prefers its own code: small margins are near-ties, which any change of arithmetic may turn.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jobs.checkpoints import CheckpointHead, TokenizerSource, read_head
from jobs.parity_images import choose_images
from jobs.progress import JobProgress
from model.config import ModelError
from model.tokenizer import DVAETokenizer
from pipeline.errors import PipelineError
from pipeline.images import ImageSpec
from pipeline.memory_budget import keep_large_blocks_apart
from pipeline.shard_patterns import expand

# B images, H W rows and columns, C channels

MEASURED_S = 20.0  # a variant that takes longer for all images is not run again for a steadier figure


class NotComparable(PipelineError):
    """The tokens of two checkpoints do not mean the same."""


@dataclass(frozen=True)
class ParitySettings:
    num_images: int = 256
    batch_size: int = 64
    threads: int = 1
    device: str = "auto"
    compile: bool = True  # the compiled variants too
    against: str | None = None  # URL of another checkpoint, whose variants are compared instead


@dataclass(frozen=True)
class ImageParity:
    """An image with a token that differs. `largest_margin`: by fp32's logits."""

    shard: str
    key: str
    num_differing: int
    largest_margin: float


@dataclass(frozen=True)
class Agreement:
    """With the tokens of fp32. `margins`: median and largest of the tokens that differ; `images`: those with such
    tokens, the worst first."""

    num_tokens: int
    num_differing: int
    num_same_images: int
    margins: tuple[float, float] | None
    images: tuple[ImageParity, ...]

    @property
    def share(self) -> float:
        return 1.0 - self.num_differing / self.num_tokens


@dataclass(frozen=True)
class Variant:
    """`problem`: why there are no figures."""

    precision: str
    compiled: bool
    load_s: float | None = None
    images_per_s: float | None = None
    agreement: Agreement | None = None
    problem: str | None = None

    @property
    def name(self) -> str:
        return self.precision + ", compiled" * self.compiled


@dataclass(frozen=True)
class ParityReport:
    """`against`: the head of the checkpoint whose variants these are; None: the checkpoint itself."""

    head: CheckpointHead
    against: CheckpointHead | None
    settings: ParitySettings
    device: str
    num_images: int
    variants: tuple[Variant, ...]


def measure(checkpoint: str, shards: Sequence[str], settings: ParitySettings) -> ParityReport:
    """Raises CheckpointNotFound, NotComparable, NoShardsMatched, NoImages, ShardError, StorageError, ModelError."""
    keep_large_blocks_apart()  # as a worker does: it decides what a large array costs
    head = read_head(checkpoint)
    against = None if settings.against is None else _comparable(head, read_head(settings.against))
    other = against or head
    own_spec, other_spec = (ImageSpec.from_json(each.image_spec) for each in (head, other))
    images = choose_images(expand(shards), [own_spec, other_spec], settings.num_images)
    fp32 = TokenizerSource(head.url, settings.device, "fp32", settings.batch_size, settings.threads)
    reference = Reference(fp32.load(), images.names, images.pixels[own_spec])
    source, pixels_BHWC = replace(fp32, checkpoint=other.url), images.pixels[other_spec]
    wanted = all_variants(reference.tokenizer, settings)
    with JobProgress("variants", len(wanted)) as progress:
        variants: list[Variant] = []
        for variant in wanted:
            variants.append(_measured(variant, source, reference, pixels_BHWC))
            progress.advance(1, variant.name)
    return ParityReport(head, against, settings, device_name(reference.tokenizer), len(images.names), tuple(variants))


def _comparable(head: CheckpointHead, other: CheckpointHead) -> CheckpointHead:
    shapes = [f"{each.grid[0]}×{each.grid[1]} tokens of {each.codebook_size:,} codes" for each in (head, other)]
    if shapes[0] != shapes[1]:
        raise NotComparable(f"{head.url} makes {shapes[0]}, {other.url} makes {shapes[1]}: no token is another's")
    return other


def all_variants(reference: DVAETokenizer, settings: ParitySettings) -> list[Variant]:
    precisions = ("fp32", "tf32", "bf16", "fp16") if reference.numerics["device"] == "cuda" else ("fp32", "bf16")
    compiled = (False, True) if settings.compile else (False,)
    return [Variant(precision, one) for one in compiled for precision in precisions]


def device_name(tokenizer: DVAETokenizer) -> str:
    """`cuda: NVIDIA H100`, or the processor's name as the system knows it."""
    if tokenizer.device_name is not None:
        return f"cuda: {tokenizer.device_name}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"cpu: {next(models, platform.processor() or platform.machine())}"


class Reference:
    """What fp32 makes of the images, and how far tokens are from that."""

    def __init__(self, tokenizer: DVAETokenizer, names: list[tuple[str, str]], pixels_BHWC: NDArray[np.uint8]) -> None:
        self.tokenizer, self._names, self._pixels_BHWC = tokenizer, names, pixels_BHWC
        self._tokens_BHW = tokenizer.encode(pixels_BHWC)

    def agreement(self, tokens_BHW: NDArray[np.int32]) -> Agreement:
        differs_BHW = tokens_BHW != self._tokens_BHW
        rows = np.flatnonzero(differs_BHW.any(axis=(1, 2)))
        margins_BHW = self.tokenizer.margins(self._pixels_BHWC[rows], tokens_BHW[rows])
        margins = margins_BHW[differs_BHW[rows]]
        images = [
            ImageParity(*self._names[int(row)], int(differs_BHW[row].sum()), float(margins_HW.max()))
            for row, margins_HW in zip(rows, margins_BHW, strict=True)
        ]
        return Agreement(
            num_tokens=differs_BHW.size,
            num_differing=int(differs_BHW.sum()),
            num_same_images=len(tokens_BHW) - len(rows),
            margins=(float(np.median(margins)), float(margins.max())) if len(margins) else None,
            images=tuple(sorted(images, key=lambda image: -image.num_differing)),
        )


def _measured(
    variant: Variant, source: TokenizerSource, reference: Reference, pixels_BHWC: NDArray[np.uint8]
) -> Variant:
    started = time.perf_counter()
    try:
        tokenizer = replace(source, precision=variant.precision, compile=variant.compiled).load()
    except ModelError as error:  # no compiler, say: the other variants can still be told
        return replace(variant, problem=str(error))
    tokenizer.encode(pixels_BHWC[: source.batch_size])
    load_s = time.perf_counter() - started
    tokens_BHW, images_per_s = _timed(tokenizer, pixels_BHWC)
    agreement = reference.agreement(tokens_BHW)
    return replace(variant, load_s=round(load_s, 1), images_per_s=images_per_s, agreement=agreement)


def _timed(tokenizer: DVAETokenizer, pixels_BHWC: NDArray[np.uint8]) -> tuple[NDArray[np.int32], float]:
    """The tokens, and images a second: the best of up to three passes, for other programs only ever slow one down."""
    best_s, until = float("inf"), time.perf_counter() + MEASURED_S
    for _ in range(3):
        started = time.perf_counter()
        tokens_BHW = tokenizer.encode(pixels_BHWC)
        best_s = min(best_s, time.perf_counter() - started)
        if time.perf_counter() > until:
            break
    return tokens_BHW, len(pixels_BHWC) / best_s
