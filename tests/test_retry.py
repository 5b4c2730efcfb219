"""What failed is looked at alone, and only what may go well now is tokenised again: real images, real parts, no Ray."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path
from typing import Any

import pytest

from make_data import FakeTokenizer, Killed, MortalStore, fake_table, image_bytes, sample_members, tar_bytes
from pipeline import batches, storage
from pipeline.errors import ShardError
from pipeline.images import ImageSpec, SampleError, decode_image
from pipeline.ledger import Ledger
from pipeline.metadata import MetadataColumn
from pipeline.output import OutputPrefix, part_name
from pipeline.plan import Plan, PlanRecord, make_plan
from pipeline.records import FailureReason, ObjectInfo, ShardState
from pipeline.retry import BEING_RETRIED, Finding, is_untouched, plan_retry, put_in_doubt
from pipeline.shard_patterns import expand
from pipeline.token_table import TableSpec
from pipeline.tokenize_shard import TokenizeJob, TokenizeWorker, quarantine

PICKY = image_bytes(77)  # a good image that an older Pillow cannot decode
SHARDS = {
    "whole.tar": tar_bytes(sample_members(0, 3)),
    "picky.tar": tar_bytes([*sample_members(3, 2), ("bad.jpg", b"no image"), ("picky.jpg", PICKY)]),
    "bad.tar": tar_bytes([*sample_members(5, 1), ("bad.jpg", b"no image"), ("cut.jpg", image_bytes(8)[:-40])]),
}


class World:
    """A run over shards in a folder, made with an old Pillow; `retry` is planned with today's."""

    def __init__(self, folder: Path, table: TableSpec | None = None) -> None:
        self.folder, self.table, self.output = folder / "in", table or fake_table(), OutputPrefix(str(folder / "out"))
        for name, data in SHARDS.items():
            storage.publish(str(self.folder / name), data)

    def work(self, *, only: int | None = None) -> None:
        """As a run does, its shards that end too early quarantined."""
        worker = TokenizeWorker(FakeTokenizer(), TokenizeJob(self.output, self.table, 4, 1))
        for task in self.plan().todo[:only]:
            try:
                row = worker.tokenize(task)
            except ShardError as error:
                row = quarantine(self.output, task, FailureReason.SHARD_TRUNCATED, str(error), 3)
            Ledger(self.output).append([row])
        worker.close()

    def plan(self) -> Plan:
        return make_plan(expand([str(self.folder)]), self.output, Ledger(self.output), self.table)

    def retry(self, *, num_shards: int = 3, whole_shards: bool = False, **record: Any) -> tuple[Plan, list[Finding]]:
        plan_record = PlanRecord(num_shards, 0, 0, 0, 0.0, **record)
        return plan_retry(self.output, Ledger(self.output), self.table, plan_record, whole_shards=whole_shards)

    def said(self, **options: Any) -> dict[str, tuple[str, str]]:
        _, findings = self.retry(**options)
        return {Path(one.row.shard).name: (one.failed, one.outcome) for one in findings}

    def again(self, **options: Any) -> list[str]:
        return [Path(task.shard.url).name for task in self.retry(**options)[0].todo]


