"""What a machine has for a run: cores that this process may use, and GPUs. Asks neither Ray nor the network."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from jobs.decode_place import DecodePlace, Node, decode_place, num_actors_on
from jobs.tokenize_config import RaySettings

THIS = "this machine"
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """`name`: for messages, `this machine` or a cluster's address."""

    name: str
    cpus: float
    gpus: float


def this_machine(*, with_gpus: bool) -> Machine:
    """GPUs are looked for only where they are wanted: it takes torch, which takes seconds."""
    if not with_gpus:
        return Machine(THIS, usable_cores(), 0)
    from model.devices import num_gpus

    return Machine(THIS, usable_cores(), num_gpus())


def usable_cores(cgroup: Path = CGROUP) -> int:
    """Cores that this process may run on, and no more than its container's share of time (`cgroup`) adds up to."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, _quota(cgroup) or allowed))


def _quota(cgroup: Path) -> int | None:
    """Of version 2 and version 1; None without a limit."""
    try:
        if (both := cgroup / "cpu.max").exists():
            quota, period = both.read_text().split()
        else:
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return math.ceil(int(quota) / int(period)) if quota != "max" and int(quota) > 0 else None
    except (OSError, ValueError):
        return None


def actors_on(machine: Machine, settings: RaySettings, num_shards: int) -> int:
    """How many actors a run has there, by the run's own rule."""
    return num_actors_on([_node(machine)], settings, num_shards)


def decoding_on(machine: Machine, settings: RaySettings, num_actors: int) -> DecodePlace:
    """Where and on how many threads a run decodes that has this machine and no other."""
    return decode_place(settings, [_node(machine)], num_actors, may_grow=False)


def _node(machine: Machine) -> Node:
    return Node({"CPU": machine.cpus, "GPU": machine.gpus})
