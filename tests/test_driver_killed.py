"""The driver killed with SIGKILL at any moment, then the same command again: the same bytes, nothing done twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from jobs.config import load_config
from jobs.tokenize_config import TokenizeConfig
from jobs.tokenize_dataset import run_tokenize
from make_data import folder_bytes, write_checkpoint, write_shards

pytestmark = pytest.mark.ray
NUM_SHARDS, IMAGES = 12, 60


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    write_shards(folder / "shards", [IMAGES] * NUM_SHARDS)
    write_checkpoint(folder / "checkpoint", size=64, width=64)
    path = folder / "tokenize.yaml"
    path.write_text(yaml.safe_dump({
        "checkpoint": str(folder / "checkpoint"), "shards": str(folder / "shards"), "output": str(folder / "out"),
        "batch_size": 8, "ray": {"num_actors": 1, "shards_in_flight": 2},
    }))  # fmt: skip
    return path


@pytest.mark.usefixtures("ray_cluster")
def test_a_driver_killed_half_way_leaves_whole_parts_and_the_next_run_does_only_the_rest(config: Path) -> None:
    output = config.parent / "out"
    calm = load_config(TokenizeConfig, str(config), [f"output={config.parent / 'calm'}"])
    assert run_tokenize(calm, "dvae") == 0

    kill_driver_when_parts_exist(config, output / "tokens", at_least=3)
    finished = {path.name: path.stat().st_mtime_ns for path in (output / "tokens").glob("*.parquet")}
    assert 3 <= len(finished) <= 9
    assert not (output / "manifest.json").exists()

    assert run_tokenize(load_config(TokenizeConfig, str(config)), "dvae") == 0
    assert folder_bytes(output / "tokens") == folder_bytes(config.parent / "calm" / "tokens")
    again = {path.name: path.stat().st_mtime_ns for path in (output / "tokens").glob("*.parquet")}
    assert finished.items() <= again.items(), "a finished part was written again"
    assert not list(output.rglob(".*.tmp"))


def kill_driver_when_parts_exist(config: Path, folder: Path, *, at_least: int, timeout_s: float = 120) -> None:
    """The driver has a Ray of its own, which dies with it."""
    command = [sys.executable, "-m", "jobs.cli", "tokenize", str(config)]
    driver = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)
    try:
        for _ in range(int(timeout_s / 0.005)):
            if folder.is_dir() and len(list(folder.glob("*.parquet"))) >= at_least:
                return
            assert driver.poll() is None, f"ended too early: {driver.stderr.read().decode()}"  # type: ignore[union-attr]
            time.sleep(0.005)
        raise TimeoutError(f"never {at_least} parts")
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
