"""A write that hangs is given up, and does not come to pass later."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline import object_writes


class Hanging:
    """As s3fs is while the server says nothing: its own timeouts do not count that wait."""

    async_impl = True

    def __init__(self, loop: asyncio.AbstractEventLoop, hang_s: float, read_timeout_s: float) -> None:
        self.loop, self._hang_s = loop, hang_s
        self.config_kwargs = {"read_timeout": read_timeout_s}
        self.written: dict[str, bytes] = {}

    async def _pipe_file(self, path: str, data: bytes, **options: Any) -> None:
        await asyncio.sleep(self._hang_s)
        self.written[path] = data


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_a_write_that_hangs_is_given_up_after_four_of_the_clients_timeouts_and_never_done(
    loop: asyncio.AbstractEventLoop,
) -> None:
    store = Hanging(loop, hang_s=0.5, read_timeout_s=0.05)
    with pytest.raises(TimeoutError, match="not taken within"):
        object_writes.put(store, "b/k", b"data")
    time.sleep(0.6)
    assert store.written == {}


def test_the_time_for_a_write_grows_with_its_bytes(loop: asyncio.AbstractEventLoop) -> None:
    store = Hanging(loop, hang_s=0.5, read_timeout_s=0.05)
    data = bytes(object_writes.SLOWEST_BYTES_PER_S)
    object_writes.put(store, "b/k", data)
    assert store.written == {"b/k": data}
