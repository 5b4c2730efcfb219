"""What the driver alone can do: prints JSON with completions a second, CPU a shard and memory, over the run by tenths.

    python tests/bench_driver.py [--shards 50000] [--actors 4] [--in-flight 4] [--without-ray]

A whole run of `dvae tokenize` after its plan: real dispatch, pool, progress, ledger segments in a local folder, closing
and manifest. The shards are names only, and the actors answer at once. With Ray they are real actors on a Ray of this
machine; without it they live here and cost nothing, so that what is seen is our own share, and there may be hundreds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from fakes import FakeSource, HeadTokenizer
from jobs.checkpoints import read_head
from jobs.config import check
from jobs.pool_settings import PoolSettings
from jobs.ray_actors import Answer, Died, Outcome
from jobs.tokenize_actor import SignOfLife
from jobs.tokenize_config import TokenizeConfig
from jobs.tokenize_dataset import Session
from jobs.tokenize_run import TokenizeRun, held
from make_data import write_checkpoint
from pipeline.output import part_name
from pipeline.plan import Plan, ShardTask
from pipeline.records import ObjectInfo, ShardResult, ShardState
from pipeline.tokenize_shard import TokenizeWorker

SHARD_BYTES = 268_435_456
TENTHS = 10


def done(task: ShardTask) -> ShardResult:
    """As of a shard of 10,000 images."""
    shard = task.shard
    sha256 = f"{hash(shard.url) & 0xFFFFFFFF:064x}"
    return ShardResult(
        shard.url, shard.size_bytes, shard.etag, ShardState.DONE, task.part, 10_000, 3, 20_971_520, sha256, 12.5
    )


@dataclass(frozen=True)
class NoOpSource(FakeSource):
    """In the actor that loads it, a shard is done at once."""

    def load(self) -> HeadTokenizer:
        TokenizeWorker.tokenize = lambda worker, task: done(task)  # type: ignore[method-assign]
        return super().load()


class InstantActors:
    """In place of RayActors: a call is answered as soon as it is asked for, `per_wait` of them at a time, in turn."""

    def __init__(self, per_wait: int) -> None:
        self._ready: deque[tuple[str, Outcome]] = deque()
        self._watches: list[tuple[str, Outcome]] = []  # answered when it is all over
        self._per_wait, self._numbers = per_wait, iter(range(1 << 62))

    def start(self) -> str:
        return f"process-{next(self._numbers)}"

    def _answer(self, value: Any) -> tuple[str, Answer]:
        call = (f"call-{next(self._numbers)}", Answer(value))
        self._ready.append(call)
        return call

    def load(self, actor: str) -> Any:
        return self._answer(SignOfLife("node", True, 0))

    ping = load

    def watch(self, actor: str) -> Any:
        self._watches.append((f"watch-{next(self._numbers)}", Died("the end")))
        return self._watches[-1]

    def tokenize(self, actor: str, task: ShardTask, delay_s: float) -> Any:
        return self._answer(done(task))

    def kill(self, actor: str) -> None:
        self._ready.extend(self._watches)
        self._watches = []

    def wait(self, calls: Collection[Any], timeout_s: float) -> list[Any]:
        return [self._ready.popleft() for _ in range(min(self._per_wait, len(self._ready)))]

    def outcome(self, call: tuple[str, Outcome]) -> Outcome:
        return call[1]

    def draining_nodes(self) -> Collection[str]:
        return ()

    def fitting(self) -> int:
        return 0

    def shards_in_flight(self, num_actors: int) -> int | None:
        return None

    def resources(self) -> str:
        return "nothing"


class Meter:
    """Seconds (of the clock, of the processor) and memory in use at each tenth of the run."""

    def __init__(self, num_shards: int) -> None:
        self._every, self._count, self.marks = max(1, num_shards // TENTHS), 0, [self._mark()]
        self._longest_gap_s, self._last = 0.0, time.perf_counter()

    def _mark(self) -> dict[str, Any]:
        return {"at": time.perf_counter(), "cpu": time.process_time(), "rss_mb": round(rss_bytes() / 1e6, 1)}

    def note(self) -> None:
        """A shard was recorded."""
        now = time.perf_counter()
        if self._count:
            self._longest_gap_s = max(self._longest_gap_s, now - self._last)
        else:  # from the first on: what goes before is the actors' start
            self.marks = [self._mark()]
        self._last, self._count = now, self._count + 1
        if self._count % self._every == 0:
            self.marks.append(self._mark())

    def report(self) -> dict[str, Any]:
        first, last = self.marks[0], self.marks[-1]
        steps = list(zip(self.marks, self.marks[1:], strict=False))
        num = self._every * len(steps)
        return {
            "shards_a_second": round(num / (last["at"] - first["at"])),
            "slowest_tenth": min(round(self._every / (b["at"] - a["at"])) for a, b in steps),
            "by_tenth": [round(self._every / (b["at"] - a["at"])) for a, b in steps],
            "driver_cpu_us_a_shard": round((last["cpu"] - first["cpu"]) / num * 1e6),
            "driver_cpu_us_by_tenth": [round((b["cpu"] - a["cpu"]) / self._every * 1e6) for a, b in steps],
            "rss_mb": [mark["rss_mb"] for mark in self.marks],
            "rss_bytes_a_shard": round((last["rss_mb"] - steps[0][1]["rss_mb"]) * 1e6 / max(1, num - self._every)),
            "longest_gap_ms": round(self._longest_gap_s * 1e3),
        }


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def plan_of(num_shards: int) -> Plan:
    urls = (f"s3://bucket/images/images-{number:07d}.tar" for number in range(num_shards))
    shards = (ObjectInfo(url, SHARD_BYTES, f"{hash(url) & 0xFFFFFFFFFFFF:032x}-12") for url in urls)
    return Plan(tuple(ShardTask(shard, part_name(shard.url)) for shard in shards), (), ())


def measure(run: TokenizeRun, num_shards: int) -> dict[str, Any]:
    plan, meter = plan_of(num_shards), Meter(num_shards)
    record: Callable[..., ShardResult] = Session._record

    def noted(session: Session, outcome: Any) -> ShardResult:
        row = record(session, outcome)
        meter.note()
        return row

    with held(run) as ledger, mock.patch.object(Session, "_record", noted):
        started = time.perf_counter()
        code = Session(run, ledger, plan).run(NoOpSource(read_head(run.config.checkpoint)), "again")
        seconds = time.perf_counter() - started
    assert code == 0, "the run did not end well"
    segments = len(list((Path(run.config.output) / "ledger").iterdir()))
    return {"shards": num_shards, **meter.report(), "ledger_segments": segments, "whole_run_s": round(seconds, 1)}


@contextlib.contextmanager
def without_ray(num_actors: int, in_flight: int, per_wait: int) -> Any:
    settings = PoolSettings(num_actors, 0, 1, in_flight, wait_s=300, shard_deadline_s=None, retry_pause_s=1)
    with (
        mock.patch("jobs.cluster.connected", lambda *_: contextlib.nullcontext()),
        mock.patch("jobs.pool_settings.pool_settings", lambda *_: replace(settings)),
        mock.patch("jobs.ray_actors.RayActors", lambda *_: InstantActors(per_wait)),
    ):
        yield


@contextlib.contextmanager
def with_ray(num_actors: int) -> Any:
    import ray

    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}  # actors import this file
    ray.init(
        address="local", num_cpus=num_actors, object_store_memory=150 << 20, include_dashboard=False,
        log_to_driver=False, logging_level="ERROR", runtime_env=environment,
    )  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=50_000)
    parser.add_argument("--actors", type=int, default=4)
    parser.add_argument("--in-flight", type=int, default=4)
    parser.add_argument("--without-ray", action="store_true")
    parser.add_argument("--per-wait", type=int, default=1, help="without Ray: how many answers come at once")
    options = parser.parse_args()
    logging.basicConfig(level="INFO", filename=os.devnull)  # a line a shard is made, as in a job's log
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "checkpoint": str(write_checkpoint(Path(folder) / "checkpoint")), "shards": "x", "output": f"{folder}/out",
            "ray": {"num_actors": options.actors, "shards_in_flight": options.in_flight, "decode_threads": 1},
        }  # fmt: skip
        run = TokenizeRun.of(check(TokenizeConfig, values, "bench"))
        ray_or_not = (
            without_ray(options.actors, options.in_flight, options.per_wait)
            if options.without_ray
            else with_ray(options.actors)
        )
        with ray_or_not, contextlib.redirect_stdout(sys.stderr):
            figures = measure(run, options.shards)
    how = {"actors": options.actors, "in_flight": options.in_flight, "ray": not options.without_ray}
    sys.stdout.write(json.dumps({**how, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
