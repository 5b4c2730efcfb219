"""A write that hangs is given up, and does not come to pass later."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from typing import Any

import pytest

from pipeline import object_writes, store_requests
from pipeline.errors import StorageError


class Hanging:
    """As s3fs is while the server says nothing: its own timeouts do not count that wait."""

    async_impl = True

    def __init__(self, loop: asyncio.AbstractEventLoop, hang_s: float, read_timeout_s: float) -> None:
        self.loop, self._hang_s, self._read_timeout_s = loop, hang_s, read_timeout_s
        self.written: dict[str, bytes] = {}
        self.num_hangs, self.tries = 10**9, 0
        self.let_go = asyncio.Event()

    @property
    def config_kwargs(self) -> dict[str, float]:
        """A write that does not hang has a minute: on a busy machine its thread may come late."""
        return {"read_timeout": self._read_timeout_s if self.tries < self.num_hangs else 60.0}

    def _pipe_file(self, path: str, data: bytes, **options: Any) -> Coroutine[Any, Any, None]:
        self.tries += 1  # here and not in the loop's thread, which may never come to it
        return self._write(path, data, hangs=self.tries <= self.num_hangs)

    async def _write(self, path: str, data: bytes, *, hangs: bool) -> None:
        if hangs:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.let_go.wait(), self._hang_s)
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


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_writes, "SPARE_S", 0.05)
    monkeypatch.setattr(store_requests, "MAX_PAUSE_S", 0.0)


def test_a_write_that_hangs_is_given_up_after_the_clients_timeout_and_never_done(
    loop: asyncio.AbstractEventLoop,
) -> None:
    store = Hanging(loop, hang_s=60, read_timeout_s=0.05)
    with pytest.raises(TimeoutError, match="not taken within"):
        object_writes.put(store, "b/k", b"data")
    loop.call_soon_threadsafe(store.let_go.set)  # a write that was not given up would now be done
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0.1), loop).result(60)
    assert store.written == {}


def test_the_time_for_a_write_grows_with_its_bytes(loop: asyncio.AbstractEventLoop) -> None:
    store = Hanging(loop, hang_s=0.3, read_timeout_s=0.05)
    data = bytes(60 * object_writes.SLOWEST_BYTES_PER_S)
    object_writes.put(store, "b/k", data)
    assert store.written == {"b/k": data}


@pytest.mark.parametrize("num_hangs", [1, 2])
def test_a_write_that_hangs_is_tried_again_though_it_took_all_the_patience(
    loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch, num_hangs: int
) -> None:
    monkeypatch.setattr(store_requests, "PATIENCE_S", 0.05)
    store = Hanging(loop, hang_s=10, read_timeout_s=0.05)
    store.num_hangs = num_hangs
    store_requests.request("write", "s3://b/k", lambda: object_writes.put(store, "b/k", b"data"), writes=True)
    assert store.written == {"b/k": b"data"} and store.tries == num_hangs + 1


def test_a_write_that_always_hangs_is_a_storage_error_after_three_tries(
    loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_requests, "PATIENCE_S", 0.05)
    store = Hanging(loop, hang_s=10, read_timeout_s=0.05)
    with pytest.raises(StorageError, match="not taken within"):
        store_requests.request("write", "s3://b/k", lambda: object_writes.put(store, "b/k", b"data"), writes=True)
    assert store.tries == 3 and store.written == {}


def test_three_small_writes_that_hang_fit_into_the_patience_with_nothing_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    assert 3 * object_writes.time_limit_s(object(), 0) <= store_requests.PATIENCE_S
    assert object_writes.time_limit_s(object(), 0) > object_writes.READ_TIMEOUT_S  # the client's own comes first
