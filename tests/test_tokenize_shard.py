"""One shard, start to finish: nothing lost, the same bytes whatever happens, and nothing published by halves."""

from __future__ import annotations

import gzip
import io
import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from make_data import (
    FakeTokenizer,
    Killed,
    MortalStore,
    fake_table,
    folder_bytes,
    image_bytes,
    listed,
    sample_members,
    tar_bytes,
    write_shards,
)
from pipeline import shard_stream, storage
from pipeline.decode_shard import ThreadDecoder
from pipeline.errors import ShardChanged, ShardError, ShardTruncated, ShardUnreadable, StorageError
from pipeline.images import ImageSpec, decode_image
from pipeline.ledger import Ledger
from pipeline.metadata import MetadataColumn
from pipeline.output import OutputPrefix, RunDescription, claim, part_name
from pipeline.plan import ShardTask, make_plan
from pipeline.records import FailureReason, ObjectInfo, PixelBatch, ShardState
from pipeline.stage_times import StageTimes
from pipeline.tokenize_shard import TokenizeJob, TokenizeWorker, quarantine

CAPTION = MetadataColumn("caption", "txt")
SCORE = MetadataColumn("score", "json.score", "float32")
BAD = [
    ("torn.jpg", image_bytes(1)[:-60]),
    ("text.jpg", b"not an image"),
    ("alone.txt", b"a caption of nothing"),
    ("tiny.png", image_bytes(2, "PNG", 4, 4)),
]


def task_of(shard: ObjectInfo) -> ShardTask:
    return ShardTask(shard, part_name(shard.url))


@contextmanager
def worker(output: str, tokenizer: Any = None, **changes: Any) -> Iterator[TokenizeWorker]:
    columns = changes.pop("columns", (CAPTION,))
    values = {"batch_size": 4, "decode_threads": 2, **changes}
    job = TokenizeJob(OutputPrefix(output), fake_table(columns=columns), **values)
    with closing(TokenizeWorker(tokenizer or FakeTokenizer(), job)) as made:
        yield made


def write(folder: Path, members: list[tuple[str, bytes]], name: str = "x.tar") -> ObjectInfo:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(tar_bytes(members))
    return listed(folder / name)


def rows(folder: Path, kind: str = "tokens") -> list[dict[str, Any]]:
    found = [pq.read_table(path).to_pylist() for path in sorted((folder / kind).glob("*.parquet"))]
    return [row for table in found for row in table]


# Accounting


def test_each_image_has_one_row_in_tar_order_with_its_own_tokens(tmp_path: Path) -> None:
    shard = write(tmp_path, sample_members(0, 11))
    with worker(str(tmp_path / "out"), columns=(CAPTION, SCORE)) as one:
        result = one.tokenize(task_of(shard))
    found = rows(tmp_path / "out")
    assert [(r["key"], r["index"]) for r in found] == [(f"img{n:05d}", n) for n in range(11)]
    for number, row in enumerate(found):
        pixels_HWC = decode_image(image_bytes(number), ImageSpec(size=16)).pixels_HWC
        assert row["tokens"] == pixels_HWC[::8, ::8, 0].reshape(-1).tolist()
        assert storage.read_range(shard.url, row["offset"], row["size"]) == image_bytes(number)
        assert (row["shard"], row["width"], row["height"]) == (shard.url, 24, 20)
        assert (row["caption"], row["score"]) == (f"picture {number}", number + 0.5)
    assert (result.shard, result.state, result.num_rows, result.num_failed) == (shard.url, ShardState.DONE, 11, 0)
    assert not (tmp_path / "out" / "errors").exists()


@pytest.mark.parametrize("num_good", [0, 1, 3, 4, 5, 9])
def test_rows_and_errors_together_are_the_samples_of_the_tar(tmp_path: Path, num_good: int) -> None:
    shard = write(tmp_path, [*BAD[:2], *sample_members(0, num_good), *BAD[2:], ("img00000.jpg", b"again")])
    with worker(str(tmp_path / "out")) as one:
        result = one.tokenize(task_of(shard))
    tokens, errors = rows(tmp_path / "out"), rows(tmp_path / "out", "errors")
    assert (result.num_rows, result.num_failed) == (len(tokens), len(errors))
    assert sorted(r["index"] for r in [*tokens, *errors]) == list(range(num_good + 5))
    assert [r["index"] for r in errors] == sorted(r["index"] for r in errors)
    reasons = {r["key"]: (r["stage"], r["reason"]) for r in errors}
    assert reasons == {
        "torn": ("decode", "truncated_image"), "text": ("decode", "not_an_image"), "alone": ("read", "no_image"),
        "tiny": ("decode", "too_small"),
        "img00000": ("read", "duplicate_key") if num_good else ("decode", "not_an_image"),
    }  # fmt: skip


