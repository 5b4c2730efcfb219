"""`dvae verify` as a person or a script meets it: exit codes, the table, JSON."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.tokenize_config import TokenizeConfig
from make_data import write_checkpoint
from make_run import part_of, run_config, tokenize_here, write_shard
from pipeline import storage
from pipeline.lease import Lease
from pipeline.output import OutputPrefix

NEVER_IN_VERIFY = ("torch", "ray", "PIL", "webdataset", "duckdb")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TokenizeConfig:
    folder = tmp_path_factory.mktemp("verify")
    for number in range(25):
        write_shard(folder / "in" / f"s{number:02d}.tar", 10 * number, "+-")
    config = run_config(write_checkpoint(folder / "ck"), folder / "in", folder / "out", max_failed_samples=0.5)
    assert tokenize_here(config) == 0
    return config


@pytest.fixture
def output(made: TokenizeConfig, tmp_path: Path) -> Path:
    return shutil.copytree(made.output, tmp_path / "out")


def verify(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "jobs.cli", "verify", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=240, check=False)


def test_a_complete_run_is_0_and_the_table_says_how_many(output: Path) -> None:
    for options, read in (((), "every byte"), (("--quick",), "footers and listings")):
        done = verify(output, *options)
        assert done.returncode == 0, done.stderr
        assert "25 done and right, 0 quarantined" in done.stdout and read in done.stdout
        assert "50 = 25 rows + 25 errors" in done.stdout
        assert done.stdout.splitlines()[-1].startswith("complete: every")


def test_what_is_wrong_is_1_with_the_files_and_the_remedy(output: Path) -> None:
    for number in range(25):
        part_of(output, f"s{number:02d}").write_bytes(b"")
    shutil.rmtree(output / "errors")
    done = verify(output)
    assert done.returncode == 1
    assert "torn: 25; remove these files and run the same command again" in done.stdout
    assert done.stdout.count("tokens/") == 20 and "and 5 more: --json lists all" in done.stdout
    assert done.stdout.splitlines()[-1] == "not complete: 25 torn"
    assert len(json.loads(verify(output, "--json").stdout)["problems"]) == 25


def test_json_holds_the_counts_and_the_problems(output: Path) -> None:
    part_of(output, "s03").unlink()
    done = verify(output, "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert (report["complete"], report["running"], report["quick"]) == (False, False, False)
    assert (report["num_done"], report["num_images"], report["num_failed"]) == (24, 24, 24)
    (problem,) = report["problems"]
    assert problem["kind"] == "missing" and problem["file"].startswith("tokens/s03-")


def test_a_ledger_made_again_is_0_and_3_beside_a_driver(output: Path) -> None:
    shutil.rmtree(output / "ledger")
    assert verify(output).returncode == 1
    with Lease(OutputPrefix(str(output))):
        held = verify(output, "--rebuild-ledger")
        beside = verify(output)
    assert held.returncode == 3 and "holds this run" in held.stderr and not (output / "ledger").exists()
    assert beside.returncode == 1 and "a driver is at work" in beside.stdout
    assert verify(output, "--rebuild-ledger").returncode == 0
    assert verify(output).returncode == 0


@pytest.mark.parametrize("options", [[], ["--quick"], ["--rebuild-ledger"], ["--json"]])
def test_where_no_run_is_it_is_2(tmp_path: Path, options: list[str]) -> None:
    done = verify(tmp_path / "nothing", *options)
    assert done.returncode == 2 and "holds no run" in done.stderr
    assert not (tmp_path / "nothing").exists()


def test_a_run_of_another_version_is_2(output: Path) -> None:
    run = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps({**run, "schema_version": 99}))
    done = verify(output)
    assert done.returncode == 2 and "the tokens have schema 99, this version knows 1" in done.stderr


def test_a_ledger_is_never_made_from_footers_alone(output: Path) -> None:
    done = verify(output, "--quick", "--rebuild-ledger")
    assert done.returncode == 2 and "leave out --quick" in done.stderr


def test_it_imports_neither_torch_nor_ray(output: Path) -> None:
    code = (
        "import sys; from jobs.cli import main\n"
        f"try: main(['verify', {str(output)!r}])\n"
        f"except SystemExit: print([m for m in {NEVER_IN_VERIFY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.server
def test_on_an_object_store_it_finds_the_same(output: Path, s3: str) -> None:
    for path in output.rglob("*"):
        if path.is_file():
            storage.publish(storage.join(s3, "verify", path.relative_to(output).as_posix()), path.read_bytes())
    url = f"{s3}/verify"
    for options in ((), ("--quick",)):
        done = verify(url, *options)
        assert done.returncode == 0, done.stdout + done.stderr
    storage.remove(f"{url}/tokens/{part_of(output, 's03').name}")
    assert "missing: 1" in verify(url).stdout
