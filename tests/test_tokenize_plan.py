"""`dvae tokenize --plan`: says what a run would do, measures a sample, and changes nothing anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fakes import FakeSource
from jobs.checkpoints import read_head
from jobs.estimate import ENGINE_SHARE, speed
from jobs.machine import Machine, actors_on, usable_cores
from jobs.plan_report import plan_json, plan_lines
from jobs.stage_costs import StageCosts
from jobs.tokenize_config import RaySettings, TokenizeConfig
from jobs.tokenize_plan import make_planned_run
from jobs.wording import about, duration, rate, size
from make_data import folder_bytes, write_checkpoint
from make_run import run_config, tokenize_here, write_shard
from pipeline import storage
from pipeline.errors import NoShardsMatched, RunMismatch
from pipeline.lease import Lease
from pipeline.output import OutputPrefix

COSTS = StageCosts(read_s=0.001, decode_s=0.004, encode_s=0.014, write_s=0.001)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def shards(folder: Path, *counts: int) -> Path:
    for number, count in enumerate(counts):
        write_shard(folder / "in" / f"s{number:02d}.tar", 100 * number, "+" * count)
    return folder / "in"


def planned(config: TokenizeConfig) -> dict[str, Any]:
    return plan_json(make_planned_run(config, FakeSource(read_head(config.checkpoint))))


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_nothing_is_written_and_no_lease_is_taken(checkpoint: Path, tmp_path: Path) -> None:
    config = run_config(checkpoint, shards(tmp_path, 5, 6), tmp_path / "out")
    before = everything(tmp_path)
    planned(config)
    assert not (tmp_path / "out").exists() and everything(tmp_path) == before
    tokenize_here(config)
    write_shard(tmp_path / "in" / "s99.tar", 900, "+++")
    before = everything(tmp_path)
    assert planned(config)["num_shards"] == 3
    assert everything(tmp_path) == before


def test_the_plan_names_what_is_to_be_done_and_what_is_done(checkpoint: Path, tmp_path: Path) -> None:
    folder = shards(tmp_path, 5, 6, 7)
    whole = (folder / "s01.tar").read_bytes()
    (folder / "s01.tar").write_bytes(whole[:700])
    config = run_config(checkpoint, folder, tmp_path / "out")
    tokenize_here(config)
    write_shard(folder / "s07.tar", 700, "++++")
    (folder / "s02.tar").unlink()
    plan = planned(config)
    todo = {Path(one["shard"]).name: one["tried_again"] for one in plan["todo"]}
    assert todo == {"s01.tar": True, "s07.tar": False}
    assert [Path(url).name for url in plan["done"]] == ["s00.tar"]
    assert [Path(url).name for url in plan["removed"]] == ["s02.tar"]
    assert plan["todo_by_reason"] == {"new": 1, "tried again": 1}
    assert Path(plan["sample"]["shard"]).name == "s07.tar", "a damaged shard gives no sample: the next one does"


def test_the_amount_goes_by_the_parts_that_are_there(checkpoint: Path, tmp_path: Path) -> None:
    folder = shards(tmp_path, 20)
    config = run_config(checkpoint, folder, tmp_path / "out")
    tokenize_here(config)
    (part,) = folder_bytes(tmp_path / "out" / "tokens").values()
    for number in (1, 2):
        write_shard(folder / f"s{number:02d}.tar", 100 * number, "+" * 20)
    amount = planned(config)["amount"]
    assert amount["num_images"] == pytest.approx(40, rel=0.05)
    assert amount["part_bytes"] == pytest.approx(2 * len(part), rel=0.05)


def test_without_parts_the_amount_goes_by_the_sample(checkpoint: Path, tmp_path: Path) -> None:
    plan = planned(run_config(checkpoint, shards(tmp_path, 30, 30, 30), tmp_path / "out"))
    assert plan["sample"]["num_images"] == 30
    assert plan["amount"]["num_images"] == pytest.approx(90, rel=0.15)
    assert plan["left_s"] == pytest.approx(plan["amount"]["num_images"] / plan["speed"]["images_per_s"])


def test_nothing_to_do_needs_no_sample(checkpoint: Path, tmp_path: Path) -> None:
    config = run_config(checkpoint, shards(tmp_path, 3), tmp_path / "out")
    tokenize_here(config)
    done = make_planned_run(config)
    assert done.sample is None and "[green]nothing to do[/]" in list(plan_lines(done, "dvae tokenize"))


def test_a_gpu_that_is_not_here_is_said_and_the_plan_stands(checkpoint: Path, tmp_path: Path) -> None:
    config = run_config(checkpoint, shards(tmp_path, 3), tmp_path / "out", ray={"gpus_per_actor": 1})
    plan = planned(config)
    assert "this machine has none" in plan["note"] and plan["speed"] is None and len(plan["todo"]) == 1


def test_a_driver_at_work_is_said(checkpoint: Path, tmp_path: Path) -> None:
    config = run_config(checkpoint, shards(tmp_path, 3), tmp_path / "out")
    with Lease(OutputPrefix(str(tmp_path / "out"))):
        assert planned(config)["driver_at_work"]


def test_what_would_stop_a_run_stops_its_plan(checkpoint: Path, tmp_path: Path) -> None:
    config = run_config(checkpoint, shards(tmp_path, 3), tmp_path / "out")
    tokenize_here(config)
    with pytest.raises(RunMismatch, match="batch_size"):
        planned(config.model_copy(update={"batch_size": 4}))
    with pytest.raises(NoShardsMatched):
        planned(config.model_copy(update={"shards": [str(tmp_path / "none-*.tar")]}))


def test_the_command_prints_a_plan_and_the_line_that_starts_it(checkpoint: Path, tmp_path: Path) -> None:
    """Ray is not even imported."""
    folder = shards(tmp_path, *[2] * 9)
    (tmp_path / "t.yaml").write_text(f"checkpoint: {checkpoint}\nshards: {folder}\noutput: {tmp_path}/out\n")
    code = (
        "import sys; from jobs.cli import main\n"
        f"sys.argv = ['dvae', 'tokenize', {str(tmp_path / 't.yaml')!r}, '--plan', 'batch_size=8', *sys.argv[1:]]\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, 'ray' in sys.modules, file=sys.stderr)"
    )

    def dvae(*arguments: str) -> tuple[str, str]:
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
        return done.stdout, done.stderr.splitlines()[-1]

    said, end = dvae()
    assert end == "0 False"
    assert "9 shards: 0 done, 9 new" in said and "… 3 more (--json lists all)" in said
    assert said.splitlines()[-1] == f"  dvae tokenize {tmp_path}/t.yaml batch_size=8"
    said, end = dvae("--json")
    assert end == "0 False" and len(json.loads(said)["todo"]) == 9
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("cpus", "gpus", "settings", "shards", "actors"),
    [
        (8, 0, {}, 100, 8),
        (8, 0, {}, 3, 3),
        (8, 0, {"cpus_per_actor": 3}, 100, 2),
        (8, 0, {"num_actors": 5}, 100, 5),
        (8, 0, {"decode": "tasks"}, 100, 4),
        (64, 4, {"gpus_per_actor": 1}, 100, 4),
        (64, 4, {"gpus_per_actor": 0.5}, 100, 8),
        (64, 0, {"gpus_per_actor": 1}, 100, 1),
    ],
)
def test_actors_are_as_many_as_a_run_would_have(
    cpus: int, gpus: int, settings: dict[str, Any], shards: int, actors: int
) -> None:
    assert actors_on(Machine("m", cpus, gpus), RaySettings(**settings), shards) == actors


def test_where_the_cores_do_everything_they_are_the_limit() -> None:
    found = speed(COSTS, COSTS, Machine("m", 8, 0), 8, on_gpu=False)
    assert (found.limit, found.ideal) == ("cores", pytest.approx(8 / 0.020))
    assert found.images_per_s == pytest.approx(ENGINE_SHARE * 400)


def test_few_actors_are_the_limit_where_cores_are_left() -> None:
    found = speed(COSTS, COSTS, Machine("m", 8, 0), 2, on_gpu=False)
    assert (found.limit, found.ideal) == ("encoder", pytest.approx(2 / 0.014))


def test_beside_a_gpu_the_cores_do_the_rest() -> None:
    on_gpu = StageCosts(0.001, 0.004, 0.0005, 0.001)
    assert speed(on_gpu, on_gpu, Machine("m", 6, 1), 1, on_gpu=True).ideal == pytest.approx(6 / 0.006)
    assert speed(on_gpu, on_gpu, Machine("m", 60, 1), 1, on_gpu=True).ideal == pytest.approx(2000)


def test_a_container_with_less_than_its_machine_has_less(tmp_path: Path) -> None:
    everything_here = usable_cores(tmp_path)
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert usable_cores(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_cores(tmp_path) == everything_here
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    storage.publish(str(tmp_path / "cpu" / "cpu.cfs_quota_us"), b"50000\n")
    storage.publish(str(tmp_path / "cpu" / "cpu.cfs_period_us"), b"100000\n")
    assert usable_cores(tmp_path) == 1


def test_figures_are_said_as_people_say_them() -> None:
    assert [duration(s) for s in (5, 600, 9000, 400_000)] == ["5 s", "10 min", "2.5 h", "4.6 days"]
    assert [size(n) for n in (12, 4_500, 7.3e6, 2.5e12)] == ["12 bytes", "4.5 kB", "7.3 MB", "2.5 TB"]
    assert [rate(r) for r in (0.1234, 42.42, 1821.4)] == ["0.123", "42.4", "1,821"]
    assert [about(n) for n in (2055, 12_345_678)] == ["2,060", "12,300,000"]