@pytest.mark.parametrize("members", [[], BAD])
def test_a_shard_without_a_good_image_gives_a_valid_part_without_rows(
    tmp_path: Path, members: list[tuple[str, bytes]]
) -> None:
    whole, empty = write(tmp_path, sample_members(0, 3), "whole.tar"), write(tmp_path, members, "empty.tar")
    with worker(str(tmp_path / "out")) as one:
        one.tokenize(task_of(whole))
        result = one.tokenize(task_of(empty))
    assert (result.num_rows, result.num_failed) == (0, len(members))
    files = [pq.read_table(path) for path in (tmp_path / "out" / "tokens").iterdir()]
    assert files[0].schema.remove_metadata() == files[1].schema.remove_metadata()
    assert sorted(len(file) for file in files) == [0, 3]
    assert len(rows(tmp_path / "out", "errors")) == len(members)
    assert (tmp_path / "out" / "errors").exists() == bool(members)


def test_a_gzipped_shard_has_rows_without_offsets(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(tar_bytes(sample_members(0, 3))))
    with worker(str(tmp_path / "out")) as one:
        one.tokenize(task_of(listed(tmp_path / "x.tar.gz")))
    assert [r["offset"] for r in rows(tmp_path / "out")] == [None] * 3


def test_options_of_the_job_reach_the_reader(tmp_path: Path) -> None:
    data = tar_bytes([("a.left", image_bytes(0)), ("a.jpg", image_bytes(1))])
    (tmp_path / "x.tar").write_bytes(data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512))  # no end marker
    task = task_of(listed(tmp_path / "x.tar"))
    with worker(str(tmp_path / "out")) as one, pytest.raises(ShardTruncated):
        one.tokenize(task)
    with worker(str(tmp_path / "out"), require_end_marker=False, image_extensions=("left",)) as one:
        one.tokenize(task)
    (row,) = rows(tmp_path / "out")
    assert row["size"] == len(image_bytes(0))


# The same bytes


def test_neither_threads_nor_batch_size_nor_the_worker_change_a_byte(tmp_path: Path) -> None:
    shard = write(tmp_path, [*sample_members(0, 9), *BAD])
    folders = []
    for number, changes in enumerate(({}, {"decode_threads": 7}, {"batch_size": 1}, {"batch_size": 64})):
        with worker(str(tmp_path / f"out{number}"), **changes) as one:
            one.tokenize(task_of(shard))
            one.tokenize(task_of(shard))  # and once more over itself
        folders.append([folder_bytes(tmp_path / f"out{number}" / kind) for kind in ("tokens", "errors")])
    assert all(folder == folders[0] for folder in folders) and all(folders[0])


class Counting(FakeTokenizer):
    """Knows what it was given."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def encode(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        assert pixels_BHWC.dtype == np.uint8
        self.shapes.append(pixels_BHWC.shape)
        time.sleep(0.005)  # as a model takes its time
        return super().encode(pixels_BHWC)


def test_the_encoder_sees_one_shape_only(tmp_path: Path) -> None:
    tokenizer = Counting()
    with worker(str(tmp_path / "out"), tokenizer) as one:
        for number, shard in enumerate(write_shards(tmp_path / "in", [1, 4, 5, 0, 11])):
            assert one.tokenize(task_of(shard)).num_rows == [1, 4, 5, 0, 11][number]
    assert tokenizer.shapes == [(4, 16, 16, 3)] * (1 + 1 + 2 + 0 + 3)


class Openings:
    """Counts the shards that are open, at once and in all, and lets others wait for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = self.in_all = 0
        self._changed = threading.Condition()
        real = shard_stream.open_shard

        def open_shard(shard: ObjectInfo) -> BinaryIO:
            stream = real(shard)
            close = stream.close
            self._count(1)
            stream.close = lambda: (self._count(-1), close())  # type: ignore[method-assign,func-returns-value]
            return stream

        monkeypatch.setattr(shard_stream, "open_shard", open_shard)

    def _count(self, change: int) -> None:
        with self._changed:
            self.now += change
            self.most = max(self.most, self.now)
            self.in_all += max(change, 0)
            self._changed.notify_all()

    def wait_for(self, number: int) -> bool:
        """In all: a small shard may be read to its end, and closed, before the other is opened."""
        with self._changed:
            return self._changed.wait_for(lambda: self.in_all >= number, 60)


