"""The driver killed with SIGKILL at any moment, then the same command again: the same bytes, nothing done twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from jobs.config import load_config
from jobs.tokenize_config import TokenizeConfig
from jobs.tokenize_dataset import run_tokenize
from make_data import folder_bytes, write_checkpoint, write_shards

pytestmark = pytest.mark.ray
NUM_SHARDS, IMAGES = 12, 30


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

    kill_driver_when_parts_exist(config, output, at_least=3)
    finished = {path.name: path.stat().st_mtime_ns for path in (output / "tokens").glob("*.parquet")}
    assert 3 <= len(finished) <= 9
    assert not (output / "manifest.json").exists()

    assert run_tokenize(load_config(TokenizeConfig, str(config)), "dvae") == 0
    assert folder_bytes(output / "tokens") == folder_bytes(config.parent / "calm" / "tokens")
    again = {path.name: path.stat().st_mtime_ns for path in (output / "tokens").glob("*.parquet")}
    assert finished.items() <= again.items(), "a finished part was written again"
    assert not list(output.rglob(".*.tmp"))


def test_sigterm_stops_in_seconds_and_says_how_to_go_on(config: Path) -> None:
    """As a cluster's preemption does."""
    output = config.parent / "terminated"
    with driver_at_work(config, output, at_least=1) as driver:
        asked = time.monotonic()
        driver.terminate()
        said, _ = driver.communicate(timeout=60)
    assert time.monotonic() - asked < 15
    assert driver.returncode == 130
    assert "go on with" in said.decode() and f"output={output}" in said.decode()
    assert not (output / "lease.json").exists() and not list(output.rglob(".*.tmp"))


def kill_driver_when_parts_exist(config: Path, output: Path, *, at_least: int) -> None:
    """The driver has a Ray of its own, which dies with it."""
    with driver_at_work(config, output, at_least=at_least) as driver:
        os.kill(driver.pid, signal.SIGKILL)


@contextmanager
def driver_at_work(config: Path, output: Path, *, at_least: int) -> Iterator[subprocess.Popen[bytes]]:
    """A `dvae tokenize` that has published so many parts; gone, whatever happens, when the block ends."""
    command = [sys.executable, "-m", "jobs.cli", "tokenize", str(config), f"output={output}"]
    driver = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait_for_parts(driver, output / "tokens", at_least)
        yield driver
    finally:
        driver.kill()
        driver.communicate()


def wait_for_parts(driver: subprocess.Popen[bytes], folder: Path, at_least: int, timeout_s: float = 120) -> None:
    for _ in range(int(timeout_s / 0.005)):
        if folder.is_dir() and len(list(folder.glob("*.parquet"))) >= at_least:
            return
        if driver.poll() is not None:
            raise AssertionError(f"ended too early: {driver.communicate()[0].decode()}")
        time.sleep(0.005)
    raise TimeoutError(f"never {at_least} parts")
