"""Decoding in tasks, on a real Ray: the same batches as on threads, whoever is killed; errors and cancelling."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError

from jobs import decode_tasks
from jobs.decode_place import DecodeTasks
from jobs.decode_tasks import AT_WORK_S, IMPATIENT_S, SILENT_S, TaskDecoder
from jobs.pace import LEAST_DEADLINE_S
from make_data import image_bytes, listed, sample_members, tar_bytes
from pipeline.decode_shard import DecodeJob, Decoder, ThreadDecoder
from pipeline.errors import ShardCrashed, ShardError, ShardTruncated, StorageError
from pipeline.images import ImageSpec
from pipeline.metadata import MetadataColumn
from pipeline.ranged_reader import BLOCK_TIMEOUT_S
from pipeline.records import ObjectInfo, PixelBatch

JOB = DecodeJob(ImageSpec(size=16).to_json(), (MetadataColumn("caption", "txt"),), batch_size=4, threads=2)
TASKS = DecodeTasks(cpus=1, resources={}, labels={}, wait_s=60)


@pytest.fixture
def shard(tmp_path: Path) -> ObjectInfo:
    """40 images, of which two are bad."""
    members = [*sample_members(0, 17), ("torn.jpg", image_bytes(1)[:-60]), *sample_members(17, 23), ("text.jpg", b"no")]
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    return listed(tmp_path / "x.tar")


def same(found: list[PixelBatch], expected: list[PixelBatch]) -> bool:
    assert [(batch.samples, batch.failures) for batch in found] == [(b.samples, b.failures) for b in expected]
    return all(np.array_equal(a.pixels_BHWC, b.pixels_BHWC) for a, b in zip(found, expected, strict=True))


def on_threads(shard: ObjectInfo) -> list[PixelBatch]:
    with closing(ThreadDecoder(JOB)) as decoder:
        return list(decoder.batches(shard))


def error_of(decoder: Decoder, shard: ObjectInfo) -> Exception:
    with pytest.raises((ShardError, StorageError, OSError)) as raised, closing(decoder) as open_decoder:
        list(open_decoder.batches(shard))
    return raised.value


def processes(title: str) -> list[int]:
    """Of our own Ray only: others may run on this machine."""
    return [pid for pid in _pids() if _read(pid, "cmdline").startswith(title) and os.getpid() in _ancestors(pid)]


def _pids() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        pid = int(_read(pid, "stat").rpartition(")")[2].split()[1] or 0) if _read(pid, "stat") else 0
        yield pid


def _read(pid: int, name: str) -> str:
    try:
        return (Path("/proc") / str(pid) / name).read_text(errors="replace")
    except OSError:
        return ""


def gone(title: str) -> bool:
    for _ in range(600):
        if not processes(title):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
class TestOnRay:
    def test_tasks_give_the_batches_that_threads_give_read_only(self, shard: ObjectInfo) -> None:
        found = list(TaskDecoder(JOB, TASKS).batches(shard))
        assert same(found, on_threads(shard))
        assert not any(batch.pixels_BHWC.flags.writeable for batch in found), "views of the object store"

    def test_errors_arrive_as_they_are(self, shard: ObjectInfo, tmp_path: Path) -> None:
        (tmp_path / "cut.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:20_000])
        for bad in (listed(tmp_path / "cut.tar"), ObjectInfo(str(tmp_path / "none.tar"), 1, "")):
            here, there = (error_of(decoder, bad) for decoder in (ThreadDecoder(JOB), TaskDecoder(JOB, TASKS)))
            assert type(there) is type(here) and str(there) == str(here)

    def test_killed_in_the_middle_of_a_stream_every_batch_comes_once_and_in_order(self, shard: ObjectInfo) -> None:
        batches = TaskDecoder(JOB, TASKS).batches(shard)
        found = [next(batches)]
        (worker,) = processes("ray::decode_shard")
        os.kill(worker, signal.SIGKILL)
        found += batches
        assert same(found, on_threads(shard))
        assert not Path(f"/proc/{worker}").exists()

    def test_a_stream_that_is_left_early_frees_its_task(self, shard: ObjectInfo) -> None:
        with closing(TaskDecoder(JOB, TASKS).batches(shard)) as batches:
            next(batches)
            assert processes("ray::decode_shard"), "it waits for its reader"
        assert gone("ray::decode_shard")

    def test_a_shard_whose_processes_die_again_and_again_is_a_failed_shard(
        self, shard: ObjectInfo, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(decode_tasks, "RETRIES", 1)
        error = error_of(TaskDecoder(DeadlyJob(**vars(JOB)), TASKS), shard)
        assert isinstance(error, ShardCrashed) and "its decode task died 2 times" in str(error)

    def test_where_no_task_can_begin_shards_are_decoded_here_and_a_note_says_so(
        self, shard: ObjectInfo, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nowhere = DecodeTasks(cpus=1, resources={}, labels={"pool": "nowhere"}, wait_s=0.5)
        decoder = TaskDecoder(JOB, nowhere)
        found = list(decoder.batches(shard))
        assert same(found, on_threads(shard)) and all(batch.pixels_BHWC.flags.writeable for batch in found)
        assert "no decode task began" in (note := decoder.take_note()) and "pool=nowhere" in note
        assert not decoder.take_note()
        monkeypatch.setattr(decoder, "_remote", None)  # for a while no other is tried
        assert same(list(decoder.batches(shard)), found)
        decoder.close()


@dataclass(frozen=True)
class DeadlyJob(DecodeJob):
    """Kills the process that reads by it."""

    def __getattribute__(self, name: str) -> Any:
        if name == "require_end_marker":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getattribute__(name)


class Line:
    """Stands in for ray.wait, in simulated time: a stream is its task's moment of beginning."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, decoder: TaskDecoder) -> None:
        self.time, self.decoder = 0.0, decoder
        monkeypatch.setattr(decode_tasks.ray, "wait", self.wait)
        monkeypatch.setattr(decoder, "_now", lambda: self.time)

    def wait(self, streams: list[float], timeout: float) -> tuple[list[float], list[float]]:
        begun = [stream for stream in streams if stream <= self.time + timeout]
        self.time = max(self.time, begun[0]) if begun else self.time + timeout
        return begun, []

    def waited(self, begins: float) -> tuple[bool, float]:
        start = self.time
        return self.decoder._has_begun(begins), self.time - start


