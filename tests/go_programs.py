"""What tests of nodes that come and go share. Each has a Ray of several nodes in a process of its own, a program
`*_go.py`; its parts are held against those of a calm run, without Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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

TESTS = Path(__file__).parent


def write_inputs(folder: Path, num_shards: int, images: int, batch_size: int) -> Path:
    """checkpoint/ and shards/, and in calm/ the parts of a calm run."""
    checkpoint = write_checkpoint(folder / "checkpoint")
    write_shards(folder / "shards", [images] * num_shards)
    values = {"checkpoint": str(checkpoint), "shards": "x", "output": str(folder / "calm"), "batch_size": batch_size}
    job = TokenizeRun.of(check(TokenizeConfig, values, "test")).job(2)
    worker = TokenizeWorker(FakeSource(read_head(str(checkpoint))).load(), job)
    for shard in expand([str(folder / "shards")]):
        worker.tokenize(ShardTask(shard, part_name(shard.url)))
    worker.close()
    return folder


def go(program: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """What it reported; as `said` what it said, where it does not report that itself."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    ended = subprocess.run(
        [sys.executable, str(TESTS / program), str(folder), *arguments],
        env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    report = next((line for line in ended.stdout.splitlines() if line.startswith("{")), None)
    assert report is not None, ended.stdout + ended.stderr
    return {"said": ended.stderr, **json.loads(report)}


def assert_calm(output: Path, num_shards: int) -> None:
    """Every shard at the first attempt, the very bytes of the calm run, and nothing else."""
    rows = Ledger(OutputPrefix(str(output))).read().values()
    assert len(rows) == num_shards and {row.attempts for row in rows} == {1}
    assert folder_bytes(output / "tokens") == folder_bytes(output.parent / "calm" / "tokens")
    assert not list(output.rglob("*.tmp"))
