"""The Ray head that tests and the demo start, beside another of the same machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.local_servers import RayHead

WHERE = "import ray; ray.init(); print('the cluster', ray.get_runtime_context().gcs_address)"


@pytest.mark.slow
@pytest.mark.ray
def test_a_ray_that_is_started_later_does_not_take_the_jobs_of_the_first(tmp_path: Path) -> None:
    """Ray tells a job where its cluster is by a file, and the newest Ray of a folder writes it."""
    first, second = (RayHead(tmp_path / name, num_cpus=1) for name in ("first", "second"))
    try:
        first.start()
        second.start()
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | first.environment
        ray = str(Path(sys.executable).with_name("ray"))
        command = [ray, "job", "submit", "--", sys.executable, "-c", WHERE]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    finally:
        second.stop()
        first.stop()
    port = first.address.rpartition(":")[2]  # a job reaches it by the machine's own address
    assert re.search(rf"^the cluster [\d.]+:{port}$", done.stdout, re.MULTILINE), done.stdout + done.stderr