def test_only_the_first_wait_is_as_long_as_a_cluster_takes_to_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line(monkeypatch, TaskDecoder(JOB, replace(TASKS, wait_s=300)))
    assert line.waited(290.0) == (True, 290.0)
    line.time = 1000.0  # all that began has ended, and the CPUs are gone
    assert line.waited(math.inf) == (False, IMPATIENT_S)
    assert f"within {IMPATIENT_S:.0f} s" in line.decoder.take_note()
    line.time = 2000.0
    assert line.waited(2001.0) == (True, 1.0)
    line.time = 3000.0
    assert line.waited(math.inf) == (False, IMPATIENT_S)


def test_behind_tasks_of_its_own_that_get_on_a_shard_waits_for_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line(monkeypatch, TaskDecoder(JOB, replace(TASKS, wait_s=300)))
    assert line.waited(0.0) == (True, 0.0)
    assert line.waited(AT_WORK_S) == (True, AT_WORK_S)
    assert line.waited(math.inf) == (False, AT_WORK_S + IMPATIENT_S)


def test_a_task_that_falls_silent_fails_before_its_actor_is_taken_to_hang() -> None:
    assert BLOCK_TIMEOUT_S < SILENT_S < LEAST_DEADLINE_S


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (RayTaskError("decode", "", ShardTruncated("a.tar", "cut")), ShardTruncated, "cut"),
        (RayTaskError("decode", "", StorageError("503")), StorageError, "503"),
        (RayTaskError("decode", "", TimeoutError("slow")), TimeoutError, "slow"),
        (RayTaskError("decode", "", MemoryError("too large")), ShardCrashed, "failed: MemoryError: too large"),
        (OutOfMemoryError("killed for memory.\nMore.\nTips"), ShardCrashed, "killed for memory. … Tips"),
        (WorkerCrashedError(), ShardCrashed, "died unexpectedly"),
    ],
)
def test_what_befalls_a_task_is_the_shards_or_the_stores_and_never_the_actors(
    monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type[Exception], said: str
) -> None:
    def get(reference: object) -> None:
        raise error

    monkeypatch.setattr(decode_tasks.ray, "get", get)
    with pytest.raises(raised, match=said) as found:
        decode_tasks._value("reference", ObjectInfo("a.tar", 1, ""))
    assert type(found.value) is raised
