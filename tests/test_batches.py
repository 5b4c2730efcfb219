"""The decode iterator: tar order, batches of one shape, a bounded look-ahead, and nothing left running."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from make_data import image_bytes
from pipeline import batches
from pipeline.batches import decode_sample, pixel_batches
from pipeline.images import ImageSpec, decode_image
from pipeline.metadata import MetadataColumn
from pipeline.records import FailureReason, PixelBatch, RawSample, SampleFailure, Stage

SPEC = ImageSpec(size=16)
BAD = b"not an image"


def sample(index: int, data: bytes | None = None, **changes: Any) -> RawSample:
    data = image_bytes(index) if data is None else data
    values: dict[str, Any] = {
        "key": f"k{index}",
        "index": index,
        "offset": 512 * index,
        "size": len(data),
        "image": data,
    }
    return RawSample(**{**values, **changes})


def no_image(index: int) -> RawSample:
    return sample(index, image=None, failure=FailureReason.NO_IMAGE, detail="members: k.txt")


class Recording(Executor):
    """Decodes at once, in the caller's thread; says how far ahead it was asked to go."""

    def __init__(self) -> None:
        self.submitted = 0

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.submitted += 1
        future: Future[Any] = Future()
        future.set_result(call(*args, **kwargs))
        return future


def run(
    samples: list[RawSample], batch_size: int, executor: Executor | None = None, **options: Any
) -> tuple[list[PixelBatch], list[SampleFailure]]:
    """The batches that have pixels, and the failures of all."""
    found = list(pixel_batches(samples, SPEC, batch_size, executor or Recording(), **options))
    assert all(batch.samples for batch in found[:-1])
    return [batch for batch in found if batch.samples], [failure for batch in found for failure in batch.failures]


@pytest.mark.parametrize("num_samples", [0, 1, 3, 4, 5, 8, 9])
def test_batches_have_one_shape_whatever_the_number_of_samples(num_samples: int) -> None:
    found, failures = run([sample(n) for n in range(num_samples)], 4)
    assert not failures
    assert [batch.pixels_BHWC.shape for batch in found] == [(4, 16, 16, 3)] * -(-num_samples // 4)
    assert [s.index for batch in found for s in batch.samples] == list(range(num_samples))
    for batch in found:
        assert batch.pixels_BHWC.dtype == np.uint8
        assert not batch.pixels_BHWC[len(batch.samples) :].any()  # padding
        for row, one in enumerate(batch.samples):
            assert np.array_equal(batch.pixels_BHWC[row], decode_image(image_bytes(one.index), SPEC).pixels_HWC)


def test_failures_leave_no_gap_in_a_batch_and_stand_in_tar_order() -> None:
    samples = [sample(0), sample(1, BAD), sample(2), no_image(3), sample(4), sample(5, BAD), sample(6)]
    found, failures = run(samples, 3)
    assert [[s.key for s in batch.samples] for batch in found] == [["k0", "k2", "k4"], ["k6"]]
    assert [(f.key, f.index, f.offset, f.stage.value, f.reason.value) for f in failures] == [
        ("k1", 1, 512, "decode", "not_an_image"),
        ("k3", 3, 1536, "read", "no_image"),
        ("k5", 5, 2560, "decode", "not_an_image"),
    ]


def test_failures_come_with_the_batch_that_was_filling_up() -> None:
    bad = {1, 4, 5, 9}
    samples = [sample(n, BAD if n in bad else None) for n in range(10)]
    found = list(pixel_batches(samples, SPEC, 3, Recording()))
    assert [[f.index for f in batch.failures] for batch in found] == [[1], [4, 5], [9]]
    assert [[s.index for s in batch.samples] for batch in found] == [[0, 2, 3], [6, 7, 8], []]
    assert [batch.pixels_BHWC.shape for batch in found] == [(3, 16, 16, 3)] * 2 + [(0, 16, 16, 3)]


def test_a_shard_of_bad_images_only_gives_one_batch_without_pixels() -> None:
    (batch,) = pixel_batches([sample(n, BAD) for n in range(9)], SPEC, 4, Recording())
    assert batch.pixels_BHWC.shape == (0, 16, 16, 3) and not batch.samples
    assert [f.index for f in batch.failures] == list(range(9))


def test_a_batch_says_how_long_its_making_waited_for_bytes() -> None:
    def slowly() -> Iterator[RawSample]:
        for n in range(4):
            time.sleep(0.02)
            yield sample(n)

    first, second = pixel_batches(slowly(), SPEC, 2, Recording())
    assert first.reading_s >= 4 * 0.02, "two batches are read ahead"
    assert second.reading_s < first.reading_s, "nothing is left to wait for"


def test_order_holds_when_later_images_are_decoded_first(monkeypatch: pytest.MonkeyPatch) -> None:
    later = threading.Event()

    def decode(one: RawSample, *rest: Any) -> Any:
        if one.index == 0:
            assert later.wait(60)
        if one.index == 5:
            later.set()
        return decode_sample(one, *rest)

    monkeypatch.setattr(batches, "decode_sample", decode)
    samples = [sample(n, BAD if n % 3 == 1 else None) for n in range(12)]
    with ThreadPoolExecutor(6) as executor:
        found, failures = run(samples, 4, executor)
    assert [s.index for batch in found for s in batch.samples] == [0, 2, 3, 5, 6, 8, 9, 11]
    assert [f.index for f in failures] == [1, 4, 7, 10]


def test_any_number_of_threads_gives_the_same_batches() -> None:
    samples = [sample(n, BAD if n % 5 == 2 else None) for n in range(30)]
    expected, expected_failures = run(samples, 4)
    for threads in (1, 3, 8):
        with ThreadPoolExecutor(threads) as executor:
            found, failures = run(samples, 4, executor)
        assert failures == expected_failures
        assert [batch.samples for batch in found] == [batch.samples for batch in expected]
        assert all(np.array_equal(a.pixels_BHWC, b.pixels_BHWC) for a, b in zip(found, expected, strict=True))


def test_no_more_than_two_batches_are_read_ahead() -> None:
    executor, read = Recording(), 0

    def reading() -> Iterator[RawSample]:
        nonlocal read
        for n in range(100):
            read += 1
            yield sample(n)

    for number, _ in enumerate(pixel_batches(reading(), SPEC, 5, executor), 1):
        assert read == executor.submitted <= 5 * number + 2 * 5
    assert read == 100


def test_no_more_bytes_than_stated_are_read_ahead_but_always_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "AHEAD_BYTES", 3000)
    held: dict[int, int] = {}
    image = image_bytes(1)
    sizes = [len(image), 2500, 200_000, len(image), 1, 999, 2001, 7000, *[len(image)] * 30]

    def reading() -> Iterator[RawSample]:
        for n, size in enumerate(sizes):
            held[n] = size
            most = sorted(held.values())
            assert sum(most) - max(most) < 3000 + 1000, held  # besides the one that was just read
            yield sample(n, image + bytes(size - len(image)) if size >= len(image) else bytes(size))

    failures: list[SampleFailure] = []
    found = 0
    for outcome in batches._decoded_in_order(reading(), SPEC, (), Recording(), ahead=100):
        index = outcome.index if isinstance(outcome, SampleFailure) else outcome[0].index
        assert index == found
        held.pop(index)
        found += 1
    assert found == len(sizes) and not failures


