"""How long a run would take and how much it would write, from measured costs. Pure arithmetic: measures nothing."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.machine import Machine
from jobs.stage_costs import StageCosts

ENGINE_SHARE = 0.85  # of the ideal that a run is taken to reach: `dvae bench` measures it


@dataclass(frozen=True)
class Speed:
    """Of a run. `ideal` is what the machine could do if nothing ever waited; `limit` says what of it ends first:
    `cores`, or `encoder` (the actors encode one batch at a time each)."""

    num_actors: int
    cpus: float
    ideal: float
    limit: str

    @property
    def images_per_s(self) -> float:
        return ENGINE_SHARE * self.ideal


@dataclass(frozen=True)
class Amount:
    """What is left to do, about: `shard_bytes` are exact, the images in them are not."""

    shard_bytes: int
    num_images: float
    part_bytes: float


def speed(cpu: StageCosts, wall: StageCosts, machine: Machine, num_actors: int, *, on_gpu: bool) -> Speed:
    """Of so many actors on a machine (or a cluster of such machines). Where the encoder runs on a GPU, the cores do
    the rest."""
    per_image_s = cpu.total_s - (cpu.encode_s if on_gpu else 0.0)
    rates = {"cores": machine.cpus / per_image_s, "encoder": num_actors / wall.encode_s}
    limit = min(rates, key=lambda name: rates[name])
    return Speed(num_actors, machine.cpus, rates[limit], limit)


def amount(shard_bytes: int, bytes_of_an_image: float, bytes_of_a_row: float) -> Amount:
    """`bytes_of_an_image`: in the shards, with all that is around it; `bytes_of_a_row`: in the parts."""
    num_images = shard_bytes / bytes_of_an_image
    return Amount(shard_bytes, num_images, num_images * bytes_of_a_row)
