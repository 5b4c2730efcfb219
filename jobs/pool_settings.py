"""How large a pool of tokenising actors is, and where it decodes: as configured; where the config says nothing, by
what the cluster has."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import ray

from jobs.cluster import OBJECT_STORE_BYTES
from jobs.decode_place import BATCHES_AHEAD, DecodeTasks, Node, decode_place, node_of, takes_tasks
from jobs.tokenize_config import RaySettings, TokenizeConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PoolSettings:
    """`decode`: None where actors decode on threads of their own. `decode_threads`: of an actor, or of a task."""

    num_actors: int
    gpus_per_actor: float
    cpus_per_actor: float
    shards_in_flight: int
    wait_s: float
    shard_deadline_s: float | None  # None: derived from what was seen
    retry_pause_s: float
    elastic: bool = False  # more actors when the cluster has more room
    decode_threads: int = 1
    decode: DecodeTasks | None = None


def pool_settings(config: TokenizeConfig, num_shards: int) -> PoolSettings:
    """As configured; where it says nothing, an actor for each GPU (or for each CPU, where none is asked for)."""
    nodes = [node_of(described) for described in ray.nodes() if described["Alive"]]
    settings, num_actors = config.ray, _num_actors(config.ray, nodes, num_shards)
    may_grow = bool(settings.address or os.environ.get("RAY_ADDRESS"))  # not one of our own, on this machine
    place = decode_place(settings, nodes, num_actors, may_grow=may_grow)
    log.info("%d actors; %s", num_actors, place)
    if place.lack:
        wait = f"wait {settings.wait_s:g} s (ray.wait_s) for that, and then " if place.tasks else ""
        log.warning("%s; the actors %sdecode by themselves", place.lack, wait)
    return PoolSettings(
        num_actors, settings.gpus_per_actor, settings.cpus_per_actor, place.shards_in_flight, settings.wait_s,
        config.shard_deadline_s, config.retry_pause_s, settings.num_actors is None, place.threads, place.tasks,
    )  # fmt: skip


def _num_actors(settings: RaySettings, nodes: Sequence[Node], num_shards: int) -> int:
    if settings.num_actors:
        return settings.num_actors
    cpus_beside = (settings.decode_cpus or settings.decode_threads or 1) if takes_tasks(settings, nodes) else 0.0
    fitting = fitting_actors(settings.gpus_per_actor, settings.cpus_per_actor, cpus_beside)
    if not fitting:
        name = "GPU" if settings.gpus_per_actor else "CPU"
        log.warning("the cluster has no %s yet: one actor is asked for; ray.num_actors asks for more", name)
    return max(1, min(fitting, num_shards))


def fitting_actors(gpus_per_actor: float, cpus_per_actor: float, cpus_beside: float = 0.0) -> int:
    """How many the cluster has room for now: by its GPUs, or by its CPUs where an actor takes no GPU. `cpus_beside`:
    left for each actor's decode tasks."""
    name, each = ("GPU", gpus_per_actor) if gpus_per_actor else ("CPU", cpus_per_actor + cpus_beside)
    return int(ray.cluster_resources().get(name, 0) / each) if each else 1


def store_bytes(config: TokenizeConfig, image_size: int) -> int:
    """That the object store of a cluster of our own should have. Where decode tasks are asked for, room for all that
    may wait there: of each shard in flight the batches ahead, one being put there and one being encoded."""
    if config.ray.decode != "tasks":
        return OBJECT_STORE_BYTES
    num_shards = (config.ray.num_actors or os.cpu_count() or 1) * (config.ray.shards_in_flight or 2)
    batch_bytes = config.batch_size * image_size * image_size * 3
    return max(OBJECT_STORE_BYTES, num_shards * (BATCHES_AHEAD + 2) * batch_bytes)
