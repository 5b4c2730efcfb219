"""The tokenising job on a real Ray: every image accounted for, the same bytes whatever happens on the way."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest

from fakes import FakeSource, LoadFault, RecordingSource, ShardFault
from jobs.checkpoints import read_head
from jobs.cluster import ClusterError
from jobs.config import check
from jobs.status import read_status
from jobs.tokenize_config import TokenizeConfig
from jobs.tokenize_dataset import run_tokenize
from jobs.verify import run_verify
from make_data import folder_bytes, sample_members, tar_bytes, write_checkpoint, write_shards
from pipeline.errors import NoShardsMatched, RunHeld, RunMismatch, StorageError
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
COUNTS = [9, 1, 0, 14, 8, 5]  # below, at and above the batch of 8; one shard without a sample


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, COUNTS)
    return folder


def settings(checkpoint: Path, shards: Path | list[str], output: Path, **changes: Any) -> TokenizeConfig:
    ray = {"num_actors": 1, **changes.pop("ray", {})}
    patterns = shards if isinstance(shards, list) else str(shards)
    values = {
        "checkpoint": str(checkpoint),
        "shards": patterns,
        "output": str(output),
        "batch_size": 8,
        "ray": ray,
        "retry_pause_s": 0,
    }
    return check(TokenizeConfig, {**values, "metadata": {"caption": {"from": "txt"}}, **changes}, "test")


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    assert run_tokenize(settings(checkpoint, shards, output), "dvae") == 0
    return output


def parts(output: Path) -> dict[str, bytes]:
    return folder_bytes(output / "tokens")


def test_every_image_of_every_shard_has_its_row(undisturbed: Path) -> None:
    table = ds.dataset(undisturbed / "tokens").to_table().sort_by([("shard", "ascending"), ("index", "ascending")])
    assert table["key"].to_pylist() == [f"img{n:05d}" for n in range(sum(COUNTS))]
    assert table["caption"].to_pylist() == [f"picture {n}" for n in range(sum(COUNTS))]
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    assert [part["num_rows"] for part in manifest["parts"]] == COUNTS
    assert not (undisturbed / "errors").exists()
    assert not (undisturbed / "lease.json").exists()


def test_tokens_are_those_of_the_model_called_directly(undisturbed: Path, checkpoint: Path) -> None:
    from jobs.api import load_tokenizer
    from make_data import image_bytes

    table = ds.dataset(undisturbed / "tokens").to_table(filter=ds.field("key") == "img00003")
    tokens_BHW = load_tokenizer(str(checkpoint), device="cpu", batch_size=8).encode([image_bytes(3)])
    assert table["tokens"].to_pylist() == [tokens_BHW.reshape(-1).tolist()]


def test_one_actor_and_four_and_another_order_give_the_same_bytes(
    checkpoint: Path, shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    names = sorted(str(path) for path in shards.iterdir())
    backwards = settings(checkpoint, names[::-1], tmp_path / "four", ray={"num_actors": 4, "decode_threads": 3})
    assert run_tokenize(backwards, "dvae") == 0
    assert parts(tmp_path / "four") == parts(undisturbed)


@pytest.mark.parametrize("num_actors", [1, 3])
def test_decoding_in_tasks_gives_the_same_bytes(
    checkpoint: Path, shards: Path, undisturbed: Path, tmp_path: Path, num_actors: int, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = {"num_actors": num_actors, "decode": "tasks", "decode_threads": 1}
    with caplog.at_level(logging.INFO):
        assert run_tokenize(settings(checkpoint, shards, tmp_path, ray=elsewhere), "dvae") == 0
    assert parts(tmp_path) == parts(undisturbed)
    warnings = [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]
    assert "decode tasks of 1 threads" in caplog.text
    assert not [words for words in warnings if not words.startswith("waiting for")], "a busy machine starts slowly"


def test_a_finished_run_has_nothing_to_do_and_writes_nothing(
    checkpoint: Path, shards: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    assert run_tokenize(settings(checkpoint, shards, undisturbed), "dvae") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()} == before


def test_another_checkpoint_is_refused_naming_both_ids(
    checkpoint: Path, shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    other = write_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(RunMismatch) as refusal:
        run_tokenize(settings(other, shards, undisturbed), "dvae")
    assert read_head(str(checkpoint)).tokenizer_id in str(refusal.value)
    assert read_head(str(other)).tokenizer_id in str(refusal.value)


def test_a_second_driver_is_told_and_touches_nothing(checkpoint: Path, shards: Path, tmp_path: Path) -> None:
    config = settings(checkpoint, shards, tmp_path)
    with Lease(OutputPrefix(str(tmp_path))), pytest.raises(RunHeld, match="another driver") as refusal:
        run_tokenize(config, "dvae")
    assert refusal.value.exit_code == 3
    assert not (tmp_path / "tokens").exists()


def test_a_pattern_that_matches_nothing_starts_nothing(checkpoint: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(NoShardsMatched, match=r"nope-\*\.tar"):
        run_tokenize(settings(checkpoint, [str(shards), str(shards / "nope-*.tar")], tmp_path / "out"), "dvae")
    assert not (tmp_path / "out").exists()


def test_growing_inputs_keep_the_names_of_finished_parts(checkpoint: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "in", [3, 4])
    config = settings(checkpoint, tmp_path / "in", tmp_path / "out")
    assert run_tokenize(config, "dvae") == 0
    before = parts(tmp_path / "out")
    (tmp_path / "in" / "added.tar").write_bytes(tar_bytes(sample_members(50, 2)))
    assert run_tokenize(config, "dvae") == 0
    after = parts(tmp_path / "out")
    assert len(after) == 3 and before.items() <= after.items()


def test_a_shard_that_is_gone_is_said_so_keeps_its_part_and_is_dropped_when_asked(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    write_shards(tmp_path / "in", [3, 4])
    config, manifest = settings(checkpoint, tmp_path / "in", tmp_path / "out"), tmp_path / "out" / "manifest.json"
    assert run_tokenize(config, "dvae") == 0
    (tmp_path / "in" / "made-000000.tar").unlink()
    (tmp_path / "in" / "added.tar").write_bytes(tar_bytes(sample_members(50, 2)))
    assert run_tokenize(config, "dvae") == 0
    assert "plan: 2 shards: 1 done, 1 new; 1 removed from the input keep their parts" in caplog.text
    said = capsys.readouterr().out
    assert "2 of 2 shards · 6 images" in said
    assert "no longer in the input: 1 shard (made-000000.tar); what they gave is kept" in said and "--prune" in said
    assert len(parts(tmp_path / "out")) == 3
    assert [one["num_rows"] for one in json.loads(manifest.read_text())["removed"]] == [3]
    status = read_status(OutputPrefix(str(tmp_path / "out")))
    assert (status.num_done, status.num_shards, status.num_images, status.num_removed_images) == (2, 2, 6, 3)
    assert [Path(shard).name for shard in status.removed] == ["made-000000.tar"]
    assert run_verify(str(tmp_path / "out"), as_json=False) == 0

    assert run_tokenize(config, "dvae", prune=True) == 0
    assert "dropped, no longer in the input: 1 shard (made-000000.tar)" in capsys.readouterr().out
    assert len(parts(tmp_path / "out")) == 2 and json.loads(manifest.read_text())["removed"] == []
    status = read_status(OutputPrefix(str(tmp_path / "out")))
    assert (status.state, status.num_done, status.num_parts, status.removed) == ("complete", 2, 2, [])
    assert run_verify(str(tmp_path / "out"), as_json=False) == 0
    (tmp_path / "in" / "made-000001.tar").unlink()
    (tmp_path / "in" / "added.tar").unlink()
    with pytest.raises(NoShardsMatched):  # a listing that gives nothing is no reason to drop all
        run_tokenize(config, "dvae", prune=True)
    assert len(parts(tmp_path / "out")) == 2


def test_a_shard_cut_at_a_member_boundary_is_quarantined_and_the_others_are_finished(
    checkpoint: Path, shards: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for path in shards.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    cut = folder / "made-000003.tar"
    whole, members = cut.read_bytes(), sample_members(10, 2)
    boundary = sum(512 + len(data) + -len(data) % 512 for _, data in members)
    cut.write_bytes(whole[:boundary])
    config = settings(checkpoint, folder, tmp_path / "out")
    assert run_tokenize(config, "dvae tokenize x.yaml") == 1
    said = capsys.readouterr().out
    assert "1 shards are quarantined (1 shard_truncated)" in said and "dvae tokenize x.yaml" in said
    assert len(parts(tmp_path / "out")) == len(COUNTS) - 1
    errors = ds.dataset(tmp_path / "out" / "errors").to_table().to_pylist()
    assert [(row["stage"], row["reason"]) for row in errors] == [("shard", "shard_truncated")]
    rows = Ledger(OutputPrefix(str(tmp_path / "out"))).read()
    assert rows[str(cut)].attempts == 3
    assert not (tmp_path / "out" / "manifest.json").exists()

    cut.write_bytes(whole)  # mended: the same command does only this one
    assert run_tokenize(config, "dvae") == 0
    assert len(parts(tmp_path / "out")) == len(COUNTS)
    assert not list((tmp_path / "out" / "errors").iterdir())


def test_bad_images_trip_the_budget_and_are_all_accounted_for(checkpoint: Path, tmp_path: Path) -> None:
    members = [*sample_members(0, 6), ("bad1.jpg", b"not an image"), ("bad2.jpg", sample_members(7, 1)[0][1][:-40])]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "mixed.tar").write_bytes(tar_bytes(members))
    assert run_tokenize(settings(checkpoint, tmp_path / "in", tmp_path / "out"), "dvae") == 1
    assert (tmp_path / "out" / "manifest.json").exists()  # over budget, but every image is accounted for
    generous = settings(checkpoint, tmp_path / "in", tmp_path / "out", max_failed_samples=0.25)
    assert run_tokenize(generous, "dvae") == 0
    rows = ds.dataset(tmp_path / "out" / "tokens").to_table().num_rows
    errors = ds.dataset(tmp_path / "out" / "errors").to_table().to_pylist()
    assert rows + len(errors) == 8
    assert {row["key"]: row["reason"] for row in errors} == {"bad1": "not_an_image", "bad2": "truncated_image"}


def test_two_shards_are_open_in_one_actor_and_never_more_than_the_limit(
    checkpoint: Path, shards: Path, tmp_path: Path
) -> None:
    log = tmp_path / "opened"
    source = RecordingSource(read_head(str(checkpoint)), seconds=0.05, log=str(log), first_waits_for=2)
    config = settings(checkpoint, shards, tmp_path / "out", ray={"shards_in_flight": 3})
    assert run_tokenize(config, "dvae", source) == 0
    lines = [line.split() for line in log.read_text().splitlines()]
    assert len({pid for _, pid, _ in lines}) == 1
    assert 2 <= max(int(num_open) for _, _, num_open in lines) <= 3


def test_an_actor_killed_while_it_holds_two_shards_costs_nothing(
    checkpoint: Path, shards: Path, tmp_path: Path
) -> None:
    head, log = read_head(str(checkpoint)), tmp_path / "opened"
    assert run_tokenize(settings(checkpoint, shards, tmp_path / "calm"), "dvae", FakeSource(head)) == 0
    killed: list[int] = []
    killer = threading.Thread(target=lambda: killed.append(kill_when_two_are_open(log)))
    killer.start()
    source = RecordingSource(head, seconds=0.3, log=str(log))
    config = settings(checkpoint, shards, tmp_path / "killed", ray={"shards_in_flight": 2})
    assert run_tokenize(config, "dvae", source) == 0
    killer.join()
    assert killed[0] in {int(line.split()[1]) for line in log.read_text().splitlines()}
    assert len({line.split()[1] for line in log.read_text().splitlines()}) == 2  # it was replaced
    assert parts(tmp_path / "killed") == parts(tmp_path / "calm")


def kill_when_two_are_open(log: Path, timeout_s: float = 60) -> int:
    for _ in range(int(timeout_s / 0.01)):
        for line in log.read_text().splitlines() if log.exists() else []:
            if line.endswith(" 2"):
                pid = int(line.split()[1])
                os.kill(pid, signal.SIGKILL)
                return pid
        time.sleep(0.01)
    raise TimeoutError("never two shards open")


@pytest.mark.parametrize("deed", ["exit", "hang", "raise"])
def test_a_poison_shard_is_quarantined_and_its_neighbours_are_not_charged(
    checkpoint: Path, shards: Path, tmp_path: Path, deed: str
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    source = ShardFault(read_head(str(checkpoint)), needle="made-000001", deed=deed, marks=str(marks))
    config = settings(checkpoint, shards, tmp_path / "out", attempts=2, shard_deadline_s=3 if deed == "hang" else 1800)
    assert run_tokenize(config, "dvae", source) == 1
    rows = Ledger(OutputPrefix(str(tmp_path / "out"))).read()
    reasons = {"exit": "shard_crashed", "hang": "shard_timed_out", "raise": "shard_unreadable"}
    states = {Path(url).name: (row.state.value, row.reason, row.attempts) for url, row in rows.items()}
    assert states.pop("made-000001.tar") == ("quarantined", reasons[deed], 2)
    assert Counter(states.values()) == {("done", None, 1): len(COUNTS) - 1}


def test_a_shard_that_failed_once_is_tried_again(checkpoint: Path, shards: Path, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    source = ShardFault(read_head(str(checkpoint)), needle="made-000004", deed="raise", times=1, marks=str(marks))
    assert run_tokenize(settings(checkpoint, shards, tmp_path / "out"), "dvae", source) == 0
    row = Ledger(OutputPrefix(str(tmp_path / "out"))).read()[str(shards / "made-000004.tar")]
    assert (row.state.value, row.attempts) == ("done", 2)


def test_an_actor_that_is_broken_but_lives_is_replaced_and_its_shards_are_not_charged(
    checkpoint: Path, shards: Path, tmp_path: Path
) -> None:
    """A CUDA error sticks to its process: left in the pool, it would fail shard after shard."""
    marks = tmp_path / "marks"
    marks.mkdir()
    source = ShardFault(read_head(str(checkpoint)), needle="made-000003", deed="break", times=1, marks=str(marks))
    assert run_tokenize(settings(checkpoint, shards, tmp_path / "out"), "dvae", source) == 0
    rows = Ledger(OutputPrefix(str(tmp_path / "out"))).read().values()
    assert len(rows) == len(COUNTS) and max(row.attempts for row in rows) <= 2
    assert len(list(marks.iterdir())) == 1


def test_an_actor_that_never_loads_is_given_up_and_the_others_do_the_work(
    checkpoint: Path, shards: Path, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    source = LoadFault(read_head(str(checkpoint)), seconds=1.5, marks=str(marks))
    config = settings(checkpoint, shards, tmp_path / "out", ray={"num_actors": 2, "shards_in_flight": 1})
    assert run_tokenize(config, "dvae", source) == 0
    assert len(list(marks.iterdir())) == 4  # one that loaded, three tries of the other


def test_no_actor_that_loads_is_said_and_nothing_was_started(checkpoint: Path, shards: Path, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    source = LoadFault(read_head(str(checkpoint)), good=0, marks=str(marks))
    with pytest.raises(ClusterError, match="this machine cannot load it"):
        run_tokenize(settings(checkpoint, shards, tmp_path / "out"), "dvae", source)


def test_a_store_that_fails_half_way_ends_with_1_and_the_line_to_go_on(
    checkpoint: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise StorageError("cannot write: the disk is full")

    monkeypatch.setattr("jobs.tokenize_dataset.quarantine", full)
    marks = tmp_path / "marks"
    marks.mkdir()
    source = ShardFault(read_head(str(checkpoint)), needle="made-000001", deed="raise", marks=str(marks))
    assert run_tokenize(settings(checkpoint, shards, tmp_path / "out"), "dvae tokenize x.yaml", source) == 1
    said = capsys.readouterr().out
    assert "the disk is full" in said and "dvae tokenize x.yaml" in said
    assert len(Ledger(OutputPrefix(str(tmp_path / "out"))).read()) >= 1


def test_logical_gpus_carry_one_actor_each(checkpoint: Path, shards: Path, tmp_path: Path) -> None:
    log = tmp_path / "opened"
    source = RecordingSource(read_head(str(checkpoint)), seconds=0.2, log=str(log))
    config = settings(checkpoint, shards, tmp_path / "out", ray={"num_actors": None, "gpus_per_actor": 1})
    assert run_tokenize(config, "dvae", source) == 0
    assert len({line.split()[1] for line in log.read_text().splitlines()}) == 2


def test_a_cluster_without_the_gpus_asked_for_is_said_after_the_stated_wait(
    checkpoint: Path, shards: Path, tmp_path: Path
) -> None:
    config = settings(checkpoint, shards, tmp_path / "out", ray={"gpus_per_actor": 3, "wait_s": 2})
    with pytest.raises(ClusterError, match=r"3 GPU; the\s+cluster has .* 2 of 2 GPUs free") as refusal:
        run_tokenize(config, "dvae", FakeSource(read_head(str(checkpoint))))
    assert refusal.value.exit_code == 2
    remedy = settings(checkpoint, shards, tmp_path / "out", batch_size=16)
    assert run_tokenize(remedy, "dvae") == 0, "a start that came to nothing binds nobody"


def test_a_damaged_checkpoint_is_named_and_nothing_is_tokenised(checkpoint: Path, shards: Path, tmp_path: Path) -> None:
    from model.checkpoint import CheckpointError

    damaged = write_checkpoint(tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        run_tokenize(settings(damaged, shards, tmp_path / "out"), "dvae")


def test_ctrl_c_stops_in_seconds_says_how_to_go_on_and_the_rest_is_done_later(
    checkpoint: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, told = tmp_path / "opened", list[float]()

    def interrupt() -> None:
        while not log.exists() and time.monotonic() < begun + 120:
            time.sleep(0.01)
        told.append(time.monotonic())
        if log.exists():
            os.kill(os.getpid(), signal.SIGINT)

    config = settings(checkpoint, shards, tmp_path / "out", ray={"shards_in_flight": 1})
    source, begun = RecordingSource(read_head(str(checkpoint)), seconds=20.0, log=str(log)), time.monotonic()
    threading.Thread(target=interrupt).start()
    assert run_tokenize(config, "dvae tokenize x.yaml", source) == 130
    assert time.monotonic() - told[0] < 60, "all of it would take more than two minutes"
    assert "dvae tokenize x.yaml" in capsys.readouterr().out
    num_done = len(parts(tmp_path / "out"))
    assert num_done < len(COUNTS) and not list((tmp_path / "out").rglob("*.tmp"))
    assert run_tokenize(config, "dvae", FakeSource(read_head(str(checkpoint)))) == 0
    assert len(parts(tmp_path / "out")) == len(COUNTS)