def test_while_one_shards_batch_is_encoded_another_is_read_and_never_more_than_were_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_shards(tmp_path / "in", [6, 5, 9, 1, 8, 4])
    with worker(str(tmp_path / "alone")) as one:
        for shard in shards:
            one.tokenize(task_of(shard))
    openings = Openings(monkeypatch)

    class Waiting(Counting):
        def encode(self, pixels_BHWC: np.ndarray) -> np.ndarray:
            assert openings.wait_for(2), "no second shard was opened while this one is encoded"
            return super().encode(pixels_BHWC)

    with worker(str(tmp_path / "side by side"), Waiting()) as one, ThreadPoolExecutor(2) as calls:
        list(calls.map(one.tokenize, map(task_of, shards)))
    assert openings.most <= 2 and openings.now == 0 and openings.in_all == len(shards)
    assert folder_bytes(tmp_path / "side by side" / "tokens") == folder_bytes(tmp_path / "alone" / "tokens")


@pytest.mark.parametrize("held_up", ["publish", "look_at"])
def test_while_one_shard_is_written_or_opened_the_encoder_has_all_batches_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_up: str
) -> None:
    """A PUT (or an answer to the first request) that comes only when the other shard is encoded to its end."""
    first, second = write_shards(tmp_path / "in", [6, 21])
    real, other_is_encoded, waiting = getattr(storage, held_up), threading.Event(), threading.Event()

    def slow(url: str, *data: bytes) -> Any:
        if Path(first.url).stem in url:
            waiting.set()
            assert other_is_encoded.wait(60), "the encoder waited for the store"
        return real(url, *data)

    class Encoder(FakeTokenizer):
        def encode(self, pixels_BHWC: np.ndarray) -> np.ndarray:
            self.num_batches = getattr(self, "num_batches", 0) + 1
            if self.num_batches == 6 + (2 if held_up == "publish" else 0):
                other_is_encoded.set()
            return super().encode(pixels_BHWC)

    monkeypatch.setattr(storage, held_up, slow)
    with worker(str(tmp_path / "out"), Encoder()) as one, ThreadPoolExecutor(2) as calls:
        slow_call = calls.submit(one.tokenize, task_of(first))
        assert waiting.wait(60)
        assert calls.submit(one.tokenize, task_of(second)).result().num_rows == 21
        assert slow_call.result().num_rows == 6


def test_calls_meet_in_the_tokenizer_only(tmp_path: Path) -> None:
    """It may have two batches at once: one on its way to the device while the other is encoded."""
    together = threading.Barrier(2)

    class Encoder(FakeTokenizer):
        def encode(self, pixels_BHWC: np.ndarray) -> np.ndarray:
            together.wait(60)
            return super().encode(pixels_BHWC)

    shards = write_shards(tmp_path / "in", [4, 4])
    with worker(str(tmp_path / "out"), Encoder()) as one, ThreadPoolExecutor(2) as calls:
        assert [result.num_rows for result in calls.map(one.tokenize, map(task_of, shards))] == [4, 4]


def test_a_worker_says_where_its_time_went(tmp_path: Path) -> None:
    class Slow(FakeTokenizer):
        def encode(self, pixels_BHWC: np.ndarray) -> np.ndarray:
            time.sleep(0.05)
            return super().encode(pixels_BHWC)

    with worker(str(tmp_path / "out"), Slow()) as one:
        one.tokenize(task_of(write(tmp_path, sample_members(0, 11))))
        times = one.take_times()
        assert times.encode_s >= times.model_busy_s >= 3 * 0.05
        assert min(times.read_s, times.pixels_s, times.write_s) > 0
        stages_s = times.read_s + times.pixels_s + times.encode_s + times.write_s
        # One shard at a time: the stages are all there is, but for what a busy machine takes between them.
        assert 0.5 * times.open_s <= stages_s <= 1.01 * times.open_s
        assert one.take_times() == StageTimes()


