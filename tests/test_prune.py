"""Shards that the input has no longer: kept and said so, or dropped whole, wherever one is killed on the way."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from make_data import (
    FakeTokenizer,
    Killed,
    MortalStore,
    fake_table,
    folder_bytes,
    image_bytes,
    sample_members,
    tar_bytes,
)
from pipeline import prune as prune_module
from pipeline import storage
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix, part_name
from pipeline.plan import Plan, make_plan, read_plan_record, record_plan
from pipeline.prune import drop_removed
from pipeline.records import FailureReason, ObjectInfo, ShardState
from pipeline.shard_patterns import expand
from pipeline.tokenize_shard import TokenizeJob, TokenizeWorker, quarantine

OUTPUT = OutputPrefix("mortal://out")
SHARDS = {
    "mortal://in/kept.tar": tar_bytes(sample_members(0, 3)),
    "mortal://in/gone.tar": tar_bytes(sample_members(3, 2)),
    "mortal://in/spoilt.tar": tar_bytes([("a.jpg", image_bytes(0)), ("b.jpg", b"bad")]),
    "mortal://in/unwritten.tar": tar_bytes([("c.jpg", image_bytes(1)), ("d.jpg", b"bad")]),
    "mortal://in/lost.tar": tar_bytes(sample_members(9, 1))[:700],
}
LISTED_STILL = ["mortal://in/kept.tar"]


def infos(urls: list[str]) -> list[ObjectInfo]:
    return [ObjectInfo(url, len(SHARDS[url]), "") for url in urls]


def planned(urls: list[str]) -> Plan:
    return make_plan(infos(urls), OUTPUT, Ledger(OUTPUT), fake_table())


def work(urls: list[str]) -> None:
    """As a run does that is killed before it has written the row of `unwritten`; `lost` is quarantined."""
    worker = TokenizeWorker(FakeTokenizer(), TokenizeJob(OUTPUT, fake_table(), 4, 1))
    for task in planned(urls).todo:
        if "lost" in task.shard.url:
            row = quarantine(OUTPUT, task, FailureReason.SHARD_TRUNCATED, "cut", 3)
        else:
            row = worker.tokenize(task)
        if "unwritten" not in task.shard.url:
            Ledger(OUTPUT).append([row])
    worker.close()


def a_run_whose_input_shrank() -> None:
    MortalStore.fresh()
    for url, data in SHARDS.items():
        storage.publish(url, data)
    work(list(SHARDS))
    storage.publish(OUTPUT.file("manifest.json"), b"{}")
    MortalStore.alive()


def prune(urls: list[str]) -> Plan:
    return drop_removed(OUTPUT, Ledger(OUTPUT), planned(urls))


def results() -> dict[str, bytes]:
    """All objects of the output but the ledger, whose segments may be more or fewer."""
    return {path: data for path, data in MortalStore.objects("/out").items() if "/ledger/" not in path}


def states() -> dict[str, str]:
    return {storage.base_name(url): row.state.value for url, row in Ledger(OUTPUT).read().items()}


def test_what_is_listed_no_longer_is_reported_with_its_rows_and_nothing_is_touched() -> None:
    a_run_whose_input_shrank()
    plan = planned(LISTED_STILL)
    removed = {storage.base_name(row.shard): (row.state.value, row.num_rows, row.num_failed) for row in plan.removed}
    assert removed == {
        "gone.tar": ("done", 2, 0), "spoilt.tar": ("done", 1, 1), "unwritten.tar": ("done", 1, 1),
        "lost.tar": ("quarantined", 0, 0),
    }  # fmt: skip
    assert [storage.base_name(row.shard) for row in plan.adopted] == ["unwritten.tar"]
    assert (plan.num_shards, len(plan.done), MortalStore.log) == (1, 1, [])
    said = "1 shards: 1 done; 4 removed from the input keep their parts (--prune drops them)"
    assert plan.describe().replace(" (1 of them without a ledger row)", "") == said


def test_prune_drops_part_errors_and_row_of_what_is_gone_and_nothing_else() -> None:
    a_run_whose_input_shrank()
    kept = {path: data for path, data in results().items() if part_name(LISTED_STILL[0]) in path}
    left = prune(LISTED_STILL)
    assert results() == kept and len(kept) == 1
    assert states() == {"kept.tar": "done"} | dict.fromkeys(
        ("gone.tar", "spoilt.tar", "unwritten.tar", "lost.tar"), "removed"
    )
    assert (left.removed, left.adopted, len(left.done)) == ((), (), 1)
    assert planned(LISTED_STILL).removed == ()


def test_each_shard_loses_its_part_first_then_its_errors_and_last_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune_module, "REMOVERS", 1)
    a_run_whose_input_shrank()
    drop_removed(OUTPUT, Ledger(OUTPUT), planned([url for url in SHARDS if "spoilt" not in url]))
    name = part_name("mortal://in/spoilt.tar")
    deeds = [deed for deed in MortalStore.log if "unwritten" not in deed[1]]
    assert deeds[0] == ("remove", "/out/manifest.json")
    assert deeds[-3:-1] == [("remove", f"/out/tokens/{name}"), ("remove", f"/out/errors/{name}")]
    assert deeds[-1][0] == "put" and "/out/ledger/" in deeds[-1][1]


def test_killed_between_any_two_steps_the_next_prune_leaves_what_an_undisturbed_one_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prune_module, "REMOVERS", 1)
    monkeypatch.setattr(prune_module, "ROWS_A_SEGMENT", 2)  # four shards: a kill between two segments too
    a_run_whose_input_shrank()
    prune(LISTED_STILL)
    whole, said = results(), states()
    for kill_before in itertools.count():
        a_run_whose_input_shrank()
        MortalStore.alive(kill_before)
        try:
            prune(LISTED_STILL)
        except Killed:
            MortalStore.alive()
            assert set(whole.items()) <= set(results().items())
            prune(LISTED_STILL)
            assert (results(), states()) == (whole, said)
        else:
            break
    assert kill_before == 1 + 1 + 2 * 4 + 2  # manifest; row of the adopted; part and errors of four; two segments


def test_killed_while_pruning_and_not_pruned_again_nothing_is_counted_that_is_not_there() -> None:
    a_run_whose_input_shrank()
    MortalStore.alive(kill_before=3)
    with pytest.raises(Killed):
        prune(LISTED_STILL)
    MortalStore.alive()
    for row in planned(LISTED_STILL).removed:
        assert (row.part is not None) == storage.exists(OUTPUT.part(part_name(row.shard)))
        assert row.part is not None or row.num_rows == 0


def test_a_shard_that_comes_back_is_tokenised_anew_to_the_same_bytes() -> None:
    a_run_whose_input_shrank()
    before = results()
    prune(LISTED_STILL)
    plan = planned(list(SHARDS))
    assert len(plan.todo) == 4 and not any(task.has_errors_file for task in plan.todo)
    assert "1 done, 4 new" in plan.describe()
    work(list(SHARDS))
    storage.publish(OUTPUT.file("manifest.json"), b"{}")
    assert results() == before
    assert [task.shard.url for task in planned(list(SHARDS)).todo] == ["mortal://in/lost.tar"]


def test_nothing_is_dropped_and_nothing_written_where_nothing_is_gone() -> None:
    a_run_whose_input_shrank()
    before = MortalStore.objects()
    prune(list(SHARDS))
    assert MortalStore.objects() == before and MortalStore.log == []


def test_a_late_part_of_a_shard_that_was_dropped_is_found_again() -> None:
    """An actor that was given up may still publish after the tombstone."""
    a_run_whose_input_shrank()
    name = part_name("mortal://in/gone.tar")
    late = storage.read_bytes(OUTPUT.part(name))
    prune(LISTED_STILL)
    storage.publish(OUTPUT.part(name), late)
    plan = planned(LISTED_STILL)
    assert [(row.part, row.state) for row in plan.removed] == [(name, ShardState.DONE)] and plan.adopted == plan.removed
    prune(LISTED_STILL)
    assert not storage.exists(OUTPUT.part(name)) and planned(LISTED_STILL).removed == ()


def test_on_a_local_disk_too(tmp_path: Path) -> None:
    output = OutputPrefix(str(tmp_path / "out"))
    for name in ("a", "b"):
        storage.publish(str(tmp_path / "in" / f"{name}.tar"), tar_bytes(sample_members(0, 1)))
    worker = TokenizeWorker(FakeTokenizer(), TokenizeJob(output, fake_table(), 4, 1))
    shards = expand([str(tmp_path / "in")])
    Ledger(output).append([worker.tokenize(t) for t in make_plan(shards, output, Ledger(output), fake_table()).todo])
    worker.close()
    plan = make_plan(shards[:1], output, Ledger(output), fake_table())
    drop_removed(output, Ledger(output), plan)
    assert list(folder_bytes(tmp_path / "out" / "tokens")) == [part_name(shards[0].url)]


def test_plan_json_names_what_was_removed_and_is_written_only_when_it_says_something_new() -> None:
    a_run_whose_input_shrank()
    record_plan(OUTPUT, planned(LISTED_STILL), {"attempts": 3})
    record = read_plan_record(OUTPUT)
    assert record is not None and record.settings == {"attempts": 3}
    assert [storage.base_name(url) for url in record.removed] == ["gone.tar", "lost.tar", "spoilt.tar", "unwritten.tar"]
    MortalStore.alive()
    record_plan(OUTPUT, planned(LISTED_STILL), {"attempts": 3})
    assert MortalStore.log == []
    record_plan(OUTPUT, prune(LISTED_STILL), {"attempts": 3})
    assert read_plan_record(OUTPUT) != record


def test_plan_json_of_an_earlier_version_is_read() -> None:
    MortalStore.fresh()
    old = b'{"num_shards": 3, "num_done": 1, "num_lost": 0, "num_images": 9, "started": 5.0}'
    storage.publish(OUTPUT.file("plan.json"), old)
    record = read_plan_record(OUTPUT)
    assert record is not None and (record.num_shards, record.removed, record.settings) == (3, (), {})
