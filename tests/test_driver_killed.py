"""The driver killed with SIGKILL at any moment, then the same command again: the same bytes, nothing done twice. And
drivers that are told to stop, at work and while they wait."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
    write_checkpoint(folder / "checkpoint", size=128, width=128)
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
    assert 3 <= len(finished) < NUM_SHARDS
    assert not (output / "manifest.json").exists()

    assert run_tokenize(load_config(TokenizeConfig, str(config)), "dvae") == 0
    assert folder_bytes(output / "tokens") == folder_bytes(config.parent / "calm" / "tokens")
    again = {path.name: path.stat().st_mtime_ns for path in (output / "tokens").glob("*.parquet")}
    assert finished.items() <= again.items(), "a finished part was written again"
    assert not list(output.rglob(".*.tmp"))


@pytest.mark.parametrize("stop", ["SIGTERM, as a cluster's preemption sends it", "Ctrl-C in a terminal"])
def test_a_driver_that_is_told_to_stop_does_so_in_seconds_and_says_how_to_go_on(config: Path, stop: str) -> None:
    output = config.parent / stop[:6]
    with driver_at_work(config, output, at_least=1) as driver:
        if "Ctrl-C" in stop:
            os.killpg(driver.pid, signal.SIGINT)  # a terminal tells all the group
        else:
            driver.terminate()
        said = stopped_within(driver, seconds=45)
    assert "go on with" in said and f"output={output}" in said
    assert not (output / "lease.json").exists() and not list(output.rglob(".*.tmp"))


@pytest.mark.parametrize("after_s", [0.2, 2.0])
def test_a_driver_that_is_told_to_stop_while_ray_starts_stops_too(config: Path, after_s: float) -> None:
    output = config.parent / f"starting-{after_s}"
    with driver(config, output) as process:
        wait_for(process, lambda: (output / "plan.json").exists())
        time.sleep(after_s)
        process.terminate()
        said = stopped_within(process, seconds=45)
    assert f"output={output}" in said
    assert not (output / "lease.json").exists() and not list(output.rglob(".*.tmp"))


def test_a_driver_that_is_told_to_stop_while_it_waits_for_a_store_stops_too(config: Path, tmp_path: Path) -> None:
    """The store takes the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as store:
        endpoint = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{store.getsockname()[1]}", "AWS_REGION": "us-east-1"}
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        with driver(config, tmp_path / "out", "shards=s3://bucket/", **endpoint, **keys) as process:
            store.settimeout(60)
            connection, _ = store.accept()
            process.terminate()
            said = stopped_within(process, seconds=45)
            connection.close()
    assert "to go on" in said and "shards=s3://bucket/" in said
    assert not (tmp_path / "out" / "lease.json").exists()


def stopped_within(process: subprocess.Popen[bytes], seconds: float) -> str:
    """What it said, when it ended in time and with the code for that."""
    asked = time.monotonic()
    said = process.communicate(timeout=60)[0].decode()
    assert time.monotonic() - asked < seconds, said
    assert process.returncode == 130, said
    return said


def kill_driver_when_parts_exist(config: Path, output: Path, *, at_least: int) -> None:
    """The driver has a Ray of its own, which dies with it."""
    with driver_at_work(config, output, at_least=at_least) as driver:
        os.kill(driver.pid, signal.SIGKILL)


@contextmanager
def driver(config: Path, output: Path, *overrides: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A `dvae tokenize`; gone, whatever happens, when the block ends."""
    command = [sys.executable, "-m", "jobs.cli", "tokenize", str(config), f"output={output}", *overrides]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def driver_at_work(config: Path, output: Path, *, at_least: int) -> Iterator[subprocess.Popen[bytes]]:
    """One that has published so many parts."""
    with driver(config, output) as process:
        wait_for(process, lambda: len(list((output / "tokens").glob("*.parquet"))) >= at_least)
        yield process


def wait_for(process: subprocess.Popen[bytes], happened: Callable[[], bool], timeout_s: float = 120) -> None:
    until = time.monotonic() + timeout_s
    while not happened():
        if process.poll() is not None:
            raise AssertionError(f"ended too early: {process.communicate()[0].decode()}")
        if time.monotonic() > until:
            raise TimeoutError("it never happened")
        time.sleep(0.005)
