"""The cluster's head is killed or frozen in the middle of a run: the driver ends in order, and goes on with the next
cluster."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from jobs.local_servers import RayHead
from jobs.verify import run_verify
from jobs.waiting import RAY_ENDS_AFTER_S
from make_data import write_checkpoint, write_shards

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def driver(config: Path, head: RayHead) -> subprocess.Popen[str]:
    environment = {**os.environ, **head.environment, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "jobs.cli", "tokenize", str(config)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def freeze(head: RayHead) -> None:
    """As a link that is cut does: nobody answers, and nobody refuses."""
    port = head.address.rpartition(":")[2]
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            program, *arguments = (folder / "cmdline").read_bytes().decode().split("\0")
        except OSError:  # it has just ended
            continue
        if program.endswith("/gcs_server") and f"--gcs_server_port={port}" in arguments:
            os.kill(int(folder.name), signal.SIGSTOP)
            return
    raise AssertionError("no such head")


# Actors of a frozen head work on, and must not be through before the driver has lost its patience.
@pytest.mark.parametrize(("stop", "num_shards"), [(RayHead.kill, 40), (freeze, 200)])
def test_the_driver_says_so_before_ray_ends_it_and_the_same_command_finishes_on_the_next_cluster(
    tmp_path: Path, stop: Callable[[RayHead], None], num_shards: int
) -> None:
    head, output, config = RayHead(tmp_path / "ray", num_cpus=2), tmp_path / "out", tmp_path / "tokenize.yaml"
    write_shards(tmp_path / "shards", [30] * num_shards)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", size=128, width=128)
    config.write_text(yaml.safe_dump({
        "checkpoint": str(checkpoint), "shards": str(tmp_path / "shards"), "output": str(output), "batch_size": 8,
        "ray": {"address": head.address, "num_actors": 1},
    }))  # fmt: skip
    head.start()
    try:
        first = driver(config, head)
        while first.poll() is None and len(list((output / "tokens").glob("*.parquet"))) < 3:
            time.sleep(0.05)
        stop(head)
        stopped = time.monotonic()
        said, _ = first.communicate(timeout=120)
        assert first.returncode == 1, said
        assert time.monotonic() - stopped < RAY_ENDS_AFTER_S
        assert "head has not answered for" in said and f"dvae tokenize {config}" in said
        assert not (output / "lease.json").exists() and not list(output.rglob("*.tmp"))
        done = len(list((output / "tokens").glob("*.parquet")))
        heard = re.search(r"(\d+) shards are done, (\d+) are left", said)
        assert heard and int(heard[1]) <= done and int(heard[1]) + int(heard[2]) == num_shards  # it may not hear of all

        head.kill()
        head.start()
        again = driver(config, head)
        said, _ = again.communicate(timeout=120)
        assert again.returncode == 0 and f": {done} done" in said and f", {num_shards - done} new" in said, said
    finally:
        head.stop()
    assert run_verify(str(output), as_json=True) == 0
