"""A model's node that is fed by nodes which only decode, on a Ray of this machine. A program of its own, for a Ray that
the tests of the same process know nothing of: `python decode_nodes_go.py FOLDER rates|change|drain`, with checkpoint/
and shards/ in FOLDER. Prints one line of JSON.

rates: two runs, with one node that decodes and with two. change: one, later another, for whose work the first waits and
which is then killed. drain: two, of which one is told that it will go. Simulated: the GPU, which takes 1 ms an image,
and what decoding costs: IMAGE_S asleep for each (slow_decode.py), two images at once on a node, since two real cores
could not show the gain of two nodes. All else is real.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from fakes import FakeSource
from jobs import actors
from jobs.checkpoints import read_head
from jobs.config import check
from jobs.tokenize_config import TokenizeConfig
from jobs.tokenize_dataset import run_tokenize
from nodes_go import drain, kill
from slow_decode import GATE_AFTER

BATCH, GPU_S = 10, 0.001
IMAGE_S = 0.02
TASKS_A_NODE = 2
STORE = {"object_store_memory": 80 << 20}
DECODES = {"num_cpus": TASKS_A_NODE, "resources": {"decoder": TASKS_A_NODE}, **STORE}


class Decoding:
    """What decodes where, as slow_decode.py wrote it down."""

    def __init__(self, log: Path) -> None:
        self._log, self._from = log, 0

    def begin(self) -> None:
        """Forget what was."""
        self._from = len(self.images())

    def images(self) -> list[tuple[float, str]]:
        """When, and on which node."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return [(float(line.split()[0]), line.split()[1]) for line in lines[self._from :]]

    def by_node(self, until: float = float("inf")) -> dict[str, int]:
        return dict(Counter(node for when, node in self.images() if when < until))

    def a_second(self) -> float:
        """In the middle three fifths."""
        times = sorted(when for when, _ in self.images())
        early, late = len(times) // 5, len(times) - 1 - len(times) // 5
        return round((late - early) / (times[late] - times[early]), 1)


class Run(threading.Thread):
    """`dvae tokenize` beside the main thread, which meanwhile changes the cluster."""

    def __init__(self, folder: Path, name: str, address: str) -> None:
        super().__init__(daemon=True)
        checkpoint = str(folder / "checkpoint")
        self.output, self.code, self.seconds = folder / name, -1, 0.0
        values = {
            "checkpoint": checkpoint, "shards": str(folder / "shards"), "output": str(self.output),
            "batch_size": BATCH, "attempts": 1,
            "ray": {"address": address, "gpus_per_actor": 1, "decode_resources": {"decoder": 1}},
        }  # fmt: skip
        self._config = check(TokenizeConfig, values, "test")
        self._source = FakeSource(read_head(checkpoint), BATCH * GPU_S)

    def run(self) -> None:
        began = time.monotonic()
        self.code = run_tokenize(self._config, "dvae", self._source)
        self.seconds = round(time.monotonic() - began, 1)

    def wait_until(self, condition: Callable[[], bool]) -> float:
        """When it came true, or the run was over."""
        while not condition() and self.is_alive():
            time.sleep(0.05)
        return time.time()


def gate(folder: Path, what: str) -> Path:
    """The first node goes on once this file is there."""
    return folder / f"{what}.gate"


def rates(cluster: Cluster, folder: Path, decoding: Decoding) -> dict[str, Any]:
    found = {}
    for number in (1, 2):
        cluster.add_node(**DECODES)
        cluster.wait_for_nodes()
        decoding.begin()
        (run := Run(folder, f"rates-{number}", cluster.address)).start()
        run.join()
        found[str(number)] = {"code": run.code, "images_a_second": decoding.a_second(), "nodes": decoding.by_node()}
    return found


def change(cluster: Cluster, folder: Path, decoding: Decoding) -> dict[str, Any]:
    cluster.add_node(**DECODES)
    cluster.wait_for_nodes()
    (run := Run(folder, "change", cluster.address)).start()
    run.wait_until(lambda: len(decoding.images()) >= GATE_AFTER)
    comes = cluster.add_node(**DECODES)
    at_work = run.wait_until(lambda: decoding.by_node().get(comes.node_id, 0) > 30)
    kill(comes)
    killed = time.time()
    gate(folder, "change").touch()
    run.join()
    after = {node: number - decoding.by_node(killed).get(node, 0) for node, number in decoding.by_node().items()}
    return {
        "code": run.code, "seconds": run.seconds, "comes": comes.node_id, "nodes": decoding.by_node(),
        "before": decoding.by_node(at_work), "after": after, "ended_after_kill_s": round(time.time() - killed, 1),
    }  # fmt: skip


def drained(cluster: Cluster, folder: Path, decoding: Decoding) -> dict[str, Any]:
    _, goes = cluster.add_node(**DECODES), cluster.add_node(**DECODES)
    cluster.wait_for_nodes()
    (run := Run(folder, "drain", cluster.address)).start()
    run.wait_until(lambda: decoding.by_node().get(goes.node_id, 0) > 30)
    drain(goes)
    told = time.time()
    run.join()
    last = max(when for when, node in decoding.images() if node == goes.node_id)
    return {"code": run.code, "seconds": run.seconds, "worked_on_s": round(last - told, 1), "nodes": decoding.by_node()}


def main(folder: Path, what: str) -> None:
    logging.basicConfig(format="%(created)f %(message)s", level=logging.INFO)
    actors.GROW_EVERY_S = 1.0
    log = folder / f"{what}.log"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **STORE})
    cluster.add_node(num_cpus=1, num_gpus=1, **STORE)
    environment = {
        "env_vars": {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "SLOW_DECODE_S": str(IMAGE_S),
            "SLOW_DECODE_LOG": str(log),
            **({"SLOW_DECODE_GATE": str(gate(folder, what))} if what == "change" else {}),
        },
        "worker_process_setup_hook": "slow_decode.install",
    }
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR", runtime_env=environment)
    report = {"rates": rates, "change": change, "drain": drained}[what](cluster, folder, Decoding(log))
    print(json.dumps(report), flush=True)  # noqa: T201
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
