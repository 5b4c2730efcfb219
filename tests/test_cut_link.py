"""The link between two nodes is cut in the middle of a run, in (virtual) networks: for good, and for half a minute."""

from __future__ import annotations

import json
import os
import shutil
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

NUM_SHARDS, IMAGES = 12, 6
TESTS = Path(__file__).parent


def why_not() -> str:
    """Why no networks can be made here; "" where they can."""
    if not sys.platform.startswith("linux") or shutil.which("ip") is None:
        return "needs Linux and iproute2"
    name = f"dvae-try-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "needs root, to make network namespaces"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return ""


pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs, and in calm/ the parts of a run without Ray."""
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cut")
    checkpoint = write_checkpoint(folder / "checkpoint")
    write_shards(folder / "shards", [IMAGES] * NUM_SHARDS)
    values = {"checkpoint": str(checkpoint), "shards": "x", "output": str(folder / "calm"), "batch_size": 4}
    job = TokenizeRun.of(check(TokenizeConfig, values, "test")).job(2)
    worker = TokenizeWorker(FakeSource(read_head(str(checkpoint))).load(), job)
    for shard in expand([str(folder / "shards")]):
        worker.tokenize(ShardTask(shard, part_name(shard.url)))
    worker.close()
    return folder


def run(folder: Path, cut_s: float, name: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    ended = subprocess.run(
        [sys.executable, str(TESTS / "cut_link_go.py"), str(folder), str(cut_s), name],
        env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    report = next((line for line in ended.stdout.splitlines() if line.startswith("{")), None)
    assert report is not None, ended.stdout + ended.stderr
    return dict(json.loads(report))


@pytest.mark.parametrize(("cut_s", "name"), [(0, "for good"), (30, "for a while")])
def test_a_node_behind_a_cut_link_takes_no_shard_along_even_with_a_single_attempt(
    folder: Path, cut_s: float, name: str
) -> None:
    report = run(folder, cut_s, name)
    assert report["code"] == 0, "\n".join(report["said"])
    rows = Ledger(OutputPrefix(str(folder / name))).read().values()
    assert len(rows) == NUM_SHARDS and {row.attempts for row in rows} == {1}
    assert folder_bytes(folder / name / "tokens") == folder_bytes(folder / "calm" / "tokens")
    noticed = any("is replaced" in line or "cannot be reached" in line for line in report["said"])
    assert cut_s or noticed  # half a minute may pass and nobody notice
