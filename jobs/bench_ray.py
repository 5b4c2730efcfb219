"""The engine as a run has it: actors on a Ray of this machine, kept warm over any number of rounds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, replace
from typing import Any

from jobs.actors import ActorPool
from jobs.bench_figures import Setting, Startup
from jobs.bench_sources import ENCODED, LOADED, MarkedSource
from jobs.cluster import connected
from jobs.dispatch import Dispatch
from jobs.pool_settings import PoolSettings, pool_settings, store_bytes
from jobs.ray_actors import RayActors
from jobs.tokenize_config import TokenizeConfig
from pipeline.errors import PipelineError
from pipeline.plan import ShardTask
from pipeline.records import ShardResult
from pipeline.stage_times import StageTimes
from pipeline.tokenize_shard import TokenizeJob


class RunFailed(PipelineError):
    """A shard of the benchmark could not be tokenised."""


class RayRounds:
    """`times` are those of all rounds so far, the first shards (which wait for the actors) left out."""

    def __init__(self, pool: ActorPool, startup: Startup, in_flight: int) -> None:
        self._pool, self.startup, self._in_flight = pool, startup, in_flight
        self._before = pool.times

    @property
    def times(self) -> StageTimes:
        now, before = astuple(self._pool.times), astuple(self._before)
        return StageTimes(*(later - earlier for later, earlier in zip(now, before, strict=True)))

    def tokenize(self, tasks: Sequence[ShardTask]) -> float:
        """Images a second, from the first shard handed out to the last result."""
        started = time.perf_counter()
        num_images = _run(self._pool, tasks, self._in_flight)
        return num_images / (time.perf_counter() - started)


@contextmanager
def ray_rounds(
    config: TokenizeConfig, setting: Setting, source: MarkedSource, job: TokenizeJob, first: Sequence[ShardTask]
) -> Iterator[RayRounds]:
    """A Ray of our own, whatever cluster the config names, for the block. `first`: tasks that the actors begin with,
    one for each at least. Raises ClusterError, RunFailed."""
    started = time.time()
    config = as_measured(config, setting)
    with connected("local", store_bytes(config, setting.image_size)):
        up = time.time()
        settings = pool_settings(config, len(first))
        job = replace(job, decode_threads=settings.decode_threads)
        with ActorPool(RayActors(source, job, settings), settings) as pool:
            _run_until_all_are_loaded(pool, first, settings, source)
            loaded, encoded = source.times(LOADED)[-1], source.times(ENCODED)[0]
            startup = Startup(up - started, loaded - started, encoded - started)
            yield RayRounds(pool, startup, settings.shards_in_flight)


def as_measured(config: TokenizeConfig, setting: Setting) -> TokenizeConfig:
    """Of the same size as what is measured without Ray, on this machine, which has no nodes to choose among; a free
    encoder takes no GPU."""
    here: dict[str, Any] = {
        "address": None,
        "num_actors": setting.num_actors,
        "gpus_per_actor": setting.gpus_per_actor,
        "shards_in_flight": setting.shards_in_flight,
        "decode": "tasks" if setting.decodes_in_tasks else "threads",
        "decode_threads": setting.decode_threads,
        "decode_labels": {},
        "decode_resources": {},
    }
    return config.model_copy(update={"ray": config.ray.model_copy(update=here)})


def _run_until_all_are_loaded(
    pool: ActorPool, first: Sequence[ShardTask], settings: PoolSettings, source: MarkedSource
) -> None:
    """The pool works as soon as it has one actor, and a round is to have all."""
    until = time.monotonic() + settings.wait_s
    while (num_loaded := len(source.times(LOADED))) < settings.num_actors or not source.times(ENCODED):
        if time.monotonic() > until:
            raise RunFailed(f"only {num_loaded} of {settings.num_actors} actors have their model after so long")
        _run(pool, first, settings.shards_in_flight)


def _run(pool: ActorPool, tasks: Sequence[ShardTask], in_flight: int) -> int:
    num_images = 0
    for outcome in pool.run(Dispatch(tasks, attempts=1, in_flight_limit=in_flight)):
        if not isinstance(outcome, ShardResult):
            raise RunFailed(f"a shard could not be tokenised ({outcome.reason.value}): {outcome.message}")
        num_images += outcome.num_rows
    return num_images
