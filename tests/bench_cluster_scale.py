"""A driver with up to 1,000 GPU actors and 1,000,000 shards, in simulated time. Prints a table and JSON.

    python tests/bench_cluster_scale.py [--actors 10,100,1000] [--shards 10000,100000,1000000] [--calls 100,1000,5000]

Cost: the whole of `dvae tokenize` after its plan is real (dispatch, pool, progress, ledger, closing, manifest); the
actors are simulated_cluster.py's, which answer one at a time, as evenly as can be. What the simulation takes for itself
is measured and taken off. The law is the exponent b of cost ~ number^b, fitted over the steps: 0 is no growth.

Time left: what `progress` says at 1, 10 and 50 % of the shards against when it was over, as a share of what was truly
left, beside the simple way (all shards alike, the pace since the start).

Ray's calls: one real driver that waits for so many calls at once, of which 170 a second end, as shards of 10,000 images
do on 1,000 GPUs. It is Ray's share of a shard's cost where that many are in flight (2 to 4 and a watch for each actor).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from bench_driver import NoOpSource, plan_of
from jobs.actors import ActorPool
from jobs.checkpoints import read_head
from jobs.config import check
from jobs.pool_settings import PoolSettings
from jobs.progress import JobProgress
from jobs.tokenize_config import TokenizeConfig
from jobs.tokenize_dataset import Session
from jobs.tokenize_run import TokenizeRun, held
from make_data import write_checkpoint
from pipeline.plan import Plan
from simulated_cluster import BYTES_A_SECOND, SimulatedCluster

IN_FLIGHT = 4
SHARD_BYTES = 350_000_000  # of 10,000 images
MARKS = (0.01, 0.1, 0.5)


@dataclass(frozen=True)
class Scenario:
    """`size(n, of)`: of the n-th shard, in typical shards. `happens(cluster, num_actors, about_s)`: what befalls it."""

    size: Callable[[int, int], float] = lambda n, of: 1.0
    happens: Callable[[SimulatedCluster, int, float], None] = lambda cluster, num_actors, about_s: None
    share_at_first: float = 1.0  # of the actors


def uneven(n: int, of: int) -> float:
    return math.exp(random.Random(n).gauss(0.0, 0.7) - 0.7**2 / 2)


def small_first(n: int, of: int) -> float:
    """Two data sets, one after the other."""
    return uneven(n, of) * (0.4 if n < of / 2 else 1.6)


def lose_and_regain(cluster: SimulatedCluster, num_actors: int, about_s: float) -> None:
    cluster.at(0.2 * about_s, lambda: cluster.lose(3 * num_actors // 10))
    cluster.at(0.6 * about_s, lambda: cluster.add(3 * num_actors // 10))


def gain(cluster: SimulatedCluster, num_actors: int, about_s: float) -> None:
    cluster.at(0.3 * about_s, lambda: cluster.add(num_actors - num_actors // 4))


SCENARIOS = {
    "even": Scenario(),
    "uneven": Scenario(uneven),
    "small first": Scenario(small_first),
    "30 % lost for a while": Scenario(uneven, lose_and_regain),
    "a quarter at first": Scenario(uneven, gain, 0.25),
}


@dataclass
class Watcher:
    """What progress said, and when the shards were done."""

    cluster: SimulatedCluster
    num_shards: int
    each: Callable[[int], None]
    said: dict[float, tuple[float, float | None, float]] = field(default_factory=dict)  # when, by progress, simply
    num_done: int = 0
    first_cpu: tuple[float, float] = (0.0, 0.0)
    last_cpu: tuple[float, float] = (0.0, 0.0)

    def note(self, progress: JobProgress) -> None:
        self.num_done += 1
        self.each(self.num_done)
        if self.num_done == 1:
            self.first_cpu = self._cpu()
        self.last_cpu = self._cpu() if self.num_done == self.num_shards else self.last_cpu
        mark = self.num_done / self.num_shards
        if len(self.said) < len(MARKS) and mark >= MARKS[len(self.said)]:
            now = self.cluster.time
            self.said[MARKS[len(self.said)]] = (now, progress.left_s, now / mark * (1 - mark))

    def _cpu(self) -> tuple[float, float]:
        return time.process_time(), self.cluster.own_cpu_s

    def driver_cpu_s(self) -> float:
        (all_0, own_0), (all_1, own_1) = self.first_cpu, self.last_cpu
        return all_1 - all_0 - (own_1 - own_0)

    def errors(self) -> dict[str, dict[str, float | None]]:
        """Of what was said to be left, as a share of what was."""
        end = self.cluster.time
        return {
            f"{mark:.0%}": {
                "by_progress": None if left is None else round(left / (end - when) - 1, 3),
                "simply": round(simply / (end - when) - 1, 3),
            }
            for mark, (when, left, simply) in self.said.items()
        }


@contextlib.contextmanager
def simulated(cluster: SimulatedCluster, num_actors: int, watcher: Watcher) -> Iterator[None]:
    """The driver's own clock, its Ray and its actors are the simulation's."""

    class Watched(JobProgress):
        def advance(self, *arguments: Any, **options: Any) -> None:
            super().advance(*arguments, **options)
            watcher.note(self)

    settings = PoolSettings(num_actors, 1, 1, IN_FLIGHT, wait_s=300, shard_deadline_s=None, retry_pause_s=1)
    settings = replace(settings, elastic=True)
    clock = SimpleNamespace(monotonic=cluster.now)
    with (
        mock.patch("jobs.cluster.connected", lambda *_: contextlib.nullcontext()),
        mock.patch("jobs.pool_settings.pool_settings", lambda *_: settings),
        mock.patch("jobs.ray_actors.RayActors", lambda *_: cluster),
        mock.patch("jobs.actors.ActorPool", partial(ActorPool, now=cluster.now)),
        mock.patch("jobs.progress.time", clock),
        mock.patch("jobs.tokenize_dataset.time", clock),
        mock.patch("jobs.tokenize_dataset.JobProgress", Watched),
    ):
        yield


def plan_with(num_shards: int, scenario: Scenario) -> Plan:
    plan = plan_of(num_shards)
    todo = (
        replace(task, shard=replace(task.shard, size_bytes=max(1, int(SHARD_BYTES * scenario.size(n, num_shards)))))
        for n, task in enumerate(plan.todo)
    )
    return replace(plan, todo=tuple(todo))


def simulate(
    num_actors: int,
    num_shards: int,
    name: str = "uneven",
    bytes_a_second: float = BYTES_A_SECOND,
    each: Callable[[int], None] = lambda num_done: None,
) -> dict[str, Any]:
    """One run. Seconds are the simulation's, microseconds the real processor's. `bytes_a_second`: of an actor. `each`
    is called after each shard."""
    scenario = SCENARIOS[name]
    at_first = max(1, int(num_actors * scenario.share_at_first))
    cluster = SimulatedCluster(at_first, bytes_a_second=bytes_a_second)
    watcher = Watcher(cluster, num_shards, each)
    scenario.happens(cluster, num_actors, num_shards * SHARD_BYTES / bytes_a_second / num_actors)
    with tempfile.TemporaryDirectory() as folder, simulated(cluster, at_first, watcher):
        checkpoint = str(write_checkpoint(Path(folder) / "checkpoint"))
        values = {"checkpoint": checkpoint, "shards": "x", "output": f"{folder}/out"}
        run = TokenizeRun.of(check(TokenizeConfig, values, "bench"))
        with held(run) as ledger, contextlib.redirect_stdout(sys.stderr):
            code = Session(run, ledger, plan_with(num_shards, scenario)).run(NoOpSource(read_head(checkpoint)), "again")
    assert code == 0 and watcher.num_done == num_shards, "the run did not end well"
    return {
        "actors": num_actors,
        "shards": num_shards,
        "scenario": name,
        "driver_cpu_us_a_shard": round(watcher.driver_cpu_s() / num_shards * 1e6, 1),
        "simulated_s": round(cluster.time),
        "driver_cpu_share": round(watcher.driver_cpu_s() / cluster.time, 4),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
        "time_left_errors": watcher.errors(),
    }


def law(points: Sequence[tuple[float, float]]) -> float:
    """The exponent b of y ~ x^b, by least squares of the logarithms."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(each) / len(logs) for each in zip(*logs, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread if spread else 0.0


