"""The command as a person meets it: fast to answer, one clear message for what is wrong, exit codes that say it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fakes import HeadTokenizer
from jobs import status as status_module
from jobs.checkpoints import read_head
from jobs.status import read_status, run_status
from make_data import write_checkpoint, write_shards
from pipeline import storage
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix, RunDescription, claim, part_name
from pipeline.plan import PlanRecord, ShardTask, make_plan, record_plan
from pipeline.records import FailureReason, ObjectInfo, SampleFailure, ShardResult, ShardState, Stage
from pipeline.shard_patterns import expand
from pipeline.token_table import TableSpec, errors_bytes
from pipeline.tokenize_shard import TokenizeJob, TokenizeWorker, quarantine

DVAE = [sys.executable, "-m", "jobs.cli"]
NEVER_IN_STATUS = ("torch", "ray", "PIL", "webdataset", "duckdb")


def dvae(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*DVAE, *arguments], capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def output(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two shards, made without Ray."""
    folder = tmp_path_factory.mktemp("run")
    write_shards(folder / "in", [3, 4])
    head = read_head(str(checkpoint))
    table = TableSpec(head.tokenizer_id, head.grid, head.codebook_size, head.image_spec)
    prefix = OutputPrefix(str(folder / "out"))
    claim(prefix, RunDescription(table, {}, {}), accept_numerics=False)
    worker = TokenizeWorker(HeadTokenizer(head), TokenizeJob(prefix, table, 8, 1))
    ledger = Ledger(prefix)
    plan = make_plan(expand([str(folder / "in")]), prefix, ledger, table)
    record_plan(prefix, plan, {})
    ledger.append([worker.tokenize(task) for task in plan.todo])
    worker.close()
    return folder / "out"


