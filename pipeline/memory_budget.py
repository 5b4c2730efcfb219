"""A number of bytes that threads share: who wants more than is free waits its turn. And how the heap is kept."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

_M_MMAP_THRESHOLD = -3  # malloc.h
MAPPED_FROM_BYTES = 1 << 20


def keep_large_blocks_apart() -> None:
    """glibc by itself raises the size from which a block is mapped apart, up to 32 MiB, as such blocks are freed. Then
    images and batches lie among small blocks, and the heap grows with the length of a shard. Does nothing elsewhere."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)


class MemoryBudget:
    """Counts what is said to be held, not what is allocated. First come, first served, so that a large claim is not
    passed by small ones for ever; a claim above the whole budget is held alone. Claims are not nested: a thread that
    holds one and asks for another may wait for itself."""

    def __init__(self, total_bytes: int) -> None:
        self._total = self._free = total_bytes
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()

    @contextmanager
    def hold(self, num_bytes: int) -> Iterator[None]:
        """Waits until they are free, and holds them for the block."""
        claim = min(num_bytes, self._total)
        with self._changed:
            if self._queue or self._free < claim:
                self._wait_for(claim)
            self._free -= claim
        try:
            yield
        finally:
            with self._changed:
                self._free += claim
                if self._queue:
                    self._changed.notify_all()

    def _wait_for(self, claim: int) -> None:
        ticket = object()
        self._queue.append(ticket)
        try:
            self._changed.wait_for(lambda: self._queue[0] is ticket and self._free >= claim)
        finally:
            self._queue.remove(ticket)
            self._changed.notify_all()  # the next one looks when this thread has let go, its own share taken
