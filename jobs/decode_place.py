"""How many actors there are, where shards are decoded, on how many threads, and how many at once: as configured; where
the config says nothing, by what the cluster has. Pure: knows nodes as numbers, and no Ray."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jobs.tokenize_config import RaySettings

MAX_DECODE_THREADS = 64  # one process decodes no faster with more: the interpreter's lock is in the way
MAX_TASK_THREADS = 8  # of a decode task: rather more processes than more threads
SHARDS_ON_THREADS = 2  # in flight, of an actor that decodes by itself: one is encoded while the other comes near
MAX_SHARDS_IN_TASKS = 16  # in flight: their batches wait in the object store
BATCHES_AHEAD = 2  # of a shard, in the object store: whoever makes more is stopped until one is taken
WORTH_ITS_TASKS = 0.25  # CPUs without a GPU to CPUs beside one: fewer are not worth the way through the object store
_ONE_OF = re.compile(r"in\((.*)\)")


@dataclass(frozen=True)
class Node:
    """What one machine of the cluster has, in all."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def cpus(self) -> float:
        return self.resources.get("CPU", 0.0)

    @property
    def has_gpu(self) -> bool:
        return self.resources.get("GPU", 0.0) > 0


@dataclass(frozen=True)
class DecodeTasks:
    """What a decode task asks of Ray, and how long an actor waits for it to begin."""

    cpus: float
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    wait_s: float

    def __str__(self) -> str:
        asked = [f"{self.cpus:g} CPU", *(f"{amount:g} {name}" for name, amount in self.resources.items())]
        labels = [f"{key}={value}" for key, value in self.labels.items()]
        return ", ".join(asked) + (f" on a node with {' and '.join(labels)}" if labels else "")


@dataclass(frozen=True)
class DecodePlace:
    """`threads` decode in one process: an actor's, or a task's. `tasks` is None where actors decode by themselves.
    `lack`: why no decode task can begin in this cluster as it is, "" where one can."""

    threads: int
    shards_in_flight: int
    tasks: DecodeTasks | None = None
    lack: str = ""

    def __str__(self) -> str:
        if self.tasks is None:
            return f"{self.threads} decode threads in each actor, {self.shards_in_flight} shards in flight"
        return f"decode tasks of {self.threads} threads ({self.tasks}), {self.shards_in_flight} for each actor"


