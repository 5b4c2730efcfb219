"""How large a pool of tokenising actors is, and where it decodes: as configured; where the config says nothing, by
what the cluster has."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import ray

from jobs.cluster import OBJECT_STORE_BYTES, describe_resources
from jobs.decode_place import (
    BATCHES_AHEAD,
    MAX_SHARDS_IN_TASKS,
    DecodeTasks,
    Node,
    can_hold_an_actor,
    decode_place,
    most_in_flight,
    node_of,
    num_actors_on,
)
from jobs.tokenize_config import RaySettings, TokenizeConfig

log = logging.getLogger(__name__)
SAY_EVERY_S = 10.0


@dataclass(frozen=True)
class PoolSettings:
    """`decode`: None where actors decode on threads of their own. `decode_threads`: of an actor, or of a task.
    `follows`: what shards_in_flight goes by, where it changes with the cluster."""

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
    waited_s: float = 0.0  # of wait_s, already, and in vain
    follows: RaySettings | None = None

    @property
    def most_in_flight(self) -> int:
        """Shards that an actor may ever have."""
        return MAX_SHARDS_IN_TASKS if self.follows else self.shards_in_flight


def pool_settings(config: TokenizeConfig, num_shards: int, look: Callable[[], None] = lambda: None) -> PoolSettings:
    """As configured; where it says nothing, an actor for each GPU (or for each CPU, where none is asked for). Where a
    cluster that may grow has no node for an actor yet, waits for the first, and decodes as befits that one; `look` is
    called all the while, and may raise."""
    settings, waited_s = config.ray, 0.0
    may_grow = bool(settings.address or os.environ.get("RAY_ADDRESS"))  # not one of our own, on this machine
    if not (room := _has_room(settings)) and may_grow and not (room := _comes_up(settings, look)):
        waited_s = settings.wait_s
    if not room:
        wanted = f"{settings.gpus_per_actor:g} GPU" if settings.gpus_per_actor else f"{settings.cpus_per_actor:g} CPU"
        more = "" if settings.num_actors else ": one actor is asked for; ray.num_actors asks for more"
        log.warning("no node has the %s of an actor yet%s", wanted, more)
    nodes = _nodes()
    num_actors = num_actors_on(nodes, settings, num_shards)
    place = decode_place(settings, nodes, num_actors, may_grow=may_grow)
    log.info("%d actors; %s", num_actors, place)
    if place.lack:
        wait = f"wait {settings.wait_s:g} s (ray.wait_s) for that, and then " if place.tasks else ""
        log.warning("%s; the actors %sdecode by themselves", place.lack, wait)
    # Decode tasks run on machines that come and go; their threads are settled, how many there are is not.
    follows = settings.model_copy(update={"decode": "tasks", "decode_threads": place.threads})
    return PoolSettings(
        num_actors, settings.gpus_per_actor, settings.cpus_per_actor, place.shards_in_flight, settings.wait_s,
        config.shard_deadline_s, config.retry_pause_s, settings.num_actors is None, place.threads, place.tasks,
        waited_s, follows if may_grow and place.tasks and settings.shards_in_flight is None else None,
    )  # fmt: skip


def shards_in_flight(settings: PoolSettings, num_actors: int) -> int | None:
    """That the cluster can decode now, for each actor; None where it stays as it was."""
    if settings.follows is None:
        return None
    return decode_place(settings.follows, _nodes(), num_actors, may_grow=True).shards_in_flight


def _nodes() -> list[Node]:
    return [node_of(described) for described in ray.nodes() if described["Alive"]]


def _has_room(settings: RaySettings) -> bool:
    return any(can_hold_an_actor(node, settings) for node in _nodes())


def _comes_up(settings: RaySettings, look: Callable[[], None]) -> bool:
    """Whether there is place for an actor within ray.wait_s. It is asked for: some clusters grow only for those who
    wait in them."""
    place = ray.remote(num_gpus=settings.gpus_per_actor, num_cpus=settings.cpus_per_actor)(_nothing)
    calls = [place.remote() for _ in range(settings.num_actors or 1)]
    until = time.monotonic() + settings.wait_s
    try:
        while (left_s := until - time.monotonic()) > 0:
            log.warning(
                "no node can hold an actor yet; waiting up to %.0f s (ray.wait_s) for the first, which decides what "
                "ray.decode and ray.decode_threads leave open; the cluster has %s", left_s, describe_resources(),
            )  # fmt: skip
            look()
            if ray.wait(calls, num_returns=1, timeout=min(SAY_EVERY_S, left_s))[0]:
                return True
        return False
    finally:
        for call in calls:
            ray.cancel(call)


def _nothing() -> None:
    """Runs where there is place for it."""


def store_bytes(config: TokenizeConfig, image_size: int) -> int:
    """That the object store of a cluster of our own should have. Where decode tasks are asked for, room for all that
    may wait there: of each shard in flight the batches ahead, one being put there and one being encoded."""
    if config.ray.decode != "tasks":
        return OBJECT_STORE_BYTES
    batch_bytes = config.batch_size * image_size * image_size * 3
    return max(OBJECT_STORE_BYTES, most_in_flight(config.ray, os.cpu_count() or 1) * (BATCHES_AHEAD + 2) * batch_bytes)
