"""A model's node fed by nodes that only decode: they come and go in mid-run, and the parts are the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from decode_nodes_go import BATCH, GPU_S, IMAGE_S, TASKS_A_NODE
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
NUM_SHARDS, IMAGES = 20, 40
MANY = 60  # shards, for a rate: the processes that decode take seconds to start


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inputs(tmp_path_factory.mktemp("decode"), NUM_SHARDS)


def inputs(folder: Path, num_shards: int) -> Path:
    """And in calm/ the parts of a run without Ray."""
    checkpoint = write_checkpoint(folder / "checkpoint")
    write_shards(folder / "shards", [IMAGES] * num_shards)
    values = {"checkpoint": str(checkpoint), "shards": "x", "output": str(folder / "calm"), "batch_size": BATCH}
    worker = TokenizeWorker(
        FakeSource(read_head(str(checkpoint))).load(), TokenizeRun.of(check(TokenizeConfig, values, "test")).job(1)
    )
    for shard in expand([str(folder / "shards")]):
        worker.tokenize(ShardTask(shard, part_name(shard.url)))
    worker.close()
    return folder


def run(folder: Path, what: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    ended = subprocess.run(
        [sys.executable, str(TESTS / "decode_nodes_go.py"), str(folder), what],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    report = next((line for line in ended.stdout.splitlines() if line.startswith("{")), None)
    assert report is not None, ended.stdout + ended.stderr
    return {**json.loads(report), "said": ended.stderr}


def assert_whole(output: Path, num_shards: int = NUM_SHARDS) -> None:
    """Every shard at the first attempt, and the very bytes of a run without Ray."""
    rows = Ledger(OutputPrefix(str(output))).read().values()
    assert len(rows) == num_shards and {row.attempts for row in rows} == {1}
    assert folder_bytes(output / "tokens") == folder_bytes(output.parent / "calm" / "tokens")


@pytest.mark.slow
def test_a_decode_node_that_joins_in_mid_run_is_used_and_one_that_dies_is_survived(folder: Path) -> None:
    report = run(folder, "change")
    assert report["code"] == 0, report["said"]
    assert_whole(folder / "change")
    assert "the cluster that decodes has changed: 4 shards in flight for each actor" in report["said"]
    assert report["before"][report["comes"]] >= 30, "it was not used"
    stays = next(node for node in report["nodes"] if node != report["comes"])
    assert report["after"][stays] > 0
    decoded = sum(report["nodes"].values())
    assert NUM_SHARDS * IMAGES <= decoded <= NUM_SHARDS * IMAGES + 2 * IMAGES * TASKS_A_NODE, "more than was lost"


@pytest.mark.slow
def test_two_decode_nodes_feed_the_model_almost_twice_as_fast_as_one(tmp_path: Path) -> None:
    folder = inputs(tmp_path, MANY)
    report = run(folder, "rates")
    one, two = report["1"], report["2"]
    assert (one["code"], two["code"]) == (0, 0), report["said"]
    for name in ("rates-1", "rates-2"):
        assert_whole(folder / name, MANY)
    assert len(one["nodes"]) == 1 and len(two["nodes"]) == 2
    assert two["images_a_second"] <= 2 * TASKS_A_NODE / IMAGE_S < 1 / GPU_S, "the nodes were to set the pace"
    assert two["images_a_second"] > 1.5 * one["images_a_second"]


@pytest.mark.slow
def test_a_decode_node_that_is_told_to_go_gets_no_more_and_nothing_is_decoded_twice(folder: Path) -> None:
    report = run(folder, "drain")
    assert report["code"] == 0, report["said"]
    assert_whole(folder / "drain")
    assert sum(report["nodes"].values()) == NUM_SHARDS * IMAGES
    assert report["worked_on_s"] < 2 * IMAGES * IMAGE_S + 2, "it got another shard"
    assert "the cluster that decodes has changed" not in report["said"], "as much as before is asked for"
