"""A model's node fed by nodes that only decode: they come and go in mid-run, and the parts are the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from decode_nodes_go import BATCH, GPU_S, IMAGE_S, TASKS_A_NODE
from go_programs import assert_calm, go, write_inputs

pytestmark = pytest.mark.ray
NUM_SHARDS, IMAGES = 20, 40
MANY = 60  # shards, for a rate: the processes that decode take seconds to start


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("decode"), NUM_SHARDS, IMAGES, BATCH)


def test_a_decode_node_that_joins_in_mid_run_is_used_and_one_that_dies_is_survived(folder: Path) -> None:
    report = go("decode_nodes_go.py", folder, "change")
    assert report["code"] == 0, report["said"]
    assert_calm(folder / "change", NUM_SHARDS)
    assert "the cluster that decodes has changed: 4 shards in flight for each actor" in report["said"]
    assert report["before"][report["comes"]] >= 30, "it was not used"
    stays = next(node for node in report["nodes"] if node != report["comes"])
    assert report["after"][stays] > 0
    decoded = sum(report["nodes"].values())
    assert NUM_SHARDS * IMAGES <= decoded <= NUM_SHARDS * IMAGES + 2 * IMAGES * TASKS_A_NODE, "more than was lost"


@pytest.mark.slow
def test_two_decode_nodes_feed_the_model_almost_twice_as_fast_as_one(tmp_path: Path) -> None:
    folder = write_inputs(tmp_path, MANY, IMAGES, BATCH)
    report = go("decode_nodes_go.py", folder, "rates")
    one, two = report["1"], report["2"]
    assert (one["code"], two["code"]) == (0, 0), report["said"]
    for name in ("rates-1", "rates-2"):
        assert_calm(folder / name, MANY)
    assert len(one["nodes"]) == 1 and len(two["nodes"]) == 2
    assert two["images_a_second"] <= 2 * TASKS_A_NODE / IMAGE_S < 1 / GPU_S, "the nodes were to set the pace"
    assert two["images_a_second"] > 1.5 * one["images_a_second"]


@pytest.mark.slow
def test_a_decode_node_that_is_told_to_go_gets_no_more_and_nothing_is_decoded_twice(folder: Path) -> None:
    report = go("decode_nodes_go.py", folder, "drain")
    assert report["code"] == 0, report["said"]
    assert_calm(folder / "drain", NUM_SHARDS)
    assert sum(report["nodes"].values()) == NUM_SHARDS * IMAGES
    assert report["worked_on_s"] < 2 * IMAGES * IMAGE_S + 2, "it got another shard"
    assert "the cluster that decodes has changed" not in report["said"], "as much as before is asked for"