def cpu_seconds(*arguments: str) -> float:
    """Of the least of three runs. Not the clock's: on a machine with other work that measures the other work."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        dvae(*arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def test_help_comes_in_under_half_a_second() -> None:
    assert "tokenize" in dvae("--help").stdout
    assert cpu_seconds("--help") < 0.5


def test_status_comes_in_under_one_and_a_half_seconds_without_torch_or_ray(output: Path) -> None:
    assert cpu_seconds("status", str(output)) < 1.5
    code = (
        "import sys; from jobs.cli import main\n"
        f"try: main(['status', {str(output)!r}])\n"
        f"except SystemExit: print([m for m in {NEVER_IN_STATUS!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_status_counts_what_is_there(output: Path) -> None:
    done = dvae("status", str(output), "--json")
    status = json.loads(done.stdout)
    assert (status["num_done"], status["num_shards"], status["num_images"], status["num_failed"]) == (2, 2, 7, 0)
    assert status["state"] == "stopped" and done.returncode == 1  # no manifest: nobody said that it is complete


def test_status_tells_a_driver_at_work_from_one_that_was_killed(output: Path) -> None:
    prefix = OutputPrefix(str(output))
    with Lease(prefix):
        running = json.loads(dvae("status", str(output), "--json").stdout)
        left = (output / "lease.json").read_bytes()
    assert (running["state"], running["left_s"]) == ("running", 0.0) and running["images_per_s"] > 0
    assert "2 of 2 done" in dvae("status", str(output)).stdout
    (output / "lease.json").write_bytes(left.replace(str(os.getpid()).encode(), b"999999999"))
    assert json.loads(dvae("status", str(output), "--json").stdout)["state"] == "stopped"
    (output / "lease.json").unlink()


def test_status_of_a_big_run_reads_so_many_errors_files_and_says_so(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Why whole shards failed is in the ledger; why images did is in the errors files alone."""
    prefix = OutputPrefix(str(tmp_path))
    (tmp_path / "run.json").write_bytes((output / "run.json").read_bytes())
    bad = SampleFailure("k", 0, 512, 9, Stage.DECODE, FailureReason.NOT_AN_IMAGE, "no image")
    for n in range(5):
        shard = ObjectInfo(f"/in/{n}.tar", 1, "e")
        storage.publish(prefix.errors(part_name(shard.url)), errors_bytes(shard, [bad]))
    task = ShardTask(ObjectInfo("/in/lost.tar", 1, "e"), part_name("/in/lost.tar"))
    Ledger(prefix).append([quarantine(prefix, task, FailureReason.SHARD_TRUNCATED, "cut", 3)])
    everything = read_status(prefix)
    assert everything.errors_by_reason == {"not_an_image": 5, "shard_truncated": 1}
    monkeypatch.setattr(status_module, "MAX_ERRORS_FILES", 3)
    some = read_status(prefix)
    assert some.errors_by_reason == {"not_an_image": 3, "shard_truncated": 1}
    assert (some.num_errors_files_read, some.num_errors_files) == (3, 5)
    run_status(str(tmp_path), as_json=False)
    assert "(images of the first 3 of 5 errors files)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["status", "{tmp}/nothing"], "holds no run"),
        (["status", "{tmp}/training"], "is the output of another command"),
        (["tokenize", "{tmp}/nope.yaml"], "no such configuration file"),
        (["tokenize", "{tmp}/good.yaml", "batchsize=3"], "did you mean batch_size?"),
        (["tokenize", "{tmp}/good.yaml", "ray.num_actor=3"], "did you mean ray.num_actors?"),
        (["tokenize", "{tmp}/good.yaml", "batch_size=many"], "batch_size: Input should be a valid integer"),
        (["tokenize", "{tmp}/good.yaml", "batch_size"], "write key=value"),
        (["tokenize", "{tmp}/good.yaml", "checkpoint={tmp}/nothing"], "no checkpoint at"),
        (["tokenize", "{tmp}/good.yaml", "checkpoint={tmp}/no-checkpoint"], "no checkpoint of ours"),
        (["tokenize", "{tmp}/good.yaml", "shards={tmp}/none-*.tar"], "matches nothing"),
        (["tokenize", "{tmp}/good.yaml", "shards=/nope.tar"], "the folder / holds no such file"),
        (["tokenize", "{tmp}/good.yaml", "shards={tmp}/empty"], "holds no such file"),
        (["tokenize", "{tmp}/good.yaml", "metadata.key.from=txt"], "metadata column 'key'"),
        (["tokenize", "{tmp}/good.yaml", "--json"], "--json belongs to --plan"),
        (["bench", "{tmp}/good.yaml", "checkpoint={tmp}/nothing"], "no checkpoint at"),
        (["bench", "{tmp}/good.yaml"], "matches nothing"),
        (["tokenise", "x"], "No such command"),
        (["pack", "{tmp}/nothing", "{tmp}/out"], "nothing"),
        (["show", "{tmp}/nothing", "--checkpoint", "{tmp}/ck"], "no run"),
        (["submit", "tokenize", "{tmp}/good.yaml"], "--address"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_wrong_gets_one_clear_message_and_exit_code_2(
    checkpoint: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    (tmp_path / "good.yaml").write_text(
        f"checkpoint: {checkpoint}\nshards: {tmp_path}/x-*.tar\noutput: {tmp_path}/out\n"
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "run.json").write_text('{"command": "train"}')
    (tmp_path / "no-checkpoint").mkdir()
    (tmp_path / "no-checkpoint" / "checkpoint.json").write_text('{"hello": 1}')
    done = dvae(*(argument.replace("{tmp}", str(tmp_path)) for argument in arguments))
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists(), "nothing may be started"


def test_every_configuration_file_loads() -> None:
    from jobs.config import load_config
    from jobs.tokenize_config import TokenizeConfig
    from jobs.train_config import TrainConfig

    files = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
    assert len(files) >= 2
    for path in files:
        load_config(TrainConfig if "train" in path.name else TokenizeConfig, str(path))


def test_configs_tokenize_names_every_key_and_the_defaults() -> None:
    import yaml

    from jobs.tokenize_config import RaySettings, TokenizeConfig

    written = yaml.safe_load((Path(__file__).parent.parent / "configs" / "tokenize.yaml").read_text())
    assert set(written) == set(TokenizeConfig.model_fields)
    assert set(written["ray"]) == set(RaySettings.model_fields)
    assert RaySettings.model_validate(written["ray"]) == RaySettings()


def test_time_left_counts_only_what_this_driver_did() -> None:
    """Ten shards, five done before, three of the others quarantined before: nothing is known until one is done."""
    from jobs.status import _speed

    before = [ledger_row(n) for n in range(5)]
    plan = PlanRecord(num_shards=10, num_done=5, num_lost=3, num_images=50, started=time.time() - 100)
    assert _speed(plan, before, 3) == (0.0, None)
    images_per_s, left_s = _speed(plan, [*before, ledger_row(5)], 2)
    assert images_per_s == pytest.approx(0.1, rel=0.1) and left_s == pytest.approx(400, rel=0.1)


def ledger_row(number: int) -> ShardResult:
    return ShardResult(f"s{number}", 1, "e", ShardState.DONE, f"s{number}.parquet", num_rows=10, seconds=1.0)