@pytest.fixture
def old_pillow(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Undone, it is today's."""

    def decode(data: bytes, spec: ImageSpec) -> Any:
        if data == PICKY:
            raise SampleError(FailureReason.UNDECODABLE, "unsupported JPEG feature")
        return decode_image(data, spec)

    monkeypatch.setattr(batches, "decode_image", decode)
    return monkeypatch


@pytest.fixture
def world(tmp_path: Path, old_pillow: pytest.MonkeyPatch) -> World:
    world = World(tmp_path)
    world.work()
    old_pillow.undo()
    return world


def test_only_a_shard_of_which_an_image_decodes_now_is_tokenised_again(world: World) -> None:
    said = world.said()
    assert said["picky.tar"] == (
        "2 images: 1 not_an_image, 1 undecodable", "an image decodes now: to be tokenised again"
    )  # fmt: skip
    assert said["bad.tar"] == ("2 images: 1 not_an_image, 1 truncated_image", "none of 2 decodes now")
    plan, _ = world.retry()
    assert world.again() == ["picky.tar"] and not plan.num_left and not plan.removed
    assert sorted(Path(row.shard).name for row in plan.done) == ["bad.tar", "whole.tar"]


def test_it_reads_the_failed_images_and_nothing_else_of_the_input(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges: list[tuple[str, int, int]] = []
    read_range, filesystem, open_read = storage.read_range, storage.filesystem, storage.open_read

    def noted(url: str, start: int, size: int) -> bytes:
        ranges.append((Path(url).name, start, size))
        return read_range(url, start, size)

    def guarded(url: str) -> Any:
        assert url != str(world.folder), "the input is listed"
        return filesystem(url)

    def opened(url: str, *arguments: Any) -> Any:
        assert not url.endswith(".tar"), "a shard is read from its beginning"
        return open_read(url, *arguments)

    monkeypatch.setattr(storage, "read_range", noted)
    monkeypatch.setattr(storage, "filesystem", guarded)
    monkeypatch.setattr(storage, "open_read", opened)
    world.said()
    at = SHARDS["bad.tar"].index(b"no image")
    assert ("bad.tar", at, 8) in ranges and {name for name, _, _ in ranges} == {"bad.tar", "picky.tar"}
    assert sum(size for name, _, size in ranges if name == "bad.tar") == 8 + len(image_bytes(8)) - 40


def test_nothing_failed_and_nothing_is_found(tmp_path: Path) -> None:
    world = World(tmp_path)
    for name in ("picky.tar", "bad.tar"):
        (world.folder / name).unlink()
    world.work()
    plan, findings = world.retry(num_shards=1)
    assert (plan.todo, findings, len(plan.done), plan.num_left) == ((), [], 1, 0)


def test_a_shard_that_is_gone_or_has_changed_is_said_so_and_keeps_its_part(world: World) -> None:
    (world.folder / "picky.tar").unlink()
    (world.folder / "bad.tar").write_bytes(SHARDS["whole.tar"])
    said = world.said()
    assert said["picky.tar"][1] == "is gone from the input"
    assert said["bad.tar"][1] == "has changed: dvae tokenize does it anew"
    plan, _ = world.retry()
    assert not plan.todo and len(plan.done) == 3


def test_a_quarantined_shard_is_tried_again_as_it_is_now(tmp_path: Path) -> None:
    world = World(tmp_path)
    (world.folder / "whole.tar").write_bytes(SHARDS["whole.tar"][:1500])
    world.work()
    (world.folder / "whole.tar").write_bytes(SHARDS["whole.tar"])
    plan, _ = world.retry()
    (task,) = [task for task in plan.todo if "whole" in task.shard.url]
    assert task.has_errors_file and task.shard == expand([str(world.folder / "whole.tar")])[0]
    assert world.said()["whole.tar"] == ("quarantined: shard_truncated", "to be tokenised again")


def test_a_quarantined_shard_that_is_gone_keeps_its_row(tmp_path: Path) -> None:
    world = World(tmp_path)
    (world.folder / "whole.tar").write_bytes(SHARDS["whole.tar"][:1500])
    world.work()
    (world.folder / "whole.tar").unlink()
    plan, _ = world.retry()
    assert world.said()["whole.tar"] == ("quarantined: shard_truncated", "is gone from the input")
    assert [row.state for row in plan.done if "whole" in row.shard] == [ShardState.QUARANTINED]
    assert plan.num_shards == 3 and not plan.num_left


def test_a_part_that_is_lost_while_its_shard_is_gone_is_never_called_done(world: World) -> None:
    Path(world.output.part(part_name(str(world.folder / "whole.tar")))).unlink()
    assert "whole.tar" in world.again()
    (world.folder / "whole.tar").unlink()
    plan, _ = world.retry()
    assert plan.num_left == 1 and plan.num_shards == 3 and not any("whole" in row.shard for row in plan.done)


def test_shards_of_an_interrupted_run_are_left_to_the_run_itself(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.work(only=2)
    plan, _ = world.retry()
    assert (plan.num_left, plan.num_shards, len(plan.done), len(plan.todo)) == (1, 3, 2, 0)


def test_a_part_whose_row_was_never_written_counts_as_done(world: World) -> None:
    for info in storage.list_files(world.output.ledger_folder())[-1:]:
        storage.remove(info.url)
    plan, _ = world.retry()
    assert plan.num_left == 0 and plan.num_shards == 3 and len(plan.adopted) == 1


def test_shards_that_the_last_run_no_longer_listed_are_not_tried(world: World) -> None:
    removed = str(world.folder / "picky.tar")
    plan, findings = world.retry(num_shards=2, removed=(removed,))
    assert [row.shard for row in plan.removed] == [removed] and plan.num_shards == 2
    assert removed not in {one.row.shard for one in findings}


def test_what_has_no_byte_range_is_tried_with_the_whole_shard_when_asked(tmp_path: Path) -> None:
    world = World(tmp_path, fake_table(columns=(MetadataColumn("score", "json.score", "int32"),)))
    for name in SHARDS:
        (world.folder / name).unlink()
    (world.folder / "gz.tar.gz").write_bytes(gzip.compress(SHARDS["bad.tar"]))
    (world.folder / "meta.tar").write_bytes(tar_bytes(sample_members(0, 2)))  # scores n.5 are no integers
    world.work()
    assert world.said(num_shards=2) == {
        "gz.tar.gz": ("3 images: 1 bad_metadata, 1 not_an_image, 1 truncated_image",
                      "3 cannot be tried alone (--whole-shards does)"),
        "meta.tar": ("2 images: 2 bad_metadata", "2 cannot be tried alone (--whole-shards does)"),
    }  # fmt: skip
    assert world.again(num_shards=2) == []
    assert world.again(num_shards=2, whole_shards=True) == ["gz.tar.gz", "meta.tar"]


def test_a_damaged_errors_file_is_said_so_and_the_others_are_looked_at(world: World) -> None:
    Path(world.output.errors(part_name(str(world.folder / "bad.tar")))).write_bytes(b"PAR1")
    assert "no whole errors file" in world.said()["bad.tar"][1]
    assert world.again() == ["picky.tar"]


# Kills


OUTPUT = OutputPrefix("mortal://out")
SHARD = ObjectInfo("mortal://in/picky.tar", len(SHARDS["picky.tar"]), "")


def mortal_plan() -> Plan:
    return make_plan([SHARD], OUTPUT, Ledger(OUTPUT), fake_table())


def mortal_work(plan: Plan) -> None:
    worker = TokenizeWorker(FakeTokenizer(), TokenizeJob(OUTPUT, fake_table(), 4, 1))
    for task in plan.todo:
        Ledger(OUTPUT).append([worker.tokenize(task)])
    worker.close()


def mortal_retry() -> None:
    plan, findings = plan_retry(OUTPUT, Ledger(OUTPUT), fake_table(), PlanRecord(1, 0, 0, 0, 0.0), whole_shards=True)
    put_in_doubt(OUTPUT, Ledger(OUTPUT), findings)
    mortal_work(plan)


def mortal_results() -> dict[str, bytes]:
    return {
        path: data
        for path, data in MortalStore.objects("/out").items()
        if "/ledger/" not in path and "manifest" not in path
    }


def test_a_retry_killed_between_any_two_steps_loses_no_image(
    old_pillow: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above all between the new errors file, which lacks the image, and the new part, which has it."""
    MortalStore.fresh()
    storage.publish(SHARD.url, SHARDS["picky.tar"])
    mortal_work(mortal_plan())
    storage.publish(OUTPUT.file("manifest.json"), b"{}")
    old, before = MortalStore.objects(), mortal_results()
    old_pillow.undo()
    stat = storage.stat
    monkeypatch.setattr(storage, "stat", lambda url: SHARD if url == SHARD.url else stat(url))
    mortal_retry()
    whole = mortal_results()
    for kill_before in itertools.count():
        MortalStore.fresh()
        for path, data in old.items():
            storage.publish(f"mortal:/{path}", data)
        MortalStore.alive(kill_before)
        try:
            mortal_retry()
        except Killed:
            MortalStore.alive()
            mortal_work(mortal_plan())  # as the next `dvae tokenize` does
            assert mortal_results() == (whole if kill_before > 1 else before), "of two attempts"
        else:
            break
    assert kill_before == 5  # the manifest, the row in doubt, errors, part, row


def test_a_row_in_doubt_is_one_that_the_plan_does_not_trust(world: World) -> None:
    put_in_doubt(world.output, Ledger(world.output), world.retry()[1])
    row = Ledger(world.output).read()[str(world.folder / "picky.tar")]
    assert (row.state, row.reason) == (ShardState.QUARANTINED, BEING_RETRIED)
    assert [Path(task.shard.url).name for task in world.plan().todo] == ["picky.tar"]


def test_untouched_means_that_neither_file_was_written_again(world: World) -> None:
    (finding,) = [one for one in world.retry()[1] if one.task is not None]
    assert is_untouched(world.output, finding)
    worker = TokenizeWorker(FakeTokenizer(), TokenizeJob(world.output, world.table, 4, 1))
    assert finding.task is not None
    worker.tokenize(finding.task)
    worker.close()
    assert not is_untouched(world.output, finding)
