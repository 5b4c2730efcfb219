"""The plan: what is done, what is not, and what is taken over, from listings and footers alone."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from make_data import (
    FakeTokenizer,
    MortalStore,
    fake_table,
    image_bytes,
    listed,
    sample_members,
    tar_bytes,
    write_shards,
)
from pipeline import plan as plan_module
from pipeline import storage
from pipeline.errors import RunMismatch, ShardTruncated
from pipeline.images import ImageSpec
from pipeline.ledger import Ledger
from pipeline.metadata import MetadataColumn
from pipeline.output import OutputPrefix, part_name
from pipeline.plan import Plan, ShardTask, collector_paused, make_plan
from pipeline.records import FailureReason, ObjectInfo, ShardResult, ShardState
from pipeline.shard_patterns import expand
from pipeline.token_table import part_bytes, read_footer
from pipeline.tokenize_shard import TokenizeJob, TokenizeWorker, quarantine


class World:
    """Three shards and an output; `work` does what a run does with a plan."""

    def __init__(self, folder: Path, counts: tuple[int, ...] = (3, 2, 4)) -> None:
        self.shards_folder, self.output = folder / "in", OutputPrefix(str(folder / "out"))
        write_shards(self.shards_folder, counts)

    def shards(self) -> list[ObjectInfo]:
        return expand([str(self.shards_folder)])

    def plan(self) -> Plan:
        return make_plan(self.shards(), self.output, Ledger(self.output), fake_table())

    def work(self, *, write_ledger: bool = True, only: int | None = None) -> list[ShardResult]:
        worker = TokenizeWorker(FakeTokenizer(), TokenizeJob(self.output, fake_table(), 4, 2))
        results = [worker.tokenize(task) for task in self.plan().todo[:only]]
        worker.close()
        if write_ledger:
            Ledger(self.output).append(results)
        return results

    def todo(self) -> list[str]:
        return [Path(task.shard.url).name for task in self.plan().todo]

    def path(self, n: int) -> Path:
        return self.shards_folder / f"made-{n:06d}.tar"

    def part(self, n: int) -> Path:
        return Path(self.output.part(part_name(str(self.path(n)))))

    def errors(self, n: int) -> Path:
        return Path(self.output.errors(part_name(str(self.path(n)))))

    def spoil(self, n: int) -> None:
        """One good image and one bad one."""
        self.path(n).write_bytes(tar_bytes([("a.jpg", image_bytes(0)), ("b.jpg", b"bad")]))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_fresh_output_has_all_to_do(world: World) -> None:
    plan = world.plan()
    assert [t.shard for t in plan.todo] == world.shards() and plan.num_shards == 3
    assert not plan.done and not plan.adopted and not any(t.has_errors_file for t in plan.todo)


def test_a_finished_run_has_nothing_to_do_and_reads_neither_shards_nor_parts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = world.work()
    read: list[str] = []
    monkeypatch.setattr(plan_module, "read_footer", lambda url: read.append(url))
    monkeypatch.setattr(storage, "open_read", lambda url: read.append(url))
    plan = world.plan()
    assert list(plan.done) == results and not plan.todo and not plan.adopted and not read


def test_parts_without_a_ledger_row_are_adopted_by_one_footer_each(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = world.work(write_ledger=False)
    read: list[str] = []
    monkeypatch.setattr(plan_module, "read_footer", lambda url: (read.append(url), read_footer(url))[1])
    plan = world.plan()
    assert not plan.todo and plan.adopted == plan.done and len(read) == 3
    for adopted, result in zip(plan.adopted, results, strict=True):
        assert adopted == replace(result, sha256=None, seconds=0.0)
    Ledger(world.output).append(plan.adopted)
    assert not world.plan().adopted and len(world.plan().done) == 3


def test_new_shards_are_added_and_removed_ones_reported(world: World) -> None:
    world.work()
    (world.shards_folder / "added.tar").write_bytes(tar_bytes(sample_members(50, 1)))
    world.path(0).unlink()
    assert world.todo() == ["added.tar"]
    assert world.plan().num_shards == 3
    assert [Path(row.shard).name for row in world.plan().removed] == ["made-000000.tar"]


def test_one_line_says_why_each_shard_is_to_be_done(tmp_path: Path) -> None:
    world = World(tmp_path, (1, 1, 1, 1, 1, 1))
    assert world.plan().describe() == "6 shards: 0 done, 6 new"
    world.work(only=5)
    task = ShardTask(listed(world.path(1)), world.part(1).name)
    Ledger(world.output).append([quarantine(world.output, task, FailureReason.SHARD_TRUNCATED, "cut", 3)])
    world.path(2).write_bytes(tar_bytes(sample_members(60, 5)))
    world.part(3).unlink()
    world.path(4).unlink()
    plan = world.plan()
    assert plan.describe() == (
        "5 shards: 1 done, 1 new, 1 changed, 1 tried again, 1 without a good part; "
        "1 removed from the input keep their parts (--prune drops them)"
    )
    assert plan.num_lost == 1


def test_a_changed_shard_whose_new_bytes_fail_leaves_no_part_of_the_old_ones(world: World) -> None:
    world.work()
    world.path(1).write_bytes(b"no longer a tar")
    (task,) = world.plan().todo
    with pytest.raises(ShardTruncated):
        world.work()
    assert world.part(1).exists()  # until it is given up
    Ledger(world.output).append([quarantine(world.output, task, FailureReason.SHARD_TRUNCATED, "cut", 3)])
    assert not world.part(1).exists() and world.errors(1).exists()
    assert "1 tried again" in world.plan().describe()


@pytest.mark.parametrize(
    "other",
    [
        {"tokenizer_id": "another"},
        {"grid": (1, 4)},
        {"codebook_size": 512},
        {"image_spec": ImageSpec(size=16, small="upscale").to_json()},
        {"columns": (MetadataColumn("caption", "txt"),)},
    ],
    ids=lambda other: next(iter(other)),
)
@pytest.mark.parametrize("is_listed", [True, False])
def test_a_part_of_another_model_is_not_adopted_whatever_run_json_says(
    world: World, other: dict[str, Any], is_listed: bool
) -> None:
    shard = listed(world.path(1))
    storage.publish(str(world.part(1)), part_bytes(fake_table(**other), shard, [], np.empty((0, 4)), 0))
    if not is_listed:
        world.path(1).unlink()
    plan = world.plan()
    assert not plan.adopted and not plan.done and not plan.removed
    if is_listed:
        assert len(plan.todo) == 3 and "1 without a good part" in plan.describe()
        world.work()
        assert read_footer(str(world.part(1)))["num_rows"] == 2 and not world.todo()


def test_a_part_under_another_ones_name_is_not_adopted(world: World) -> None:
    """Though the two shards are the same to their store."""
    world.path(1).write_bytes(world.path(0).read_bytes())
    for n in (0, 1):
        os.utime(world.path(n), (1, 1))
    world.work(write_ledger=False)
    assert world.todo() == []
    world.part(1).write_bytes(world.part(0).read_bytes())
    assert world.todo() == ["made-000001.tar"]


def test_the_collector_works_again_after_a_plan_that_failed() -> None:
    with pytest.raises(RunMismatch), collector_paused():
        assert not gc.isenabled()
        raise RunMismatch("two shards of one part name")
    assert gc.isenabled()


def test_a_shard_that_changed_is_done_anew_whether_or_not_the_ledger_knew_it(world: World) -> None:
    for write_ledger in (True, False):
        world.work(write_ledger=write_ledger)
        world.path(1).write_bytes(tar_bytes(sample_members(60 + write_ledger, 5)))
        assert world.todo() == ["made-000001.tar"]
    world.work()
    os.utime(world.path(1), (1, 1))  # of the same size, but touched: its store says that it is another
    assert world.todo() == ["made-000001.tar"]


def test_a_part_newer_than_its_ledger_row_is_adopted_too(world: World) -> None:
    """Changed, done anew, and killed before the ledger was written."""
    world.work()
    world.path(1).write_bytes(tar_bytes(sample_members(60, 5)))
    (result,) = world.work(write_ledger=False)
    plan = world.plan()
    assert not plan.todo and [one.num_rows for one in plan.adopted] == [5] == [result.num_rows]


@pytest.mark.parametrize("write_ledger", [True, False])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "foreign"])
def test_a_part_that_is_not_there_or_not_whole_is_made_again(world: World, write_ledger: bool, damage: str) -> None:
    world.work(write_ledger=write_ledger)
    data = world.part(1).read_bytes()
    if damage == "missing":
        world.part(1).unlink()
    else:
        world.part(1).write_bytes({"empty": b"", "cut": data[:-1], "foreign": b"PAR1" + bytes(99)}[damage])
    assert world.todo() == ["made-000001.tar"]
    world.work()
    assert world.part(1).read_bytes() == data


@pytest.mark.parametrize("write_ledger", [True, False])
def test_a_part_whose_errors_file_is_lost_is_made_again(world: World, write_ledger: bool) -> None:
    world.spoil(1)
    world.work(write_ledger=write_ledger)
    errors = world.errors(1).read_bytes()
    world.errors(1).unlink()
    assert world.todo() == ["made-000001.tar"]
    world.work()
    assert world.errors(1).read_bytes() == errors and world.todo() == []


@pytest.mark.parametrize("write_ledger", [True, False])
def test_a_stale_errors_file_beside_a_faultless_part_is_removed(world: World, write_ledger: bool) -> None:
    world.work(write_ledger=write_ledger)
    world.errors(2).parent.mkdir()
    world.errors(2).write_bytes(b"of an attempt that was given up")
    (task,) = world.plan().todo
    assert (Path(task.shard.url).name, task.has_errors_file) == ("made-000002.tar", True)
    world.work()
    assert not world.errors(2).exists() and world.todo() == []


def test_a_quarantined_shard_is_tried_again_knowing_of_its_errors_file(world: World) -> None:
    world.work(only=2)
    (task,) = world.plan().todo
    row = quarantine(world.output, task, FailureReason.SHARD_TRUNCATED, "cut", 3)
    Ledger(world.output).append([row])
    (again,) = world.plan().todo
    assert again == replace(task, has_errors_file=True)
    assert row.state is ShardState.QUARANTINED and len(world.plan().done) == 2
    world.work()
    assert world.todo() == [] and not world.errors(2).exists()


def test_a_part_beside_a_quarantined_row_is_not_trusted(world: World) -> None:
    """An actor that was given up may still publish its part, after the quarantine replaced its errors file."""
    world.spoil(2)
    world.work(write_ledger=False)
    late = world.part(2).read_bytes()
    task = ShardTask(listed(world.path(2)), world.part(2).name)
    Ledger(world.output).append([quarantine(world.output, task, FailureReason.SHARD_TIMED_OUT, "slow", 3)])
    world.part(2).write_bytes(late)
    assert world.todo() == ["made-000002.tar"]
    world.work()
    assert world.todo() == [] and world.part(2).read_bytes() == late


def test_the_bytes_of_a_resumed_run_are_those_of_an_undisturbed_one(world: World, tmp_path: Path) -> None:
    world.work()
    whole = {path.name: path.read_bytes() for path in world.part(0).parent.iterdir()}
    for path in (world.part(0), world.part(2)):
        path.unlink()
    kept = world.part(1).stat().st_mtime_ns
    world.work()
    assert {path.name: path.read_bytes() for path in world.part(0).parent.iterdir()} == whole
    assert world.part(1).stat().st_mtime_ns == kept


def test_two_shards_of_one_part_name_are_refused(tmp_path: Path) -> None:
    shards = [ObjectInfo(f"https://me:secret@h/a.tar?sig={n}", 1, "e") for n in range(2)]
    with pytest.raises(RunMismatch, match=r"https://h/a\.tar and https://h/a\.tar would have the same part") as raised:
        make_plan(shards, OutputPrefix(str(tmp_path)), Ledger(OutputPrefix(str(tmp_path))), fake_table())
    assert "secret" not in str(raised.value)


class Counting(MortalStore):
    """Counts the requests that read."""

    calls: ClassVar[list[str]] = []

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self.calls.append("ls")
        return super().ls(path, detail, **options)

    def cat_file(self, path: str, *arguments: Any, **options: Any) -> Any:
        self.calls.append("cat_file")
        return super().cat_file(path, *arguments, **options)

    def open(self, path: str, *arguments: Any, **options: Any) -> Any:
        self.calls.append("open")
        return super().open(path, *arguments, **options)


def test_a_plan_costs_a_few_listings_and_not_one_request_a_shard() -> None:
    Counting.fresh()
    output, number = OutputPrefix("mortal://out"), 3000
    shards = [ObjectInfo(f"s3://b/{n}.tar", 100, "e") for n in range(number)]
    part = part_bytes(fake_table(), shards[0], [], np.empty((0, 4)), 0)
    names = [part_name(shard.url) for shard in shards[: number // 2]]
    for name in names:
        storage.publish(output.part(name), part)
    done = zip(shards, names, strict=False)
    Ledger(output).append(ShardResult(s.url, 100, "e", ShardState.DONE, name, part_bytes=len(part)) for s, name in done)
    Counting.calls.clear()
    plan = make_plan(shards, output, Ledger(output), fake_table())
    MortalStore.fresh()
    assert (len(plan.done), len(plan.todo)) == (number // 2, number // 2)
    assert 0 < len(Counting.calls) < 15


def test_listed_marks_are_what_the_plan_compares(world: World) -> None:
    world.work()
    assert read_footer(str(world.part(0)))["shard_etag"] == listed(world.path(0)).etag
