"""One worker's share of a global batch, cut into what one forward pass takes.

The loss is a mean over the global batch. So what a forward pass gives, a mean over its own images, enters with
their share of that batch: then neither unequal shares nor the number of passes change anything but rounding.
"""
# B images of one pass, C channels, H W rows and columns of pixels

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Pixels = Tensor | NDArray[np.uint8]


class MicroBatch(NamedTuple):
    """The images of one forward pass, and their positions in the global batch."""

    pixels_BHWC: Pixels
    slots_B: NDArray[np.int64]
    batch_size: int  # of the global batch
    is_last: bool  # of this worker's: with it, gradients are averaged over the workers

    @property
    def share(self) -> float:
        """Of the global batch."""
        return len(self.slots_B) / self.batch_size

    def weight(self, world_size: int) -> float:
        """Of its mean loss, once DDP has divided the sum over the workers by their number. Exactly 1 where all
        workers have one equal share."""
        return len(self.slots_B) * world_size / self.batch_size


def micro_batches(
    pixels_BHWC: Pixels, slots_B: NDArray[np.int64], batch_size: int, largest: int | None
) -> list[MicroBatch]:
    """As few as `largest` images each allow (None: any number), as equal as can be, in order."""
    num_images = len(slots_B)
    count = math.ceil(num_images / (largest or num_images))
    cuts = [num_images * i // count for i in range(count + 1)]
    return [
        MicroBatch(pixels_BHWC[start:end], slots_B[start:end], batch_size, end == num_images)
        for start, end in pairwise(cuts)
    ]
