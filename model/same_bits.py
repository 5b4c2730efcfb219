"""Faster ways on the CPU that give the same bits as the plain ones: tried when a tokenizer is loaded.

Which order a kernel adds in depends on shapes and on the machine, never on the values. So a way that gives every bit
of the plain way on random data, with the real weights and shapes, gives it always; it is taken where it does so and is
not slower. Another machine may choose otherwise, and no token hangs on it.
"""
# N positions, n of one block, K codes, k of one block, C channels

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.code_search import CodeSearch
from model.quantizer import CodeTables

BLOCK_BYTES = (
    3 << 18
)  # under the worker's mmap threshold of 1 MiB: such memory comes from the heap, without page faults
LEAST_CODES, MOST_IN_BLOCK = 2048, 1024
TRIES = 5
NEARLY = 1.25


class PackedSearch:
    """As CodeSearch and in chunks of as many rows, with oneDNN's product of packed keys, a block of codes at a time.
    Raises AttributeError where this torch has none. (MKL's product leaves a quarter of an AMD core unused.)"""

    def __init__(self, tables: CodeTables, rows: int) -> None:
        operators, self._rows = torch.ops.mkldnn, rows
        self._product: Callable[..., Tensor] = operators._linear_pointwise
        keys_KC, bias_K = tables.keys_KC, tables.key_bias_K
        self._blocks: list[tuple[Any, Tensor | None, int]] = [
            (
                operators._reorder_linear_weight(keys_KC[start : start + step].contiguous(), rows),
                None if bias_K is None else bias_K[start : start + step].contiguous(),
                start,
            )
            for step in [codes_in_block(rows)]
            for start in range(0, len(keys_KC), step)
        ]

    def __call__(self, z_NC: Tensor) -> Tensor:
        return torch.cat([self._best(z_nC.float()) for z_nC in torch.split(z_NC, self._rows)])

    def logits(self, z_NC: Tensor) -> Tensor:
        """All of them, to compare."""
        return torch.cat([torch.cat(list(self._logits(z_nC)), dim=1) for z_nC in torch.split(z_NC, self._rows)])

    def _logits(self, z_nC: Tensor) -> Iterator[Tensor]:
        for keys, bias_k, _ in self._blocks:
            yield self._product(z_nC, keys, bias_k, "none", [], "")

    def _best(self, z_nC: Tensor) -> Tensor:
        best_n, rows_n = np.full(len(z_nC), -np.inf, np.float32), np.arange(len(z_nC))
        tokens_n = np.zeros(len(z_nC), np.int32)
        for logits_nk, (_, _, start) in zip(self._logits(z_nC), self._blocks, strict=True):
            at_n = logits_nk.numpy().argmax(axis=1)
            found_n = logits_nk.numpy()[rows_n, at_n]
            better_n = found_n > best_n  # strictly: the first of equal codes stays
            np.copyto(best_n, found_n, where=better_n)
            np.copyto(tokens_n, at_n + start, where=better_n, casting="same_kind")
        return torch.from_numpy(tokens_n)


def codes_in_block(rows: int) -> int:
    """A power of two, whose logits for so many rows fit."""
    fitting = max(1, BLOCK_BYTES // (4 * rows))
    return min(MOST_IN_BLOCK, 1 << (fitting.bit_length() - 1))


def packed_search(tables: CodeTables, plain: CodeSearch, num_rows: int) -> PackedSearch | None:
    """None where it would differ from `plain`, be slower, or cannot be had. Tried on a chunk, and on as many rows as
    are left over in a batch's last: that is another shape."""
    if tables.keys_KC.device.type != "cpu" or len(tables.keys_KC) < LEAST_CODES:
        return None
    try:
        packed = PackedSearch(tables, plain.rows)
    except (AttributeError, RuntimeError):  # another build of torch: no such operator, or none for this CPU
        return None
    z_NC = torch.randn(plain.rows + num_rows % plain.rows, tables.keys_KC.shape[1], generator=seeded()).relu_()
    if not torch.equal(packed.logits(z_NC), plain.logits(z_NC)):
        return None
    return packed if _time_ratio(lambda: packed(z_NC), lambda: plain(z_NC)) < 1.0 else None


def images_at_once(batch_size: int, bytes_per_image: int) -> int:
    """How many images have activations that fit a block: a divisor of the batch; the batch where that is none."""
    fitting = [n for n in range(1, batch_size) if batch_size % n == 0 and n * bytes_per_image <= BLOCK_BYTES]
    return max(fitting, default=batch_size)


def is_better(way: Callable[[], Tensor], plain: Callable[[], Tensor]) -> bool:
    """The same bits with less memory, and not in much more time: what the larger memory costs, the trial doesn't show.
    In a run other threads allocate in between, so that the kernel gives it anew for each batch (measured: 240 page
    faults an image, a twelfth of all CPU time, where a batch at once looked as fast as its parts)."""
    return torch.equal(way().clone(), plain()) and _time_ratio(way, plain) < NEARLY


def seeded() -> torch.Generator:
    """Random numbers of our own: loading a tokenizer changes nothing in a training run beside it."""
    return torch.Generator().manual_seed(0)


def _time_ratio(way: Callable[[], object], plain: Callable[[], object]) -> float:
    """Of the shortest of a few runs each, in turns: another program's burst of work meets both."""
    times = [(_seconds(way), _seconds(plain)) for _ in range(TRIES)]
    ways, plains = zip(*times, strict=True)
    return float(min(ways) / min(plains))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
