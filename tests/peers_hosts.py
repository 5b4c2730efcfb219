"""The processes in which peers run: one for each that needs no Ray; two with a warm
cluster, for Ray Data and for us. Each run is
watched from outside, with all the processes below its own."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from peers_usage import Meter
from peers_workloads import CORES, Ran, Work

RAY, RAY_DATA = "ray", "ray data"  # a cluster each: what passed through a store stays in its memory
OBJECT_STORE_BYTES = 2 << 30  # Ray Data's blocks pass through it
RUN_LIMIT_S = 300.0
TESTS = Path(__file__).parent


class PeerFailed(Exception):
    """It raised, did not end, or did not write every row."""


@dataclass(frozen=True)
class Measured:
    """One run. `head_s`: before the clock started (loading, planning, the start of processes)."""

    num_images: int
    seconds: float
    head_s: float
    cpu_s: float
    daemon_cpu_s: float
    peak_bytes: int
    stages: dict[str, float] | None = None

    @property
    def images_per_s(self) -> float:
        return self.num_images / self.seconds

    @property
    def cpu_ms_per_image(self) -> float:
        return 1000 * self.cpu_s / self.num_images


@dataclass
class Hosts:
    """Started when first needed, ended with the `with` block."""

    _running: dict[str, tuple[Any, Connection]] = field(default_factory=dict)

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        for _process, connection in self._running.values():
            connection.send(None)
        for process, _connection in self._running.values():
            process.join(30)
            if process.is_alive():
                process.kill()

    def measure(self, host: str, peer: Callable[[Work], Ran], work: Work) -> Measured:
        """Run it once. Raises PeerFailed."""
        process, connection = self._host(host)
        with Meter(process.pid) as meter:
            begun = time.monotonic()
            connection.send((peer, work))
            if not connection.poll(RUN_LIMIT_S):
                raise PeerFailed(f"no end after {RUN_LIMIT_S:.0f} s")
            failure, ran, ended = connection.recv()
        if failure:
            raise PeerFailed(failure)
        started = ran.started or begun
        num_images = _count_rows(work.output) if ran.num_images is None else ran.num_images
        return Measured(
            num_images, ended - started, started - begun, meter.cpu_s(begin=started),
            meter.cpu_s("daemon", begin=started), meter.peak_bytes, ran.stages,
        )  # fmt: skip

    def idle(self, seconds: float) -> float:
        """CPU seconds a second that Ray's own processes, of all clusters together, take while nothing runs."""
        with ExitStack() as stack:
            meters = [stack.enter_context(Meter(process.pid)) for process, _ in self._running.values()]
            time.sleep(seconds)
        return sum(meter.cpu_s("daemon") for meter in meters) / seconds

    def _host(self, name: str) -> tuple[Any, Connection]:
        if name not in self._running:
            context = multiprocessing.get_context("spawn")
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, name in (RAY, RAY_DATA)), name=name)
            process.start()
            self._running[name] = (process, here)
        return self._running[name]


def _serve(connection: Connection, with_ray: bool) -> None:
    """Answers each (peer, work) with (what went wrong, what it returned, when it ended)."""
    logging.disable(logging.WARNING)
    with _cluster() if with_ray else _nothing():
        while (call := connection.recv()) is not None:
            peer, work = call
            try:
                ran, failure = peer(work), ""
            except Exception:  # noqa: BLE001  # a peer that fails is a line in the table
                ran, failure = None, traceback.format_exc()
            connection.send((failure, ran, time.monotonic()))


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _cluster() -> Iterator[None]:
    import ray

    ray.init(
        address="local", num_cpus=CORES, num_gpus=1, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False, logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}},
    )  # fmt: skip
    yield
    ray.shutdown()


def _count_rows(output: str) -> int:
    """All rows of the Parquet files below; then they go."""
    rows = sum(pq.read_metadata(path).num_rows for path in Path(output).rglob("*.parquet"))
    shutil.rmtree(output)
    return rows
