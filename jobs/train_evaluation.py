"""Evaluation on held-out images, shared out over the workers, and the picture that goes with it."""

from __future__ import annotations

import numpy as np

from jobs.train_config import TrainConfig
from jobs.train_metrics import Figures
from jobs.train_ranks import Ranks
from model.metrics import EvalSums
from model.trainer import Trainer
from pipeline.errors import PipelineError
from pipeline.held_out import batches, held_out_images
from pipeline.records import ObjectInfo

# N images, H W pixel rows and columns, C = 3 colours
GAP = 2  # white pixels around each image


class NothingHeldOut(PipelineError):
    """The held-out shards have no usable image."""


class Evaluation:
    """Holds this worker's share of the held-out images, decoded once."""

    def __init__(self, config: TrainConfig, shards: tuple[ObjectInfo, ...], ranks: Ranks) -> None:
        self._config, self._ranks = config, ranks
        spec, threads = config.image, config.data.decode_threads
        share = held_out_images(
            shards, spec, config.eval.num_images,
            rank=ranks.rank, world_size=ranks.world_size, decode_threads=threads,
        )  # fmt: skip
        self._pixels_NHWC = share.pixels_NHWC
        counts = ranks.gather((len(share.pixels_NHWC), share.num_bad))
        self._num_images, self._num_bad = (sum(column) for column in zip(*counts, strict=True))
        if not self._num_images:
            raise NothingHeldOut(
                f"data.val_shards: not one of the first {self._num_bad} samples is a usable image of {spec.size} "
                "pixels; name other shards, or set eval.every_steps=0"
            )
        shown = config.eval.num_pictures if ranks.is_first else 0
        self._shown_NHWC = held_out_images(shards, spec, shown, decode_threads=threads).pixels_NHWC

    def figures(self, trainer: Trainer) -> Figures:
        """Over the shares of all ranks, which must all call it."""
        sums = EvalSums.zeros(self._config.model.codebook_size)
        for pixels_BHWC in batches(self._pixels_NHWC, self._config.eval.batch_size):
            sums += trainer.evaluate(pixels_BHWC)
        total = np.sum(self._ranks.gather(sums.to_array()), axis=0)
        counts = {"num_images": self._num_images, "num_bad_images": self._num_bad}
        return {**EvalSums.from_array(total).metrics(), **counts}

    def picture(self, trainer: Trainer) -> np.ndarray | None:
        """Original | soft | hard, one row an image. The first rank's."""
        if not len(self._shown_NHWC):
            return None
        soft_NHWC, hard_NHWC = trainer.reconstruct(self._shown_NHWC)
        return side_by_side(self._shown_NHWC, soft_NHWC, hard_NHWC)


def side_by_side(*columns_NHWC: np.ndarray) -> np.ndarray:
    """One row an image, one column an argument."""
    edges = ((0, 0), (GAP, GAP), (GAP, GAP), (0, 0))
    framed = [np.pad(column_NHWC, edges, constant_values=255) for column_NHWC in columns_NHWC]
    return np.concatenate(list(np.concatenate(framed, axis=2)), axis=0)
