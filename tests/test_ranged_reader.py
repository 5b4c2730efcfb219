"""Blocks that fail, come short or never come: the same bytes, in order, each once, in bounded memory."""

from __future__ import annotations

import gzip
import logging
import random
import threading
import tracemalloc
from collections.abc import Callable

import pytest

from pipeline import ranged_reader, store_requests
from pipeline.errors import ShardChanged
from pipeline.ranged_reader import Fetch, RangedReader

DATA = bytes(range(256)) * 3 + b"end"


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_requests, "MAX_PAUSE_S", 0.0)


def from_memory(data: bytes) -> Fetch:
    return lambda start, end: data[start:end]


def read_all(fetch: Fetch, size: int = len(DATA), block: int = 100) -> bytes:
    return RangedReader("x", fetch, size, block).readall()


@pytest.mark.parametrize("block", [1, 7, 256, len(DATA) - 1, len(DATA), len(DATA) + 1])
@pytest.mark.parametrize("size", [1, 3, 100, 512, -1])
def test_reads_the_same_bytes_whatever_the_blocks(block: int, size: int) -> None:
    reader = RangedReader("x", from_memory(DATA), len(DATA), block)
    chunks = list(iter(lambda: reader.read(size), b""))
    assert b"".join(chunks) == DATA
    assert reader.read(size) == reader.read(size) == b""  # and nothing behind the end


def test_an_empty_object_asks_for_nothing() -> None:
    def fetch(start: int, end: int) -> bytes:
        raise AssertionError

    assert read_all(fetch, size=0) == b""


def test_a_block_is_asked_for_once_and_one_at_most_ahead() -> None:
    asked: list[tuple[int, int]] = []
    reader = RangedReader("x", lambda a, b: (asked.append((a, b)), DATA[a:b])[1], len(DATA), 256)
    assert asked == []
    reader.read(1)
    threads = [thread for thread in threading.enumerate() if thread.name == "fetch"]
    for thread in threads:
        thread.join()
    assert asked == [(0, 256), (256, 512)]
    reader.readall()
    assert asked == [(0, 256), (256, 512), (512, 768), (768, 771)]


class Faulty:
    """Fails the n-th request, in its own way, then goes on."""

    def __init__(self, fail_at: int, fail: Callable[[bytes], bytes]) -> None:
        self.count, self._fail_at, self._fail = 0, fail_at, fail

    def __call__(self, start: int, end: int) -> bytes:
        self.count += 1
        data = DATA[start:end]
        return self._fail(data) if self.count == self._fail_at else data


def reset(data: bytes) -> bytes:
    raise ConnectionResetError("reset")


FAULTS = {"reset": reset, "empty": lambda data: b"", "short": lambda data: data[:-1],
          "everything": lambda data: DATA, "long": lambda data: data + b"x"}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("fail_at", range(1, 9))
def test_a_block_that_fails_or_has_another_length_is_asked_for_again_from_its_first_byte(
    fault: str, fail_at: int
) -> None:
    fetch = Faulty(fail_at, FAULTS[fault])
    assert read_all(fetch) == DATA
    assert fetch.count == 9  # eight blocks, and one of them twice


def test_a_cut_at_every_byte_gives_the_same_bytes() -> None:
    """Each block is cut once, at each place in turn."""
    for cut in range(64):
        seen: set[int] = set()

        def fetch(start: int, end: int, cut: int = cut, seen: set[int] = seen) -> bytes:
            first = start not in seen
            seen.add(start)
            return DATA[start : start + cut] if first else DATA[start:end]

        assert read_all(fetch, block=64) == DATA


def test_any_mixture_of_faults_gives_the_same_bytes() -> None:
    for seed in range(50):
        rng = random.Random(seed)

        def fetch(start: int, end: int, rng: random.Random = rng) -> bytes:
            return rng.choice([*FAULTS.values(), *[bytes] * 8])(DATA[start:end])

        assert read_all(fetch, block=rng.randrange(1, 200)) == DATA


def test_a_block_that_never_comes_is_given_up_and_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranged_reader, "BLOCK_TIMEOUT_S", 0.2)
    release = threading.Event()

    def hang(data: bytes) -> bytes:
        release.wait(60)
        return b"too late" * 1000

    try:
        fetch = Faulty(3, hang)
        assert read_all(fetch) == DATA
    finally:
        release.set()


def test_a_store_that_stays_away_is_given_up_after_a_while_and_its_error_raised(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_requests, "PATIENCE_S", 0.3)
    with caplog.at_level(logging.WARNING), pytest.raises(ConnectionResetError):
        read_all(lambda start, end: reset(b""))
    assert "cannot read bytes 0 to 100 of x: ConnectionResetError: reset; trying again in" in caplog.text


def test_what_is_final_is_not_asked_for_again() -> None:
    asked: list[int] = []

    def fetch(start: int, end: int) -> bytes:
        asked.append(start)
        raise ShardChanged("s3://b/x.tar", "was replaced")

    with pytest.raises(ShardChanged):
        read_all(fetch)
    assert asked == [0]


def test_memory_is_that_of_three_blocks_whatever_the_size_of_the_object() -> None:
    block = 1 << 20
    reader = RangedReader("x", lambda start, end: bytes(end - start), 200 * block, block)
    tracemalloc.start()
    try:
        while reader.read(100_000):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * block + 300_000


def test_gzip_reads_through_it() -> None:
    packed = gzip.compress(DATA * 50)
    reader = RangedReader("x", from_memory(packed), len(packed), 37)
    with gzip.GzipFile(fileobj=reader) as stream:  # type: ignore[arg-type]
        assert stream.read() == DATA * 50