def test_pixels_may_come_from_elsewhere_and_be_read_only(tmp_path: Path) -> None:
    """As a view of the object store is."""
    members = [*sample_members(0, 9), *BAD]
    shard = write(tmp_path, members)

    class Elsewhere(ThreadDecoder):
        def batches(self, shard: ObjectInfo) -> Generator[PixelBatch, None, None]:
            for batch in super().batches(shard):
                batch.pixels_BHWC.flags.writeable = False
                yield batch

    job = TokenizeJob(OutputPrefix(str(tmp_path / "out")), fake_table(columns=(CAPTION,)), 4, 2)
    with (
        worker(str(tmp_path / "here")) as here,
        closing(TokenizeWorker(FakeTokenizer(), job, Elsewhere(job.decoding))) as there,
    ):
        assert here.tokenize(task_of(shard)).num_rows == there.tokenize(task_of(shard)).num_rows
    for kind in ("tokens", "errors"):
        assert folder_bytes(tmp_path / "out" / kind) == folder_bytes(tmp_path / "here" / kind)


# Commit


def mortal_run(shard_bytes: bytes, *, stale_errors: bool) -> tuple[ShardTask, Callable[[], None]]:
    """A shard in a mortal store, and what a run does: plan, then tokenise what is to be done."""
    MortalStore.fresh()
    storage.publish("mortal://in/x.tar", shard_bytes)
    shard = ObjectInfo("mortal://in/x.tar", len(shard_bytes), "")  # this store's mark is a time, which parts record
    output = OutputPrefix("mortal://out")
    if stale_errors:
        quarantine(output, task_of(shard), FailureReason.SHARD_CRASHED, "crashed", 3)

    def run() -> None:
        with worker(output.url) as one:
            for task in make_plan([shard], output, Ledger(output), fake_table(columns=(CAPTION,))).todo:
                one.tokenize(task)

    MortalStore.alive()
    return task_of(shard), run


SHARDS = {
    "good": tar_bytes(sample_members(0, 5)),
    "mixed": tar_bytes([*sample_members(0, 5), *BAD]),
    "bad": tar_bytes(BAD),
}


@pytest.mark.parametrize("stale_errors", [False, True])
@pytest.mark.parametrize("kind", SHARDS)
def test_errors_come_before_the_part_and_a_stale_errors_file_goes_before_it(kind: str, stale_errors: bool) -> None:
    task, run = mortal_run(SHARDS[kind], stale_errors=stale_errors)
    run()
    part, errors = f"/out/tokens/{task.part}", f"/out/errors/{task.part}"
    before = [("put", errors)] if kind != "good" else [("remove", errors)] if stale_errors else []
    assert MortalStore.log == [*before, ("put", part)]
    assert set(MortalStore.objects("/out")) == {part} | ({errors} if kind != "good" else set())


@pytest.mark.parametrize("stale_errors", [False, True])
@pytest.mark.parametrize("kind", SHARDS)
def test_killed_between_any_two_steps_and_run_again_gives_identical_bytes(kind: str, stale_errors: bool) -> None:
    _, run = mortal_run(SHARDS[kind], stale_errors=False)
    run()
    undisturbed = MortalStore.objects("/out")
    for kill_before in itertools.count():
        _, run = mortal_run(SHARDS[kind], stale_errors=stale_errors)
        MortalStore.alive(kill_before)
        try:
            run()
        except Killed:
            MortalStore.alive()
            run()
            assert MortalStore.objects("/out") == undisturbed
        else:
            break
    assert kill_before == (2 if kind != "good" or stale_errors else 1)
    assert MortalStore.objects("/out") == undisturbed
    MortalStore.alive()
    run()
    assert MortalStore.log == []  # nothing is left to do


