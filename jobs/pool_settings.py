"""How large a pool of tokenising actors is: as configured; where the config says nothing, by what the cluster has."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import ray

from jobs.tokenize_config import TokenizeConfig

log = logging.getLogger(__name__)
MAX_DECODE_THREADS = 64  # one process decodes no faster with more: the interpreter's lock is in the way


@dataclass(frozen=True)
class PoolSettings:
    num_actors: int
    gpus_per_actor: float
    cpus_per_actor: float
    shards_in_flight: int
    wait_s: float
    shard_deadline_s: float | None  # None: derived from what was seen
    retry_pause_s: float
    elastic: bool = False  # more actors when the cluster has more room


def pool_settings(config: TokenizeConfig, num_shards: int) -> PoolSettings:
    """As configured; where it says nothing, an actor for each GPU (or for each CPU, where none is asked for)."""
    settings = config.ray
    num_actors = settings.num_actors or _fitting(settings.gpus_per_actor, settings.cpus_per_actor, num_shards)
    return PoolSettings(
        num_actors, settings.gpus_per_actor, settings.cpus_per_actor, settings.shards_in_flight, settings.wait_s,
        config.shard_deadline_s, config.retry_pause_s, elastic=settings.num_actors is None,
    )  # fmt: skip


def _fitting(gpus_per_actor: float, cpus_per_actor: float, num_shards: int) -> int:
    fitting = fitting_actors(gpus_per_actor, cpus_per_actor)
    if not fitting:
        log.warning("the cluster has no %s yet: one actor is asked for", "GPU" if gpus_per_actor else "CPU")
    return max(1, min(fitting, num_shards))


def fitting_actors(gpus_per_actor: float, cpus_per_actor: float) -> int:
    """How many the cluster has room for now: by its GPUs, or by its CPUs where an actor takes no GPU."""
    name, each = ("GPU", gpus_per_actor) if gpus_per_actor else ("CPU", cpus_per_actor)
    return int(ray.cluster_resources().get(name, 0) / each) if each else 1


def decode_threads(config: TokenizeConfig, num_actors: int) -> int:
    """As configured, else an actor's share of the CPUs of the largest machine, actors spread evenly over them."""
    if config.ray.decode_threads:
        return config.ray.decode_threads
    cpus = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]] or [1]
    actors_a_node = -(-num_actors // len(cpus))
    return max(1, min(MAX_DECODE_THREADS, int(max(cpus) / actors_a_node)))