def laws(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """By the number of actors at the most shards, and by the number of shards at the most actors."""
    most = {by: max(run[by] for run in runs) for by in ("actors", "shards")}
    other = {"actors": "shards", "shards": "actors"}
    return {
        f"cost_by_{by}": round(
            law([(run[by], run["driver_cpu_us_a_shard"]) for run in runs if run[other[by]] == most[other[by]]]), 3
        )
        for by in most
    }


def ray_calls(num_open: int, num_a_second: int = 170, seconds: float = 5.0) -> dict[str, Any]:
    """What Ray's own calls cost a driver that waits for `num_open` at once, of which up to so many a second end and are
    made anew. Needs a Ray that is connected."""
    import asyncio

    import ray

    from jobs.ray_actors import RayActors

    class Napper:
        async def nap(self, seconds: float) -> None:
            await asyncio.sleep(seconds)

    napper = ray.remote(num_cpus=0, max_concurrency=10_000)(Napper).remote()
    ray.get(napper.nap.remote(0.0))
    num_ending = min(num_a_second, num_open)
    calls = dict.fromkeys(napper.nap.remote(3600.0) for _ in range(num_open - num_ending))
    calls |= dict.fromkeys(napper.nap.remote(n / num_ending) for n in range(num_ending))
    heard, rounds, began, cpu = 0, 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        for ref in RayActors.wait(None, calls.keys(), 10.0):  # type: ignore[arg-type]
            ray.get(ref)
            del calls[ref]
            calls[napper.nap.remote(1.0)] = None
            heard += 1
        rounds += 1
    took_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    ray.kill(napper)
    return {
        "open_calls": num_open,
        "ended_a_second": round(heard / took_s),
        "rounds_a_second": round(rounds / took_s),
        "driver_cpu_us_a_call": round(cpu_s / heard * 1e6),
        "of_a_core": round(cpu_s / took_s, 3),
    }


def in_a_process_of_its_own(*arguments: Any) -> dict[str, Any]:
    """So that each peak of memory is its own."""
    command = [sys.executable, __file__, "--one", json.dumps(arguments)]
    return dict(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))


