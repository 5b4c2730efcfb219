"""Streams of training samples: the same at any number of workers, resumable anywhere, never stuck."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline import training_samples
from pipeline.errors import ShardTruncated, ShardUnreadable, StorageError
from pipeline.held_out import held_out_images
from pipeline.images import ImageSpec
from pipeline.records import ObjectInfo
from pipeline.shard_patterns import expand
from pipeline.training_order import StreamCursor, StreamOptions, window_shards
from pipeline.training_samples import NoUsableImages, TrainingSamples

SPEC = ImageSpec(size=8)


def png(value: int) -> bytes:
    """A flat image by whose colour the sample is known again."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value % 256, value // 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path, values: range, bad: frozenset[int] = frozenset()) -> None:
    with tarfile.open(path, "w") as tar:
        for value in values:
            data = b"no image" if value in bad else png(value)
            info = tarfile.TarInfo(f"{value:04d}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def unequal_shards(folder: Path) -> list[ObjectInfo]:
    for number, values in enumerate((range(0, 3), range(3, 14), range(14, 15), range(15, 21), range(21, 21))):
        write_shard(folder / f"{number}.tar", values)
    return expand([str(folder)])


def options(**changes: object) -> StreamOptions:
    fields = {"image_spec": SPEC, "seed": 3, "batch_size": 8, "num_streams": 4, "shuffle_shards": 2, **changes}
    return StreamOptions(**fields)  # type: ignore[arg-type]


def values_of(pixels_BHWC: NDArray[np.uint8]) -> list[int]:
    return [int(p[0, 0, 0]) + 256 * int(p[0, 0, 1]) for p in pixels_BHWC]


def global_batches(shards: list[ObjectInfo], opts: StreamOptions, world_size: int, num: int) -> list[list[int]]:
    ranks = [TrainingSamples(shards, opts, rank=r, world_size=world_size) for r in range(world_size)]
    out = []
    for _ in range(num):
        slots: dict[int, int] = {}
        for rank in ranks:
            batch = rank.next_batch()
            slots.update(zip(batch.slots_B.tolist(), values_of(batch.pixels_BHWC), strict=True))
        out.append([slots[slot] for slot in range(opts.batch_size)])
    for rank in ranks:
        rank.close()
    return out


def test_order_is_the_same_for_one_to_four_workers_on_unequal_shards(tmp_path: Path) -> None:
    """Three workers have unequal shares: one, one and two of the four streams."""
    shards = unequal_shards(tmp_path)
    one, two, three, four = (global_batches(shards, options(), world_size, 12) for world_size in (1, 2, 3, 4))
    assert one == two == three == four
    assert len({tuple(batch) for batch in one}) == 12


def test_another_seed_gives_another_order(tmp_path: Path) -> None:
    shards = unequal_shards(tmp_path)
    assert global_batches(shards, options(), 1, 4) != global_batches(shards, options(seed=4), 1, 4)


def test_every_image_comes_equally_often(tmp_path: Path) -> None:
    shards = unequal_shards(tmp_path)
    one_stream = options(num_streams=1, batch_size=1, shuffle_shards=1)
    epochs = 4
    seen = Counter(value for (value,) in global_batches(shards, one_stream, 1, 21 * epochs))
    assert seen == {value: epochs for value in range(21)}


def test_each_epoch_gives_the_shards_in_an_order_of_its_own(tmp_path: Path) -> None:
    one_stream = options(num_streams=1, batch_size=1, shuffle_shards=50)
    first, second = (window_shards(one_stream, 0, epoch, 50) for epoch in range(2))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


def test_streams_share_an_epoch_without_overlap() -> None:
    opts = options(num_streams=4, shuffle_shards=5)
    turns = [window_shards(opts, stream, 0, 20) for stream in range(4)]
    assert sorted(place for places in turns for place in places) == list(range(20))


@pytest.mark.parametrize("position", range(0, 14))
def test_resumed_at_any_position_a_stream_goes_on_as_if_never_stopped(tmp_path: Path, position: int) -> None:
    shards = unequal_shards(tmp_path)
    undisturbed = TrainingSamples(shards, options(augment="flip"))
    for _ in range(position):
        undisturbed.next_batch()
    kept = [StreamCursor.from_json(c.to_json()) for _, c in sorted(undisturbed.cursors().items())]
    resumed = [TrainingSamples(shards, options(augment="flip"), rank=r, world_size=2, cursors=kept) for r in (0, 1)]
    for _ in range(5):
        expected = undisturbed.next_batch().pixels_BHWC
        halves = [rank.next_batch().pixels_BHWC for rank in resumed]
        np.testing.assert_array_equal(np.concatenate(halves), expected)
    rows = {**resumed[0].cursors(), **resumed[1].cursors()}
    assert rows == undisturbed.cursors()


def test_fewer_shards_than_streams_never_run_dry(tmp_path: Path) -> None:
    write_shard(tmp_path / "only.tar", range(3))
    many = global_batches(expand([str(tmp_path)]), options(num_streams=8, batch_size=16), 8, 20)
    assert {value for batch in many for value in batch} == {0, 1, 2}


def test_bad_images_are_skipped_and_counted(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", range(10), bad=frozenset({2, 7}))
    one_stream = options(num_streams=1, batch_size=1, shuffle_shards=1)
    samples = TrainingSamples(expand([str(tmp_path)]), one_stream)
    seen = [values_of(samples.next_batch().pixels_BHWC)[0] for _ in range(8)]
    assert sorted(seen) == [0, 1, 3, 4, 5, 6, 8, 9]
    for _ in range(8):
        samples.next_batch()
    cursor = samples.cursors()[0]
    assert (cursor.num_used, cursor.num_bad) in {(16, 3), (16, 4)}  # the last bad ones may still lie ahead


def test_an_unreadable_shard_is_counted_once_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(training_samples, "RETRY_PAUSE_S", 0.0)
    write_shard(tmp_path / "a.tar", range(4))
    write_shard(tmp_path / "b.tar", range(4, 8))
    shards = expand([str(tmp_path)])
    (tmp_path / "b.tar").write_bytes((tmp_path / "b.tar").read_bytes()[:1024])
    seen = global_batches(shards, options(num_streams=1, batch_size=2, shuffle_shards=1), 1, 6)
    assert {value for batch in seen for value in batch} == {0, 1, 2, 3}
    samples = TrainingSamples(shards, options(num_streams=1, batch_size=2, shuffle_shards=1))
    for _ in range(6):
        samples.next_batch()
    assert samples.cursors()[0].failed_shards == (1,)
    assert "b.tar" in caplog.text


def test_a_store_that_fails_once_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = unequal_shards(tmp_path)
    expected = global_batches(shards, options(), 1, 6)
    real, failed = training_samples.read_samples, set[str]()

    def flaky(shard: ObjectInfo):  # type: ignore[no-untyped-def]
        for number, sample in enumerate(real(shard)):
            if number and shard.url not in failed:
                failed.add(shard.url)
                raise OSError("connection reset")
            yield sample

    monkeypatch.setattr(training_samples, "RETRY_PAUSE_S", 0.0)
    monkeypatch.setattr(training_samples, "read_samples", flaky)
    assert global_batches(shards, options(), 1, 6) == expected
    assert failed


def test_a_store_that_goes_on_failing_is_an_error_and_no_shard_is_at_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(shard: ObjectInfo) -> NoReturn:
        raise ShardUnreadable(shard.url, "connection reset")

    monkeypatch.setattr(training_samples, "RETRY_PAUSE_S", 0.0)
    monkeypatch.setattr(training_samples, "read_samples", away)
    samples = TrainingSamples(unequal_shards(tmp_path), options())
    with pytest.raises(StorageError, match=r"training shard .*\.tar cannot be read: .*connection reset"):
        samples.next_batch()
    assert not any(cursor.failed_shards for cursor in samples.cursors().values())


def test_so_many_shards_without_a_usable_image_are_an_error_before_all_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_samples, "MOST_FRUITLESS", 3)
    for number in range(12):
        write_shard(tmp_path / f"{number:02}.tar", range(2), bad=frozenset(range(2)))
    with pytest.raises(NoUsableImages, match=r"of [123] training shards in a row \(of 12, data\.train_shards\)"):
        TrainingSamples(expand([str(tmp_path)]), options(num_streams=1, shuffle_shards=1)).next_batch()


@pytest.mark.parametrize("shards", [[range(0, 0)], [range(0, 0), range(0, 3)]])
def test_a_pass_without_one_usable_image_is_an_error_not_a_loop(tmp_path: Path, shards: list[range]) -> None:
    for number, values in enumerate(shards):
        write_shard(tmp_path / f"{number}.tar", values, bad=frozenset(values))
    with pytest.raises(NoUsableImages, match=r"data\.train_shards"):
        TrainingSamples(expand([str(tmp_path)]), options()).next_batch()


def test_one_good_image_among_empty_shards_is_enough(tmp_path: Path) -> None:
    for number in range(6):
        write_shard(tmp_path / f"{number}.tar", range(0))
    write_shard(tmp_path / "good.tar", range(1))
    assert global_batches(expand([str(tmp_path)]), options(), 2, 3) == [[0] * 8] * 3


@pytest.mark.parametrize(("num_streams", "world_size"), [(4, 1), (4, 3), (64, 10), (7, 7)])
def test_streams_are_shared_out_whole_in_order_and_as_evenly_as_can_be(num_streams: int, world_size: int) -> None:
    opts = options(num_streams=num_streams, batch_size=num_streams)
    shares = [opts.streams_of(rank, world_size) for rank in range(world_size)]
    assert [stream for share in shares for stream in share] == list(range(num_streams))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_workers_than_streams_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"5 workers are more than data\.num_streams 4"):
        TrainingSamples(unequal_shards(tmp_path), options(), rank=0, world_size=5)


def test_held_out_images_are_the_first_ones_shared_out_by_rank(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", range(3), bad=frozenset({1}))
    write_shard(tmp_path / "b.tar", range(3, 9))
    shards = expand([str(tmp_path)])
    whole = held_out_images(shards, SPEC, 6)
    assert (values_of(whole.pixels_NHWC), whole.num_bad) == ([0, 2, 3, 4, 5], 1)
    shares = [held_out_images(shards, SPEC, 6, rank=r, world_size=2) for r in (0, 1)]
    assert [values_of(s.pixels_NHWC) for s in shares] == [[0, 2, 4], [3, 5]]
    assert [list(share.places_N) for share in (whole, *shares)] == [[0, 2, 3, 4, 5], [0, 2, 4], [3, 5]]
    assert [(values_of(pixels), list(places)) for pixels, places in whole.batches(2)] == [
        ([0, 2], [0, 2]),
        ([3, 4], [3, 4]),
        ([5], [5]),
    ]


def test_a_held_out_shard_that_is_cut_is_an_error(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", range(3))
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:1024])
    with pytest.raises(ShardTruncated):
        held_out_images(expand([str(tmp_path)]), SPEC, 6)