def test_a_store_that_refuses_any_step_fails_the_shard_and_the_next_attempt_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, real = write(tmp_path, [*sample_members(0, 5), *BAD]), storage.publish
    with worker(str(tmp_path / "calm")) as one:
        one.tokenize(task_of(shard))
        for refused in (1, 2):
            calls = itertools.count(1)

            def publish(url: str, data: bytes, calls: Iterator[int] = calls, refused: int = refused) -> None:
                if next(calls) == refused:
                    raise StorageError("503 SlowDown")
                real(url, data)

            monkeypatch.setattr(storage, "publish", publish)
            with worker(str(tmp_path / f"out{refused}")) as other:
                with pytest.raises(StorageError, match="SlowDown"):
                    other.tokenize(task_of(shard))
                assert not (tmp_path / f"out{refused}" / "tokens").exists()
                other.tokenize(task_of(shard))
            for kind in ("tokens", "errors"):
                assert folder_bytes(tmp_path / f"out{refused}" / kind) == folder_bytes(tmp_path / "calm" / kind)


@pytest.mark.parametrize("cut", [0, 100, 512, 1500, -10_240])
@pytest.mark.parametrize("cut_when", ["before it is listed", "after it is listed", "on its way"])
def test_a_cut_shard_publishes_nothing(
    tmp_path: Path, cut: int, cut_when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tar_bytes(sample_members(0, 20))
    (tmp_path / "x.tar").write_bytes(whole if cut_when == "on its way" else whole[:cut])
    shard = listed(tmp_path / "x.tar")
    if cut_when == "after it is listed":
        shard = replace(shard, size_bytes=len(whole))
    if cut_when == "on its way":
        monkeypatch.setattr(shard_stream, "open_shard", lambda info: io.BytesIO(whole[:cut]))
    expected = ShardChanged if cut_when == "after it is listed" else ShardTruncated
    with worker(str(tmp_path / "out")) as one, pytest.raises(expected):
        one.tokenize(task_of(shard))
    assert not (tmp_path / "out").exists()


def test_a_last_zero_that_did_not_come_is_missed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the tar is whole without it: whoever lost that one may have lost others."""
    whole = tar_bytes(sample_members(0, 20))
    (tmp_path / "x.tar").write_bytes(whole)
    monkeypatch.setattr(shard_stream, "open_shard", lambda info: io.BytesIO(whole[:-1]))
    with worker(str(tmp_path / "out")) as one, pytest.raises(ShardTruncated, match="were listed"):
        one.tokenize(task_of(listed(tmp_path / "x.tar")))
    assert not (tmp_path / "out").exists()


def test_a_read_error_in_the_middle_and_then_success_gives_each_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, real = write(tmp_path, sample_members(0, 20)), shard_stream.open_shard
    with worker(str(tmp_path / "calm")) as one:
        one.tokenize(task_of(shard))
    budgets = iter([3000, 9000, 20_000])

    class Breaking(io.BytesIO):
        def __init__(self, data: bytes, budget: int) -> None:
            super().__init__(data)
            self._budget = budget

        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > self._budget:
                raise TimeoutError("read timed out")
            return super().read(size)

    monkeypatch.setattr(shard_stream, "open_shard", lambda info: Breaking(real(info).read(), next(budgets, 1 << 30)))
    with worker(str(tmp_path / "out")) as one:
        for _ in range(3):
            with pytest.raises(ShardUnreadable, match="timed out"):
                one.tokenize(task_of(shard))
        assert one.tokenize(task_of(shard)).num_rows == 20
    assert folder_bytes(tmp_path / "out" / "tokens") == folder_bytes(tmp_path / "calm" / "tokens")


def test_one_shard_that_fails_leaves_the_worker_fit_for_the_next(tmp_path: Path) -> None:
    good, cut = write(tmp_path, sample_members(0, 9), "good.tar"), write(tmp_path, sample_members(0, 9), "cut.tar")
    (tmp_path / "cut.tar").write_bytes((tmp_path / "cut.tar").read_bytes()[:9000])
    with worker(str(tmp_path / "out"), decode_threads=1) as one:
        for _ in range(5):
            with pytest.raises(ShardError):
                one.tokenize(task_of(cut))
        assert one.tokenize(task_of(good)).num_rows == 9


# Encoders that break their promise


@pytest.mark.parametrize(
    ("encode", "said"),
    [
        (lambda x: np.zeros((len(x), 2, 3), int), "grid of"),
        (lambda x: np.zeros((len(x), 4), int), "grid of"),
        (lambda x: np.full((len(x), 2, 2), 256), "outside"),
        (lambda x: np.full((len(x), 2, 2), -1), "outside"),
        (lambda x: np.full((len(x), 2, 2), 0.5), "not integers"),
        (lambda x: np.zeros((1, 2, 2), int), "1 grids for 4 images"),
    ],
    ids=["grid", "flat", "too large", "negative", "float", "too few"],
)
def test_an_encoder_that_breaks_its_promise_is_refused_and_nothing_is_published(
    tmp_path: Path, encode: Callable[[np.ndarray], np.ndarray], said: str
) -> None:
    tokenizer = FakeTokenizer()
    tokenizer.encode = encode  # type: ignore[method-assign]
    with worker(str(tmp_path / "out"), tokenizer) as one, pytest.raises(ValueError, match=said):
        one.tokenize(task_of(write(tmp_path, sample_members(0, 3))))
    assert not (tmp_path / "out").exists()


def test_a_worker_refuses_a_tokenizer_that_is_not_the_runs(tmp_path: Path) -> None:
    job = TokenizeJob(OutputPrefix(str(tmp_path)), fake_table(tokenizer_id="another"), 4, 1)
    with pytest.raises(ValueError, match="loaded tokenizer fake, the run wants another"):
        TokenizeWorker(FakeTokenizer(), job)


# Quarantine


def test_a_quarantined_shard_leaves_one_errors_row_and_no_part(tmp_path: Path) -> None:
    task = task_of(write(tmp_path, sample_members(0, 3)))
    output = OutputPrefix(str(tmp_path / "out"))
    with worker(output.url) as one:
        one.tokenize(task)
    row = quarantine(output, task, FailureReason.SHARD_TRUNCATED, "x" * 5000, attempts=3)
    assert rows(tmp_path / "out") == []
    (error,) = rows(tmp_path / "out", "errors")
    assert (error["stage"], error["reason"], error["shard"]) == ("shard", "shard_truncated", task.shard.url)
    assert (error["key"], error["index"], len(error["message"])) == (None, None, 2000)
    assert (row.state, row.part, row.num_rows, row.attempts, row.reason) == (
        ShardState.QUARANTINED, None, 0, 3, "shard_truncated",
    )  # fmt: skip


# Credentials

SECRET_URL = "memory://user:s3cr3t@in/x.tar?sig=t0k3n"


def all_text(table: pa.Table) -> str:
    return f"{table.to_pylist()} {table.schema.metadata}"


@pytest.mark.parametrize("kind", ["mixed", "cut", "gone"])
def test_no_credential_of_a_shards_url_is_in_anything_that_a_run_leaves(tmp_path: Path, kind: str) -> None:
    """The store in memory takes the whole of such a URL for a name, so that it can be read like any other."""
    data = SHARDS["mixed"]
    storage.publish(SECRET_URL, data if kind == "mixed" else data[:3000])
    (shard,) = storage.list_files(SECRET_URL)
    shard = replace(shard, size_bytes=len(data))
    if kind == "gone":
        storage.remove(SECRET_URL)
    output, table = OutputPrefix(str(tmp_path)), fake_table(columns=(CAPTION,))
    claim(output, RunDescription(table, {}, {}), accept_numerics=False)
    with worker(output.url) as one:
        try:
            row = one.tokenize(task_of(shard))
        except ShardError as error:
            row = quarantine(output, task_of(shard), FailureReason.SHARD_TRUNCATED, repr(error), 3)
        except FileNotFoundError:  # which quotes the whole URL where the store is a web server
            row = quarantine(output, task_of(shard), FailureReason.SHARD_UNREADABLE, f"no such file: '{SECRET_URL}'", 3)
    Ledger(output).append([row])
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == (4 if kind == "mixed" else 3)
    for path in written:
        text = all_text(pq.read_table(path)) if path.suffix == ".parquet" else path.read_text()
        for found in (text, str(path), path.read_bytes().decode("latin-1")):
            assert not any(secret in found for secret in ("s3cr3t", "t0k3n", "user:")), path
    assert Ledger(output).read()["memory://in/x.tar"].state == (ShardState.DONE if kind == "mixed" else "quarantined")
    if kind == "mixed":
        assert {r["shard"] for r in rows(tmp_path)} == {"memory://in/x.tar"}
        storage.remove(SECRET_URL)
