"""`dvae precision`: how fast each precision is on this machine, and how far its tokens are from those of fp32.

Each variant encodes the same images in this process, without Ray. Where a token differs, its margin is by how much
fp32 prefers its own code: small margins are near-ties, which any change of arithmetic may turn.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs.checkpoints import TokenizerSource, read_head
from jobs.progress import JobProgress
from jobs.wording import rate
from model.config import ModelError
from model.tokenizer import DVAETokenizer
from pipeline.errors import PipelineError
from pipeline.images import ImageSpec, SampleError, decode_image
from pipeline.memory_budget import keep_large_blocks_apart
from pipeline.records import ObjectInfo
from pipeline.shard_patterns import expand
from pipeline.shards import read_samples

# B images, H W rows and columns, C channels

MAX_SHARDS = 8  # the images come from so many, evenly spaced: neighbours in a shard are often alike
MEASURED_S = 20.0  # a variant that takes longer for all images is not run again for a steadier figure


class NoImages(PipelineError):
    """The shards hold no image that can be decoded."""


@dataclass(frozen=True)
class PrecisionSettings:
    num_images: int = 256
    batch_size: int = 64
    threads: int = 1
    device: str = "auto"
    compile: bool = True  # the compiled variants too


@dataclass(frozen=True)
class Variant:
    """`margins`: median and largest, by fp32's logits, of the tokens that differ. `problem`: why there are no
    figures."""

    precision: str
    compiled: bool
    load_s: float | None = None
    images_per_s: float | None = None
    num_differing: int | None = None
    agreement: float | None = None
    margins: tuple[float, float] | None = None
    problem: str | None = None


@dataclass(frozen=True)
class PrecisionReport:
    checkpoint: str
    tokenizer_id: str
    device: str
    batch_size: int
    threads: int
    num_images: int
    num_tokens: int
    variants: tuple[Variant, ...]


def run_precision(checkpoint: str, shards: Sequence[str], settings: PrecisionSettings, *, as_json: bool) -> int:
    """Raises CheckpointNotFound, NoShardsMatched, NoImages, ShardError, StorageError, ModelError."""
    report = measure(checkpoint, shards, settings)
    if as_json:
        Console(soft_wrap=True, highlight=False).print_json(json.dumps(asdict(report)))
    else:
        _print(report)
    return 0


def measure(checkpoint: str, shards: Sequence[str], settings: PrecisionSettings) -> PrecisionReport:
    keep_large_blocks_apart()  # as a worker does: it decides what a large array costs
    head = read_head(checkpoint)
    fp32 = TokenizerSource(head.url, settings.device, "fp32", settings.batch_size, settings.threads)
    pixels_BHWC = sample_pixels(expand(shards), ImageSpec.from_json(head.image_spec), settings.num_images)
    reference = fp32.load()
    tokens_BHW = reference.encode(pixels_BHWC)
    with JobProgress("variants", len(all_variants(reference, settings))) as progress:
        variants: list[Variant] = []
        for variant in all_variants(reference, settings):
            variants.append(_measured(variant, fp32, reference, pixels_BHWC, tokens_BHW))
            progress.advance(1, _name(variant))
    return PrecisionReport(
        head.url, head.tokenizer_id, device_name(reference), settings.batch_size, settings.threads,
        len(pixels_BHWC), tokens_BHW.size, tuple(variants),
    )  # fmt: skip


def all_variants(reference: DVAETokenizer, settings: PrecisionSettings) -> list[Variant]:
    precisions = ("fp32", "bf16", "fp16") if reference.numerics["device"] == "cuda" else ("fp32", "bf16")
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


def _measured(
    variant: Variant,
    fp32: TokenizerSource,
    reference: DVAETokenizer,
    pixels_BHWC: NDArray[np.uint8],
    tokens_BHW: NDArray[np.int32],
) -> Variant:
    started = time.perf_counter()
    try:
        tokenizer = replace(fp32, precision=variant.precision, compile=variant.compiled).load()
    except ModelError as error:  # no compiler, say: the other variants can still be told
        return replace(variant, problem=str(error))
    tokenizer.encode(pixels_BHWC[: fp32.batch_size])
    load_s = time.perf_counter() - started
    found_BHW, images_per_s = _timed(tokenizer, pixels_BHWC)
    differs_BHW = found_BHW != tokens_BHW
    rows_B = differs_BHW.any(axis=(1, 2))
    margins = reference.margins(pixels_BHWC[rows_B], found_BHW[rows_B])[differs_BHW[rows_B]]
    return replace(
        variant, load_s=round(load_s, 1), images_per_s=images_per_s, num_differing=int(differs_BHW.sum()),
        agreement=float(1 - differs_BHW.mean()),
        margins=(float(np.median(margins)), float(margins.max())) if len(margins) else None,
    )  # fmt: skip


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


def sample_pixels(shards: Sequence[ObjectInfo], spec: ImageSpec, num_images: int) -> NDArray[np.uint8]:
    """(B, H, W, C): good images from the starts of some shards; fewer than asked for where these hold fewer."""
    chosen = [shards[i * len(shards) // MAX_SHARDS] for i in range(MAX_SHARDS)] if len(shards) > MAX_SHARDS else shards
    sources = [_good_images(shard, spec) for shard in chosen]
    images: list[NDArray[np.uint8]] = []
    for number, source in enumerate(sources):
        share = -(-(num_images - len(images)) // (len(sources) - number))  # what is left, evenly
        with closing(source):
            images += islice(source, share)
    if not images:
        raise NoImages(f"none of the images in {len(chosen)} shards can be decoded; name other shards")
    return np.stack(images)


def _good_images(shard: ObjectInfo, spec: ImageSpec) -> Generator[NDArray[np.uint8], None, None]:
    with closing(read_samples(shard, require_end_marker=False)) as samples:
        for sample in samples:
            if sample.image is None:
                continue
            try:
                yield decode_image(sample.image, spec).pixels_HWC
            except SampleError:  # counted where tokens are made; here another image does as well
                continue


def _print(report: PrecisionReport) -> None:
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{'tokenizer':<12}{escape(report.tokenizer_id)} ({escape(report.checkpoint)})")
    console.print(f"{'device':<12}{escape(report.device)}, batch size {report.batch_size}, {report.threads} threads")
    console.print(f"{'sample':<12}{report.num_images:,} images, {report.num_tokens:,} tokens")
    table = Table("variant", "images/s", "× fp32", "tokens as fp32's", "margin: median", "largest", "ready after")
    base = next((v.images_per_s for v in report.variants if v.images_per_s), None)
    for variant in report.variants:
        table.add_row(*_cells(variant, base))
    console.print(table)
    for variant in report.variants:
        if variant.problem is not None:
            console.print(f"{_name(variant)}: {escape(variant.problem)}")


def _cells(variant: Variant, base: float | None) -> list[str]:
    if variant.images_per_s is None or variant.agreement is None or base is None:
        return [_name(variant), "not here", *[""] * 5]
    margins = [f"{margin:.2g}" for margin in variant.margins] if variant.margins else ["-", "-"]
    speed, load = variant.images_per_s, f"{variant.load_s or 0:.0f} s"
    return [_name(variant), rate(speed), f"{speed / base:.2f}", f"{variant.agreement:.4%}", *margins, load]


def _name(variant: Variant) -> str:
    return variant.precision + ", compiled" * variant.compiled
