"""An object read from front to back in blocks, each asked for by its own bytes. Knows no store: a function fetches.

A block that fails, comes short or does not come is asked for again: the same bytes, so that nothing is left out and
nothing comes twice. The next block is under way while one is used, so three blocks at most are held.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait

from pipeline.errors import ShardError
from pipeline.store_requests import ShortAnswer, patiently

BLOCK_BYTES = 4 << 20
BLOCK_TIMEOUT_S = 180.0  # for one that hangs in a client without a timeout; half of a slow line's 100 KB/s must do

Fetch = Callable[[int, int], bytes]
"""(start, end) -> those bytes. A ShardError that it raises is final, any other exception is not."""


class RangedReader(io.RawIOBase):
    """A stream of `size_bytes` bytes. `read` raises what the last try of a block raised."""

    def __init__(self, name: str, fetch: Fetch, size_bytes: int, block_bytes: int = BLOCK_BYTES) -> None:
        self._name, self._fetch, self._size, self._block_bytes = name, fetch, size_bytes, block_bytes
        self._block, self._used = b"", 0  # what is handed out now, and how much of it has been
        self._next = 0  # where the block after it begins
        self._ahead: Future[bytes] | None = None

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, at most to the end of the block; none only at the end of the object."""
        if self._used == len(self._block):
            self._advance()
        end = len(self._block) if size < 0 else min(self._used + size, len(self._block))
        data = self._block[self._used : end]
        self._used = end
        return data

    def readall(self) -> bytes:
        return b"".join(iter(self.read, b""))

    def _advance(self) -> None:
        self._block, self._used = b"", 0  # given back before the next one is waited for
        if self._next == self._size:
            return
        start, end = self._next, min(self._next + self._block_bytes, self._size)
        self._block = self._get(start, end)
        self._next = end
        if end < self._size:
            self._ahead = self._send_for(end, min(end + self._block_bytes, self._size))

    def _get(self, start: int, end: int) -> bytes:
        def get() -> bytes:
            coming, self._ahead = self._ahead or self._send_for(start, end), None
            if not wait([coming], BLOCK_TIMEOUT_S).done:  # it is left behind, and ends when its client gives up
                raise TimeoutError(f"did not come within {BLOCK_TIMEOUT_S:.0f} s")
            block = coming.result()
            if len(block) != end - start:
                raise ShortAnswer(len(block), end - start)
            return block

        return patiently(f"read bytes {start} to {end} of {self._name}", get, _may_pass, min_tries=3)

    def _send_for(self, start: int, end: int) -> Future[bytes]:
        """On a daemon thread of its own: a pool would wait at exit for one that hangs."""
        coming: Future[bytes] = Future()

        def bring() -> None:
            try:
                coming.set_result(self._fetch(start, end))
            except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised where the block is wanted
                coming.set_exception(error)

        threading.Thread(target=bring, name="fetch", daemon=True).start()
        return coming


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, ShardError)