def measured_with_ray(numbers: Sequence[int]) -> list[dict[str, Any]]:
    import ray

    if not numbers:
        return []
    ray.init(address="local", num_cpus=2, object_store_memory=150 << 20, include_dashboard=False,
             log_to_driver=False, logging_level="ERROR")  # fmt: skip
    try:
        return [ray_calls(number) for number in numbers]
    finally:
        ray.shutdown()


def table(runs: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'actors':>7} {'shards':>9} {'µs a shard':>11} {'of a core':>10} {'peak MB':>8}  time left: error at " +
             ", ".join(f"{mark:.0%}" for mark in MARKS) + "  (simply)"]  # fmt: skip
    for run in runs:
        errors = run["time_left_errors"].values()
        told, simply = (
            ", ".join("-" if one[by] is None else f"{one[by]:+.1%}" for one in errors)
            for by in ("by_progress", "simply")
        )
        cost = f"{run['driver_cpu_us_a_shard']:>11} {run['driver_cpu_share']:>10.2%} {run['peak_mb']:>8,}"
        lines.append(f"{run['actors']:>7,} {run['shards']:>9,} {cost}  {run['scenario']}: {told}  ({simply})")
    return "\n".join(lines) + "\n"


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--actors", type=numbers, default=[10, 100, 1000])
    parser.add_argument("--shards", type=numbers, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--calls", type=numbers, default=[100, 1000, 5000])
    parser.add_argument("--scenario-shards", type=int, default=200_000)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.basicConfig(level="INFO", filename=os.devnull)  # a line a shard is made, as in a job's log
    if options.one:
        sys.stdout.write(json.dumps(simulate(*options.one)))
        return
    runs = []
    for arguments in [(actors, shards) for shards in options.shards for actors in options.actors]:
        runs.append(in_a_process_of_its_own(*arguments))
        sys.stderr.write(table(runs[-1:]))
    fitted = laws(runs)
    for name in SCENARIOS:
        runs.append(in_a_process_of_its_own(max(options.actors), options.scenario_shards, name))
        sys.stderr.write(table(runs[-1:]))
    report = {"laws": fitted, "runs": runs, "ray": measured_with_ray(options.calls), "cores": os.cpu_count()}
    sys.stderr.write(table(runs))
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
