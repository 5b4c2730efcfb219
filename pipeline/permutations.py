"""Random orders that are functions of their key: the same on every machine and with every numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def permutation(length: int, *key: int) -> NDArray[np.int64]:
    """By sorting raw random bits: numpy promises those for all versions, and `Generator.permutation` not."""
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(length)
    return np.argsort(np.asarray(bits, dtype=np.uint64), kind="stable")
