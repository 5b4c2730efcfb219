"""Weak scaling: twice the actors and twice the shards should take the same time. Prints JSON.

    python tests/bench_scale.py [--actors 1,2,4,8,16] [--images-a-second 50] [--seconds 20]

A Ray of simulated nodes on this machine, each with one GPU that is not there. The encoders sleep: each actor's takes
one batch at a time, at so many images a second. All else is real: tars on a disk, decoding, Parquet, the pool, the
dispatch. The images are tiny and the encoders slow, so that the machine's own cores are not the limit: `idle_share`
says whether they were. At the end some actors are done a few shards before the others, however many there are: that is
in `of_the_gpus` and not in `of_the_gpus_without_both_ends`, the middle three fifths. Nothing is counted before all
actors of a step have their tokenizers.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jobs.actors import ActorPool
from jobs.dispatch import Dispatch
from jobs.pool_settings import PoolSettings
from jobs.ray_actors import RayActors
from jobs.slots import State
from make_data import FakeTokenizer, fake_table, image_bytes, tar_bytes
from pipeline.output import OutputPrefix, part_name
from pipeline.plan import ShardTask
from pipeline.records import ObjectInfo, ShardResult
from pipeline.shard_patterns import expand
from pipeline.tokenize_shard import TokenizeJob

BATCH = 10
IMAGES_A_SHARD = 2 * BATCH
IN_FLIGHT = 3
SIZE = 32  # pixels
NODE_STORE_BYTES = 80 << 20


class SleepingTokenizer(FakeTokenizer):
    """A GPU of so many images a second, one batch after another."""

    def __init__(self, images_a_second: float) -> None:
        self._rate, self._gpu = images_a_second, threading.Lock()

    def encode(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        with self._gpu:
            time.sleep(len(pixels_BHWC) / self._rate)
        return super().encode(pixels_BHWC)


@dataclass(frozen=True)
class SleepingSource:
    images_a_second: float

    def load(self) -> SleepingTokenizer:
        return SleepingTokenizer(self.images_a_second)


def write_shards(folder: Path, number: int) -> list[ObjectInfo]:
    """All of the same bytes, under names of their own."""
    folder.mkdir()
    images = [image_bytes(n, width=SIZE, height=SIZE) for n in range(IMAGES_A_SHARD)]
    data = tar_bytes([(f"img{n:05d}.jpg", image) for n, image in enumerate(images)])
    for n in range(number):
        (folder / f"made-{n:06d}.tar").write_bytes(data)
    return expand([str(folder)])


@contextmanager
def nodes(number: int) -> Iterator[None]:
    import ray
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 2, "object_store_memory": NODE_STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
    for _ in range(number):
        cluster.add_node(num_gpus=1, wait=False, **size)
    cluster.wait_for_nodes()
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}  # actors import this file
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR", runtime_env=environment)
    try:
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def run(pool: ActorPool, shards: list[ObjectInfo]) -> list[tuple[float, ShardResult]]:
    """Each result with the time at which it was heard."""
    tasks = [ShardTask(shard, part_name(shard.url)) for shard in shards]
    outcomes = [(time.monotonic(), one) for one in pool.run(Dispatch(tasks, attempts=1, in_flight_limit=IN_FLIGHT))]
    assert all(isinstance(one, ShardResult) and one.num_rows == IMAGES_A_SHARD for _, one in outcomes)
    return outcomes  # type: ignore[return-value]


def idle_s() -> float:
    """Of all cores of this machine together, since it started."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")


def measure(num_actors: int, rate: float, shards: list[ObjectInfo], num_measured: int, output: str) -> dict[str, Any]:
    job = TokenizeJob(OutputPrefix(output), fake_table(), BATCH, 1)
    settings = PoolSettings(num_actors, 1, 1, IN_FLIGHT, wait_s=300, shard_deadline_s=None, retry_pause_s=1)
    with ActorPool(RayActors(SleepingSource(rate), job, settings), settings) as pool:
        while sum(slot.state is State.READY for slot in pool._slots) < num_actors:
            run(pool, shards[:1])
        run(pool, shards[: 2 * num_actors])
        began, cpu, idle = time.monotonic(), time.process_time(), idle_s()
        heard = run(pool, shards[:num_measured])
        seconds, cpu_s, idle = time.monotonic() - began, time.process_time() - cpu, idle_s() - idle
    images_a_second = num_measured * IMAGES_A_SHARD / seconds
    early, late = num_measured // 5, num_measured - num_measured // 5
    between_s = heard[late - 1][0] - heard[early - 1][0]
    steady = (late - early) * IMAGES_A_SHARD / between_s / rate / num_actors
    return {
        "actors": num_actors, "shards": num_measured, "seconds": round(seconds, 2),
        "images_a_second": round(images_a_second, 1), "of_the_gpus": round(images_a_second / rate / num_actors, 3),
        "of_the_gpus_without_both_ends": round(steady, 3),
        "driver_cpu_share": round(cpu_s / seconds, 3), "driver_cpu_ms_a_shard": round(cpu_s / num_measured * 1e3, 2),
        "idle_share": round(idle / seconds / (os.cpu_count() or 1), 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--actors", default="1,2,4,8,16")
    parser.add_argument("--images-a-second", type=float, default=50.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    logging.basicConfig(level="ERROR")
    steps = [int(number) for number in options.actors.split(",")]
    shards_an_actor = round(options.seconds * options.images_a_second / IMAGES_A_SHARD)
    with tempfile.TemporaryDirectory() as folder, nodes(max(steps)):
        shards = write_shards(Path(folder) / "in", shards_an_actor * max(steps))
        found = [
            measure(number, options.images_a_second, shards, shards_an_actor * number, f"{folder}/out-{number}")
            for number in steps
        ]
    alone = found[0]["images_a_second"] / found[0]["actors"]
    for one in found:
        one["efficiency"] = round(one["images_a_second"] / one["actors"] / alone, 3)
    how = {"images_a_second_each": options.images_a_second, "cores": os.cpu_count(), "nodes": max(steps)}
    sys.stdout.write(json.dumps({**how, "steps": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
