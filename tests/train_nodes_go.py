"""Training by one or two workers on a Ray of two nodes, of which one goes and another comes. A program of its own, for
a Ray that the tests of the same process know nothing of: `python train_nodes_go.py FOLDER`, with train/ and val/ there.
Ray is told that the second node will be preempted; once one worker goes on alone, a node joins; then training is
stopped. Prints one line of JSON: the exit code, and what the driver said, each with its time.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from jobs import train_ray
from jobs.train_dvae import run_training
from make_training import config
from nodes_go import NODE, drain

GIVE_UP_S = 150.0


class Heard(logging.Handler):
    """What the driver said: (when, words)."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[tuple[float, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((time.time(), record.getMessage()))

    def wait_for(self, words: str, count: int, patience_s: float = GIVE_UP_S) -> None:
        give_up_at = time.monotonic() + patience_s
        while sum(words in line for _, line in self.lines) < count and time.monotonic() < give_up_at:
            time.sleep(0.1)


def main(folder: Path) -> None:
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    heard, stop, ended = Heard(), threading.Event(), {}
    logging.getLogger("jobs").addHandler(heard)
    logging.getLogger("jobs").setLevel(logging.INFO)
    train_ray.stop_signals = lambda: nullcontext(stop)  # signals come to the main thread, which makes nodes
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    spot = cluster.add_node(**NODE)
    env = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR", runtime_env=env)
    settled = config(
        folder, output=str(folder / "out"), steps=1_000_000, ray={"num_workers": [1, 2], "resize_every_s": 3},
        eval={"every_steps": 0}, checkpoint={"every_steps": 100_000}, log={"every_steps": 10},
    )  # fmt: skip

    def run() -> None:
        ended["code"] = run_training(settled, "dvae train")

    training = threading.Thread(target=run, daemon=True)
    training.start()
    heard.wait_for("training with 2 workers", 1)
    time.sleep(3)
    drain(spot)
    heard.wait_for("training with 1 workers", 1)
    cluster.add_node(**NODE)
    heard.wait_for("training with 2 workers", 2)
    time.sleep(2)
    stop.set()
    training.join(60)
    print(json.dumps({**ended, "said": heard.lines}), flush=True)  # noqa: T201
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
