"""Evaluation on held-out images, shared out over the workers, and the pictures that go with it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from jobs.train_config import TrainConfig
from jobs.train_metrics import Figures
from jobs.train_ranks import Ranks
from model.metrics import EvalSums
from model.trainer import Trainer
from pipeline.errors import PipelineError
from pipeline.held_out import held_out_images
from pipeline.rank_chart import draw_ranked
from pipeline.records import ObjectInfo

# N images, H W pixel rows and columns, C = 3 colours, K codes
GAP = 2  # white pixels around each image


class NothingHeldOut(PipelineError):
    """The held-out shards have no usable image."""


@dataclass(frozen=True)
class Evaluated:
    """Over the shares of all ranks. `histogram_K` counts where each code is the argmax."""

    figures: Figures
    histogram_K: NDArray[np.float64]


class Evaluation:
    """Holds this worker's share of the held-out images, decoded once."""

    def __init__(self, config: TrainConfig, shards: tuple[ObjectInfo, ...], ranks: Ranks) -> None:
        self._config, self._ranks = config, ranks
        spec, threads = config.image, config.data.decode_threads
        share = held_out_images(
            shards, spec, config.eval.num_images,
            rank=ranks.rank, world_size=ranks.world_size, decode_threads=threads,
        )  # fmt: skip
        shares = ranks.gather((share.places_N, share.num_bad))
        usable = np.sort(np.concatenate([places for places, _ in shares]))
        self._num_images, self._num_bad = len(usable), sum(num_bad for _, num_bad in shares)
        if not self._num_images:
            raise NothingHeldOut(
                f"data.val_shards: not one of the first {self._num_bad} samples is a usable image of {spec.size} "
                "pixels; name other shards, or set eval.every_steps=0"
            )
        shown = config.eval.num_pictures if ranks.is_first else 0
        # Places among the usable ones, as `dvae eval` counts: the same noise, so the same figures
        self._share = replace(share, places_N=np.searchsorted(usable, share.places_N))
        self._shown_NHWC = held_out_images(shards, spec, shown, decode_threads=threads).pixels_NHWC

    def evaluate(self, trainer: Trainer) -> Evaluated:
        """All ranks must call it."""
        sums = EvalSums.zeros(self._config.model.codebook_size)
        for pixels_BHWC, places_B in self._share.batches(self._config.eval.batch_size):
            sums += trainer.evaluate(pixels_BHWC, places_B)
        total = EvalSums.from_array(np.sum(self._ranks.gather(sums.to_array()), axis=0))
        counts = {"num_images": self._num_images, "num_bad_images": self._num_bad}
        return Evaluated({**total.metrics(self._config.loss.likelihood), **counts}, total.histogram_K)

    def pictures(self, trainer: Trainer, histogram_K: NDArray[np.float64]) -> dict[str, np.ndarray]:
        """By name, (H, W, C): the codes by use; original | soft | hard, one row an image. The first rank's."""
        pictures = {"codes": draw_codes(histogram_K, f"Codes at step {trainer.step:,}")}
        if len(self._shown_NHWC):
            soft_NHWC, hard_NHWC = trainer.reconstruct(self._shown_NHWC, np.arange(len(self._shown_NHWC)))
            pictures["reconstructions"] = side_by_side(self._shown_NHWC, soft_NHWC, hard_NHWC)
        return pictures


def draw_codes(histogram_K: NDArray[np.float64], title: str) -> np.ndarray:
    """(H, W, C): how often each code stands in a grid, with what never does in words."""
    size, num_dead = histogram_K.size, int((histogram_K == 0).sum())
    note = f"{histogram_K.sum():,.0f} positions; {num_dead:,} of {size:,} codes ({num_dead / size:.1%}) stand nowhere"
    if not num_dead:
        note = f"{histogram_K.sum():,.0f} positions; every one of the {size:,} codes is in use"
    return draw_ranked(histogram_K, title=title, note=note, x_label="codes, most used first", y_label="positions")


def side_by_side(*columns_NHWC: np.ndarray) -> np.ndarray:
    """One row an image, one column an argument."""
    edges = ((0, 0), (GAP, GAP), (GAP, GAP), (0, 0))
    framed = [np.pad(column_NHWC, edges, constant_values=255) for column_NHWC in columns_NHWC]
    return np.concatenate(list(np.concatenate(framed, axis=2)), axis=0)
