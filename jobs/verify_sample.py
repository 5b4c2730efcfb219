"""`dvae verify --sample`: a random sample of a run's images tokenised again, and how the tokens compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from jobs.checkpoints import TokenizerSource, read_head
from jobs.progress import JobProgress
from jobs.sample_report import SampleReport, SampleSettings
from pipeline.errors import RunMismatch
from pipeline.images import ImageSpec
from pipeline.output import OutputPrefix
from pipeline.records import ShardResult
from pipeline.resample import SampledImage, Skipped, choose, fetch

# B images of a batch, H W token rows and columns

MAX_NAMED = 100  # images that differ
MAX_MARGINS = 1 << 20  # of differing tokens: the median is that of so many


class Comparer(Protocol):
    def encode(self, pixels_BHWC: NDArray[np.uint8]) -> NDArray[np.integer[Any]]:
        """uint8 pixels -> tokens_BHW."""

    def margins(self, pixels_BHWC: NDArray[np.uint8], tokens_BHW: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """By how much the best logit beats that of each given token."""


@dataclass
class _Tally:
    num_compared: int = 0
    num_equal: int = 0
    num_tokens: int = 0
    num_equal_tokens: int = 0
    skipped: Counter[Skipped] = field(default_factory=Counter)
    margins: list[float] = field(default_factory=list)
    differing: list[dict[str, Any]] = field(default_factory=list)

    def add(self, image: SampledImage, num_tokens: int, margins: NDArray[np.float32], problem: str | None) -> None:
        """`margins`: of the tokens that differ."""
        self.num_compared += 1
        self.num_equal += not len(margins) and problem is None
        self.num_tokens += num_tokens
        self.num_equal_tokens += num_tokens - len(margins) if problem is None else 0
        self.margins += margins[: MAX_MARGINS - len(self.margins)].tolist()
        if (len(margins) or problem) and len(self.differing) < MAX_NAMED:
            self.differing.append(_differing(image, margins, problem))


def _differing(image: SampledImage, margins: NDArray[np.float32], problem: str | None) -> dict[str, Any]:
    largest = float(margins.max()) if len(margins) else None
    return {
        "shard": image.shard, "key": image.key, "index": image.index, "num_tokens": len(margins),
        "margin": largest, "problem": problem,
    }  # fmt: skip


def sample_source(run: dict[str, Any], settings: SampleSettings) -> TokenizerSource:
    """The run's tokenizer, computed as the run computed it. Raises RunMismatch, CheckpointNotFound, ModelError."""
    head = read_head(settings.checkpoint)
    if head.tokenizer_id != run["tokenizer_id"]:
        raise RunMismatch(
            f"the tokens are of tokenizer {run['tokenizer_id']}, {settings.checkpoint} is {head.tokenizer_id}; "
            "name the checkpoint of that run"
        )
    try:
        used = run["numerics"][-1]  # what was used last, where another was accepted meanwhile
        device = settings.device or used["device"]
        return TokenizerSource(
            head.url, device, used["precision"], used["batch_size"], used["threads"], used.get("compiled", False)
        )
    except (KeyError, IndexError) as error:
        raise RunMismatch(f"run.json does not say how the tokens were computed: no {error} in numerics") from error


def compare_sample(
    output: OutputPrefix, run: dict[str, Any], rows: Iterable[ShardResult], settings: SampleSettings
) -> SampleReport:
    """`rows`: of shards whose parts are right. Raises StorageError, RunMismatch, ModelError."""
    source = sample_source(run, settings)
    choices, tally = choose(rows, settings.share, settings.seed), _Tally()
    num_chosen = sum(len(choice.indexes) for choice in choices)
    images, tokenizer = fetch(output, ImageSpec.from_json(run["image_spec"]), choices), source.load()
    with JobProgress("images", num_chosen) as progress:
        for batch in _batches(images, source.batch_size):
            _compare(tokenizer, batch, run["grid"], tally)
            progress.advance(len(batch), f"{tally.num_compared - tally.num_equal} differ")
    return SampleReport(
        settings.share, settings.seed, source.numerics(), num_chosen, tally.num_compared, tally.num_equal,
        tally.num_tokens, tally.num_equal_tokens, {why.value: n for why, n in tally.skipped.items()},
        _three(tally.margins), tuple(tally.differing),
    )  # fmt: skip


def _batches(images: Iterator[SampledImage], size: int) -> Iterator[list[SampledImage]]:
    while batch := list(islice(images, size)):
        yield batch


def _compare(tokenizer: Comparer, batch: Sequence[SampledImage], grid: tuple[int, int], tally: _Tally) -> None:
    tally.skipped.update(image.skipped for image in batch if image.skipped is not None)
    nothing = np.empty(0, np.float32)
    for image in batch:
        if image.problem is not None:
            tally.add(image, grid[0] * grid[1], nothing, image.problem)
    images = [image for image in batch if image.pixels_HWC is not None]
    if not images:
        return
    pixels_BHWC = np.stack([image.pixels_HWC for image in images if image.pixels_HWC is not None])
    stored_BHW = np.stack([image.tokens_N for image in images if image.tokens_N is not None]).reshape(-1, *grid)
    differs_BHW = tokenizer.encode(pixels_BHWC) != stored_BHW
    margins_BHW = tokenizer.margins(pixels_BHWC, stored_BHW) if differs_BHW.any() else np.zeros(stored_BHW.shape)
    for image, differs_HW, margins_HW in zip(images, differs_BHW, margins_BHW, strict=True):
        tally.add(image, differs_HW.size, margins_HW[differs_HW], None)


def _three(margins: list[float]) -> tuple[float, float, float] | None:
    return (min(margins), float(np.median(margins)), max(margins)) if margins else None
