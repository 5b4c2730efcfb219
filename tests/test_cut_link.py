"""The link between two nodes is cut in the middle of a run, in (virtual) networks: for good, and for half a minute."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from go_programs import assert_calm, go, write_inputs

NUM_SHARDS, IMAGES = 12, 6


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
    return write_inputs(tmp_path_factory.mktemp("cut"), NUM_SHARDS, IMAGES, batch_size=4)


@pytest.mark.parametrize(("cut_s", "name"), [(0, "for good"), (30, "for a while")])
def test_a_node_behind_a_cut_link_takes_no_shard_along_even_with_a_single_attempt(
    folder: Path, cut_s: float, name: str
) -> None:
    report = go("cut_link_go.py", folder, str(cut_s), name)
    assert report["code"] == 0, "\n".join(report["said"])
    assert_calm(folder / name, NUM_SHARDS)
    noticed = any("is replaced" in line or "cannot be reached" in line for line in report["said"])
    assert cut_s or noticed  # half a minute may pass and nobody notice
