"""A node of the cluster goes in the middle of a run: nothing is lost, nobody is charged, the bytes are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fakes import FakeSource
from jobs.checkpoints import read_head
from jobs.config import check
from jobs.tokenize_config import TokenizeConfig
from jobs.tokenize_run import TokenizeRun
from make_data import folder_bytes, write_checkpoint, write_shards
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix, part_name
from pipeline.plan import ShardTask
from pipeline.shard_patterns import expand
from pipeline.tokenize_shard import TokenizeWorker

pytestmark = pytest.mark.ray
TESTS = Path(__file__).parent
NUM_SHARDS, IMAGES = 12, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs, and in calm/ the parts of a run without Ray."""
    folder = tmp_path_factory.mktemp("nodes")
    checkpoint = write_checkpoint(folder / "checkpoint")
    write_shards(folder / "shards", [IMAGES] * NUM_SHARDS)
    values = {"checkpoint": str(checkpoint), "shards": "x", "output": str(folder / "calm"), "batch_size": 4}
    job = TokenizeRun.of(check(TokenizeConfig, values, "test")).job(2)
    worker = TokenizeWorker(FakeSource(read_head(str(checkpoint))).load(), job)
    for shard in expand([str(folder / "shards")]):
        worker.tokenize(ShardTask(shard, part_name(shard.url)))
    worker.close()
    return folder


def run(folder: Path, what: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    ended = subprocess.run(
        [sys.executable, str(TESTS / "nodes_go.py"), str(folder), what],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    report = next((line for line in ended.stdout.splitlines() if line.startswith("{")), None)
    assert report is not None, ended.stdout + ended.stderr
    rows = Ledger(OutputPrefix(str(folder / what))).read().values()
    assert len(rows) == NUM_SHARDS and {row.attempts for row in rows} == {1}
    assert folder_bytes(folder / what / "tokens") == folder_bytes(folder / "calm" / "tokens")
    assert not list((folder / what).rglob("*.tmp"))
    return {**json.loads(report), "said": ended.stderr}


def test_on_a_spot_machines_notice_its_actor_finishes_what_it_holds_and_gets_no_more(folder: Path) -> None:
    report = run(folder, "drain")
    assert report["code"] == 0 and "its node is about to go" in report["said"]
    begun = [(when, pid) for when, pid, num_open in report["log"] if num_open]
    assert len(begun) == NUM_SHARDS, "a shard was done twice"
    before = {pid for when, pid in begun if when < report["told"]}
    noticed = next(line for line in report["said"].splitlines() if "its node is about to go" in line)
    late = {pid for when, pid in begun if when > float(noticed.split()[0]) + 2}
    assert len(before) == 2 and len(before & late) == 1


@pytest.mark.slow
def test_a_node_that_joins_in_mid_run_gets_an_actor(folder: Path) -> None:
    report = run(folder, "join")
    assert report["code"] == 0
    begun = [(when, pid) for when, pid, num_open in report["log"] if num_open]
    assert len(begun) == NUM_SHARDS, "a shard was done twice"
    assert len({pid for when, pid in begun if when < report["told"]}) == 1
    assert len({pid for _, pid in begun}) == 2


@pytest.mark.slow
@pytest.mark.parametrize("what", ["kill", "freeze"])
def test_a_node_that_dies_or_is_cut_off_takes_no_shard_along_even_with_a_single_attempt(
    folder: Path, what: str
) -> None:
    report = run(folder, what)
    assert report["code"] == 0
    assert "actor's node was terminated" in report["said"] or "cannot be reached" in report["said"]
