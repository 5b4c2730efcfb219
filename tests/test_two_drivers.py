"""Two drivers let go at the same instant on one output: one does the work, the other says so and ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import yaml

from jobs import tokenize_dataset as dataset_module
from jobs.checkpoints import read_head
from jobs.tokenize_dataset import Session
from jobs.tokenize_run import TokenizeRun, held
from make_data import folder_bytes, write_checkpoint, write_shards
from make_run import run_config, tokenize_here
from pipeline import lease as lease_module
from pipeline import storage
from pipeline.errors import RunHeld
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix
from pipeline.plan import make_plan
from pipeline.records import ShardResult, ShardState
from pipeline.shard_patterns import expand

COUNTS = [9, 4, 12, 7]
DONE = ShardResult("s3://b/0.tar", 10, "e", ShardState.DONE)
# All is imported before the line is read, so that both come to the lease within milliseconds.
DRIVER = """
import sys
import jobs.checkpoints, jobs.config, jobs.tokenize_config, jobs.tokenize_dataset, model.config
from jobs.cli import main
print("ready", flush=True)
sys.stdin.readline()
main(sys.argv[1:])
"""
SLEEPER = DRIVER.replace("print(", "from pipeline import lease; lease.EXPIRY_S, lease.RENEW_S = 2.0, 0.5\nprint(", 1)
HOLDER = """
import sys
from pipeline.errors import RunHeld
from pipeline.lease import Lease
from pipeline.output import OutputPrefix
print("ready", flush=True)
for line in sys.stdin:
    try:
        with Lease(OutputPrefix(line.strip())):
            print("held", flush=True)
            sys.stdin.readline()
        print("given back", flush=True)
    except RunHeld:
        print("told", flush=True)
        sys.stdin.readline()
        print("ended", flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`in`, `checkpoint`, `tokenize.yaml`, and `calm`: the output of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("two")
    write_shards(folder / "in", COUNTS)
    checkpoint = write_checkpoint(folder / "checkpoint")
    config = run_config(checkpoint, folder / "in", folder / "calm")
    assert tokenize_here(config, TokenizeRun.of(config).source.load()) == 0
    settings = {**config.public_settings(), "ray": {"num_actors": 1}}
    (folder / "tokenize.yaml").write_text(yaml.safe_dump(settings))
    assert read_head(str(checkpoint)).grid == (2, 2)
    return folder


@contextmanager
def started(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has said `ready`; gone, whatever happens, when the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def dead_lease() -> bytes:
    """As a driver of this host leaves it that was killed just now."""
    with subprocess.Popen([sys.executable, "-c", "pass"]) as gone:
        pass
    output = OutputPrefix("memory://dead-lease")
    with Lease(output):
        mine = json.loads(storage.read_bytes(output.file("lease.json")))
    return json.dumps({**mine, "writer": "gone", "pid": gone.pid, "started": "1"}).encode()


def outputs(tmp_path: Path, request: pytest.FixtureRequest, kind: str) -> str:
    return str(tmp_path / "out") if kind == "local disk" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"


@pytest.mark.ray
@pytest.mark.server
@pytest.mark.parametrize(
    ("kind", "killed_before"), [("s3", True), pytest.param("local disk", False, marks=pytest.mark.slow)]
)
def test_one_of_two_drivers_does_the_work_and_the_other_ends_with_3_in_seconds(
    folder: Path, tmp_path: Path, request: pytest.FixtureRequest, kind: str, killed_before: bool
) -> None:
    output = OutputPrefix(outputs(tmp_path, request, kind))
    if killed_before:
        storage.publish(output.file("lease.json"), dead_lease())
    arguments = ("tokenize", str(folder / "tokenize.yaml"), f"output={output.url}")
    with started(DRIVER, *arguments) as one, started(DRIVER, *arguments) as two:
        begun = time.monotonic()
        for driver in (one, two):
            driver.stdin.write("go\n")  # type: ignore[union-attr]
            driver.stdin.flush()  # type: ignore[union-attr]
        ends = {}
        while len(ends) < 2:
            ends.update({d: time.monotonic() - begun for d in (one, two) if d.poll() is not None and d not in ends})
            time.sleep(0.05)
        worker, told = sorted((one, two), key=lambda driver: driver.returncode)
        said, complaint = worker.communicate()[0], told.communicate()[1]
    assert (worker.returncode, told.returncode) == (0, 3)
    assert f"4 of 4 shards · {sum(COUNTS)} images tokenised · 0 failed" in said
    assert "another driver" in complaint and "Traceback" not in complaint
    assert ends[told] < min(60, ends[worker])
    found = {storage.base_name(i.url): storage.read_bytes(i.url) for i in storage.list_files(output.tokens_folder())}
    assert found == folder_bytes(folder / "calm" / "tokens")
    assert not storage.exists(output.file("lease.json")) and storage.exists(output.file("manifest.json"))


@pytest.mark.ray
def test_a_driver_that_wakes_after_another_took_its_run_ends_with_3_and_mixes_no_models(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, plan = tmp_path / "out", tmp_path / "out" / "plan.json"
    other = run_config(write_checkpoint(tmp_path / "other", seed=1), folder / "in", output)
    with started(SLEEPER, "tokenize", str(folder / "tokenize.yaml"), f"output={output}") as driver:
        driver.stdin.write("go\n")  # type: ignore[union-attr]
        driver.stdin.flush()  # type: ignore[union-attr]
        until = time.monotonic() + 60
        while not plan.exists() and time.monotonic() < until:
            time.sleep(0.005)
        driver.send_signal(signal.SIGSTOP)  # Ray is about to start: nothing is done yet
        time.sleep(2.5)
        monkeypatch.setattr(lease_module, "EXPIRY_S", 2.0)
        assert tokenize_here(other, TokenizeRun.of(other).source.load()) == 0
        before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
        driver.send_signal(signal.SIGCONT)
        complaint = driver.communicate(timeout=120)[1]
    assert driver.returncode == 3, complaint
    assert "took the run over" in complaint and "Traceback" not in complaint
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("moment", ["before its plan", "before its manifest"])
def test_a_driver_that_lost_its_lease_writes_nothing_more(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    config = run_config(folder / "checkpoint", folder / "in", tmp_path)
    if moment == "before its manifest":
        assert tokenize_here(config) == 0
        storage.remove(str(tmp_path / "manifest.json"))
    run = TokenizeRun.of(config)
    with pytest.raises(RunHeld, match="took the run over"), held(run) as ledger:
        session = Session(run, ledger, make_plan(expand(config.shards), run.output, ledger, run.table))
        if moment == "before its manifest":  # which is all that is left to do
            monkeypatch.setattr(dataset_module, "record_plan", lambda *_: lose_lease(run.output, monkeypatch))
        else:
            lose_lease(run.output, monkeypatch)
        (tmp_path / ".part.parquet.1.tmp").write_bytes(b"what the other driver is writing")
        before = {path: path.read_bytes() for path in files(tmp_path)}
        session.run(run.source, "dvae")
    assert {path: path.read_bytes() for path in files(tmp_path)} == before


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != "lease.json"]


def lose_lease(output: OutputPrefix, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another driver takes it over, and this one is as one that wakes after that."""
    there = json.loads(storage.read_bytes(output.file("lease.json")))
    storage.publish(output.file("lease.json"), json.dumps({**there, "writer": "another"}).encode())
    monkeypatch.setattr(lease_module, "EXPIRY_S", -1.0)


@pytest.mark.parametrize("write", [lambda ledger: ledger.append([DONE]), lambda ledger: ledger.rewrite([DONE])])
def test_the_ledger_of_a_driver_that_lost_its_lease_takes_no_more_rows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Ledger], None]
) -> None:
    run = TokenizeRun.of(run_config(folder / "checkpoint", folder / "in", tmp_path))
    with pytest.raises(RunHeld), held(run) as ledger:
        lose_lease(run.output, monkeypatch)
        write(ledger)
    assert not storage.list_files(run.output.ledger_folder())


@pytest.mark.server
@pytest.mark.parametrize("kind", ["local disk", "s3"])
def test_of_four_processes_at_once_exactly_one_holds_the_run_each_time(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    """On a fresh output, and on one that a killed driver left, by turns."""
    base = outputs(tmp_path, request, kind)
    with ExitStack() as stack:
        holders = [stack.enter_context(started(HOLDER)) for _ in range(4)]

        def tell(line: str) -> list[str]:
            for holder in holders:
                holder.stdin.write(line)  # type: ignore[union-attr]
                holder.stdin.flush()  # type: ignore[union-attr]
            return sorted(holder.stdout.readline().strip() for holder in holders)  # type: ignore[union-attr]

        for number in range(8):
            output = OutputPrefix(f"{base}/{number}")
            if number % 2:
                storage.publish(output.file("lease.json"), dead_lease())
            assert tell(f"{output.url}\n") == ["held", "told", "told", "told"]
            assert tell("end\n") == ["ended", "ended", "ended", "given back"]
            assert not storage.exists(output.file("lease.json"))
