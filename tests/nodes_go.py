"""A run on a Ray of several nodes, one of which goes in the middle, or comes. A program of its own, for a Ray that the
tests of the same process know nothing of: `python nodes_go.py FOLDER drain|kill|freeze|join`, with checkpoint/ and
shards/ in FOLDER. Prints one line of JSON.

drain: Ray is told that the node will be preempted. kill: its raylet dies. freeze: its raylet is stopped, so that Ray
takes the node for dead while the actor there goes on. join: there is one node at first, and later another.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from fakes import RecordingSource
from jobs import actors
from jobs.checkpoints import read_head
from jobs.config import check
from jobs.tokenize_config import TokenizeConfig
from jobs.tokenize_dataset import run_tokenize

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
# A batch takes so long that there is work left when Ray notices that a node is dead (after about 16 s).
SECONDS = {"drain": 0.5, "kill": 3.0, "freeze": 8.0, "join": 1.0}


def drain(node: Any) -> None:
    preempted = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    client, deadline_ms = ray._private.worker.global_worker.gcs_client, int((time.time() + 60) * 1000)
    accepted, why_not = client.drain_node(node.node_id, preempted, "spot", deadline_ms)
    assert accepted, why_not


def kill(node: Any) -> None:
    os.kill(raylet(node), signal.SIGKILL)


def freeze(node: Any) -> None:
    os.kill(raylet(node), signal.SIGSTOP)


def raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def run(config: TokenizeConfig, source: RecordingSource, ended: dict[str, float]) -> None:
    started = time.time()
    ended["code"] = run_tokenize(config, "dvae", source)
    ended["seconds"] = time.time() - started


def pids(log: Path) -> set[str]:
    return {line.split()[1] for line in log.read_text().splitlines()}


def main(folder: Path, what: str) -> None:
    logging.basicConfig(format="%(created)f %(message)s")
    actors.GROW_EVERY_S = 1.0
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    node, env = (
        None if what == "join" else cluster.add_node(**NODE),
        {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}},
    )
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR", runtime_env=env)
    output, log = folder / what, folder / f"{what}.log"
    values = {
        "checkpoint": str(folder / "checkpoint"), "shards": str(folder / "shards"), "output": str(output),
        "batch_size": 4, "attempts": 1, "ray": {"num_actors": None if what == "join" else 2, "shards_in_flight": 1},
    }  # fmt: skip
    source = RecordingSource(read_head(str(folder / "checkpoint")), seconds=SECONDS[what], log=str(log))
    ended: dict[str, float] = {}
    runner = threading.Thread(target=run, args=(check(TokenizeConfig, values, "test"), source, ended), daemon=True)
    runner.start()
    while len(list((output / "tokens").glob("*.parquet"))) < 3 or len(pids(log)) < (1 if what == "join" else 2):
        time.sleep(0.05)
    {"drain": drain, "kill": kill, "freeze": freeze, "join": lambda node: None}[what](node)
    told = time.time()
    cluster.add_node(**NODE)
    runner.join()
    opened = [(float(when), pid, int(num_open)) for when, pid, num_open in map(str.split, log.read_text().splitlines())]
    print(json.dumps({**ended, "told": told, "log": opened}), flush=True)  # noqa: T201
    if what == "freeze":
        kill(node)  # it would not let the cluster go
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