def test_leaving_early_cancels_what_was_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    release = threading.Event()

    def decode(one: RawSample, *rest: Any) -> Any:
        begun.append(one.index)
        if one.index >= 2:
            release.wait(10)
        return decode_sample(one, *rest)

    monkeypatch.setattr(batches, "decode_sample", decode)
    with ThreadPoolExecutor(1) as executor:
        generator = pixel_batches((sample(n) for n in range(50)), SPEC, 2, executor)
        next(generator)
        generator.close()
        release.set()
    assert begun in ([0, 1], [0, 1, 2])  # of the four that were asked for


def test_a_reader_that_fails_ends_the_batches_with_its_error() -> None:
    def reading() -> Iterator[RawSample]:
        yield sample(0)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(pixel_batches(reading(), SPEC, 1, Recording()))


def test_an_error_that_nobody_foresaw_is_not_taken_for_a_bad_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise MemoryError("the machine, not the image")

    monkeypatch.setattr(batches, "decode_image", broken)
    with ThreadPoolExecutor(1) as executor, pytest.raises(MemoryError):
        run([sample(0)], 2, executor)


def test_metadata_comes_with_the_row_and_bad_metadata_is_a_failure_of_its_own_stage() -> None:
    columns = (MetadataColumn("caption", "txt"), MetadataColumn("score", "json.s", "float32"))
    samples = [
        sample(0, members={"txt": b"a cat", "json": b'{"s": 2}'}),
        sample(1),
        sample(2, members={"json": b'{"s": "high"}'}),
        sample(3, members={"txt": b"\xff"}),
    ]
    (batch,), failures = run(samples, 4, columns=columns)
    assert [dict(s.metadata) for s in batch.samples] == [
        {"caption": "a cat", "score": 2.0},
        {"caption": None, "score": None},
    ]
    assert [(f.key, f.stage, f.reason) for f in failures] == [
        ("k2", Stage.METADATA, FailureReason.BAD_METADATA),
        ("k3", Stage.METADATA, FailureReason.BAD_METADATA),
    ]
    assert failures[0].message == "json.s is 'high', not float32"


def test_rows_carry_key_place_and_the_size_of_the_original() -> None:
    (batch,), _ = run([sample(7, image_bytes(7, width=40, height=30))], 1)
    (row,) = batch.samples
    assert (row.key, row.index, row.offset, row.width, row.height) == ("k7", 7, 3584, 40, 30)
    assert row.size == len(image_bytes(7, width=40, height=30))