def num_actors_on(nodes: Sequence[Node], settings: RaySettings, num_shards: int) -> int:
    """As configured; else as many as the nodes have room for with their decode tasks: one at least, and no more than
    there are shards."""
    beside = task_cpus(settings, settings.decode_threads or 1) if takes_tasks(settings, nodes) else 0.0
    resources = {name: sum(node.resources.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
    fitting = fitting_actors(resources, settings.gpus_per_actor, settings.cpus_per_actor, beside)
    return settings.num_actors or max(1, min(fitting, num_shards))


def fitting_actors(
    resources: Mapping[str, float], gpus_per_actor: float, cpus_per_actor: float, cpus_beside: float = 0.0
) -> int:
    """By the GPUs, or by the CPUs where an actor takes no GPU. `cpus_beside`: left for each actor's decode tasks."""
    name, each = ("GPU", gpus_per_actor) if gpus_per_actor else ("CPU", cpus_per_actor + cpus_beside)
    return int(resources.get(name, 0.0) / each) if each else 1


def can_hold_an_actor(node: Node, settings: RaySettings) -> bool:
    return node.cpus >= settings.cpus_per_actor and node.resources.get("GPU", 0.0) >= settings.gpus_per_actor


def task_cpus(settings: RaySettings, threads: int) -> float:
    """That Ray sets aside for a decode task of so many threads; may be 0."""
    return threads if settings.decode_cpus is None else settings.decode_cpus


def takes_tasks(settings: RaySettings, nodes: Sequence[Node]) -> bool:
    """`auto`: where the config says which nodes decode, or where GPUs stand beside many CPUs of other machines."""
    if settings.decode != "auto":
        return settings.decode == "tasks"
    if settings.decode_labels or settings.decode_resources:
        return True
    beside = sum(node.cpus for node in nodes if node.has_gpu)
    apart = sum(node.cpus for node in nodes if not node.has_gpu)
    return settings.gpus_per_actor > 0 and apart > 0 and apart >= WORTH_ITS_TASKS * beside


def decode_place(settings: RaySettings, nodes: Sequence[Node], num_actors: int, *, may_grow: bool) -> DecodePlace:
    """`may_grow`: a cluster that lacks the place for a decode task may have it later; one that won't gets threads."""
    if not takes_tasks(settings, nodes):
        return _on_threads(settings, nodes, num_actors)
    place = _in_tasks(settings, nodes, num_actors)
    return place if may_grow or not place.lack else replace(_on_threads(settings, nodes, num_actors), lack=place.lack)


def _on_threads(settings: RaySettings, nodes: Sequence[Node], num_actors: int) -> DecodePlace:
    """An actor's share of the CPUs of the largest machine that may hold it, actors spread evenly over these."""
    hosts = _hosts(settings, nodes)
    largest = max(hosts, key=lambda node: node.cpus, default=Node({"CPU": 1}))
    can_hold = fitting_actors(largest.resources, settings.gpus_per_actor, settings.cpus_per_actor)
    actors_a_node = min(-(-num_actors // max(1, len(hosts))), max(1, can_hold))  # others wait for nodes to come
    share = int(largest.cpus / actors_a_node)
    threads = settings.decode_threads or max(1, min(MAX_DECODE_THREADS, share))
    return DecodePlace(threads, settings.shards_in_flight or SHARDS_ON_THREADS)


def _in_tasks(settings: RaySettings, nodes: Sequence[Node], num_actors: int) -> DecodePlace:
    """As many at once as the CPUs that no actor holds allow; threads so many that all these CPUs have work."""
    spare = spare_cpus(settings, nodes, num_actors)
    per_actor = spare / num_actors
    threads = settings.decode_threads or _between(1, math.ceil(per_actor / MAX_SHARDS_IN_TASKS), MAX_TASK_THREADS)
    cpus = task_cpus(settings, threads)
    tasks = DecodeTasks(cpus, settings.decode_resources, settings.decode_labels, settings.wait_s)
    fitting = _fitting(tasks, _decoding(settings, nodes), spare)
    in_flight = settings.shards_in_flight or _between(2, fitting / num_actors, MAX_SHARDS_IN_TASKS)
    return DecodePlace(threads, in_flight, tasks, "" if fitting >= 1 else _lack(settings, nodes, tasks, spare))


def most_in_flight(settings: RaySettings, cpus: int) -> int:
    """Shards of all actors together, in tasks on one machine of so many CPUs, whatever else it has: a bound."""
    each = task_cpus(settings, settings.decode_threads or 1)
    by_cpus = fitting_actors({"CPU": cpus}, 0.0, settings.cpus_per_actor, each)
    num_actors = settings.num_actors or max(1, cpus if settings.gpus_per_actor else by_cpus)
    per_actor = cpus / each / num_actors if each else math.inf
    in_flight = settings.shards_in_flight or math.ceil(max(2, min(MAX_SHARDS_IN_TASKS, per_actor)))
    return num_actors * in_flight


def spare_cpus(settings: RaySettings, nodes: Sequence[Node], num_actors: int) -> float:
    """Of the nodes that may decode, less what the actors take there when there is no room for them elsewhere."""
    decoding, hosts = _decoding(settings, nodes), _hosts(settings, nodes)
    elsewhere = sum(node.cpus for node in hosts if node not in decoding)
    shared = sum(node.cpus for node in hosts if node in decoding)
    taken = min(shared, max(0.0, num_actors * settings.cpus_per_actor - elsewhere))
    return sum(node.cpus for node in decoding) - taken


def _hosts(settings: RaySettings, nodes: Sequence[Node]) -> list[Node]:
    """The nodes that actors may be on; all of them while none has what they want."""
    return [node for node in nodes if can_hold_an_actor(node, settings)] or list(nodes)


def _decoding(settings: RaySettings, nodes: Iterable[Node]) -> list[Node]:
    return [
        node
        for node in nodes
        if all(fulfils(node.labels.get(key), wanted) for key, wanted in settings.decode_labels.items())
        and all(node.resources.get(name, 0.0) >= amount for name, amount in settings.decode_resources.items())
        and node.cpus >= (settings.decode_cpus or 0)
    ]


def fulfils(label: str | None, wanted: str) -> bool:
    """Ray's selectors: `value`, `!value`, `in(a,b)`, `!in(a,b)`."""
    plain = wanted.removeprefix("!")
    listed = _ONE_OF.fullmatch(plain)
    values = [value.strip() for value in listed[1].split(",")] if listed else [plain]
    return (label in values) != wanted.startswith("!")


def _fitting(tasks: DecodeTasks, nodes: Sequence[Node], spare: float) -> float:
    """How many such tasks can run at once."""
    limits = [
        sum(node.resources.get(name, 0.0) for node in nodes) / amount
        for name, amount in tasks.resources.items()
        if amount
    ]
    by_cpus = [spare / tasks.cpus] if tasks.cpus else []
    return min([*by_cpus, *limits], default=float(bool(nodes)) * math.inf) if nodes else 0.0


def _lack(settings: RaySettings, nodes: Sequence[Node], tasks: DecodeTasks, spare: float) -> str:
    if not _decoding(settings, nodes):
        return f"no node can hold a decode task of {tasks}"
    return f"a decode task takes {tasks}, and the actors leave {spare:g} CPU; lower ray.num_actors or ray.decode_cpus"


def _between(least: int, value: float, most: int) -> int:
    return int(min(most, max(least, value)))


def node_of(described: Mapping[str, Any]) -> Node:
    """From one of Ray's descriptions of its nodes."""
    return Node(described["Resources"], described.get("Labels") or {})
