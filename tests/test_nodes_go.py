"""A node of the cluster goes in the middle of a run: nothing is lost, nobody is charged, the bytes are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from go_programs import assert_calm, go, write_inputs

pytestmark = pytest.mark.ray
NUM_SHARDS, IMAGES = 12, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("nodes"), NUM_SHARDS, IMAGES, batch_size=4)


def run(folder: Path, what: str) -> dict[str, Any]:
    report = go("nodes_go.py", folder, what)
    assert report["code"] == 0, report["said"]
    assert_calm(folder / what, NUM_SHARDS)
    return report


def test_on_a_spot_machines_notice_its_actor_finishes_what_it_holds_and_gets_no_more(folder: Path) -> None:
    report = run(folder, "drain")
    assert "its node is about to go" in report["said"]
    begun = [(when, pid) for when, pid, num_open in report["log"] if num_open]
    assert len(begun) == NUM_SHARDS, "a shard was done twice"
    before = {pid for when, pid in begun if when < report["told"]}
    noticed = next(line for line in report["said"].splitlines() if "its node is about to go" in line)
    late = {pid for when, pid in begun if when > float(noticed.split()[0]) + 2}
    assert len(before) == 2 and len(before & late) == 1


@pytest.mark.slow
def test_a_node_that_joins_in_mid_run_gets_an_actor(folder: Path) -> None:
    report = run(folder, "join")
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
    assert "actor's node was terminated" in report["said"] or "cannot be reached" in report["said"]
