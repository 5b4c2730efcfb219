"""`dvae bench`: what this machine could do, what the run gets out of it, and what to set. Orders the measurements; how
each is made is told in the other bench_*.py, and how it is shown in bench_report.py."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from jobs.bench_figures import DECODE, ENCODE, FREE, NO_RAY, RAY, TITLES, Figures, Rates, Setting
from jobs.bench_material import Material, copied
from jobs.bench_processes import Crew, Processes
from jobs.bench_ray import ray_rounds
from jobs.bench_report import bench_json, print_bench
from jobs.bench_sources import FreeSource, MarkedSource
from jobs.bench_sweep import sweep
from jobs.decode_place import fitting_actors
from jobs.estimate import speed
from jobs.machine import THIS, Machine, actors_on, decoding_on, this_machine
from jobs.progress import JobProgress
from jobs.stage_costs import StageSample, measure_stages, scratch
from jobs.tokenize_config import RaySettings, TokenizeConfig
from jobs.tokenize_run import TokenizeRun
from pipeline.errors import PipelineError
from pipeline.images import ImageSpec
from pipeline.output import OutputPrefix
from pipeline.records import ObjectInfo
from pipeline.shard_patterns import expand
from pipeline.tokenize_shard import TokenizeJob

if TYPE_CHECKING:
    from jobs.tokenize_actor import Source

IMAGES = 1024
ROUND_S = 4.0
SLOWEST_BATCH_S = 5.0  # or else the whole would take many minutes
SETTLED = 0.8  # of the ideal: what a round is taken to reach, when its length is chosen
BATCHES_A_SHARD = 2


class CannotMeasure(PipelineError):
    """This machine lacks the device on which the run encodes, or is too slow to be measured so."""


@dataclass(frozen=True)
class BenchOptions:
    """`num_images`: to measure on, and of one round; None: IMAGES, and rounds of ROUND_S. `free`: an encoder that costs
    nothing."""

    num_images: int | None = None
    rounds: int = 3
    free: bool = False


def run_bench(config: TokenizeConfig, options: BenchOptions, *, as_json: bool) -> int:
    """Measure and print; 0. Raises PipelineError or ModelError where nothing can be measured."""
    run = TokenizeRun.of(config)
    with scratch(run.output.url) as output:
        figures = measure(run, expand(config.shards), options, output)
    console = Console(highlight=False)
    if as_json:
        console.print_json(json.dumps(bench_json(figures)))
    else:
        print_bench(figures, console)
    return 0


def measure(run: TokenizeRun, shards: Sequence[ObjectInfo], options: BenchOptions, output: OutputPrefix) -> Figures:
    """All figures of one machine. Files go to `output`, which is scratch, and to a temporary folder."""
    setting, source, load = _setting(run, len(shards), options), _source(run, options), os.getloadavg()[0]
    job = replace(run.job(setting.threads_a_process), output=output)
    with tempfile.TemporaryDirectory() as folder, JobProgress("bench", 9 + 4 * options.rounds) as progress:
        step = _Steps(progress)
        step("copying the first images")
        material = copied(shards, job, options.num_images or IMAGES, _per_shard(setting, options), output)
        sample = _alone(run, source, job, material, step)
        step("batch sizes")
        tried = () if options.free or run.source.compile else sweep(run.source, sample.batches, sample.wall.encode_s)
        np.save(Path(folder) / "batches.npy", np.concatenate(sample.batches))
        crew = Crew(source, job, setting.shards_in_flight, str(Path(folder) / "batches.npy"))
        num_tasks = _num_tasks(setting, sample, material, options)
        tasks, first = material.tasks(num_tasks), material.tasks(setting.num_actors * setting.shards_in_flight)
        step("starting processes")
        with Processes(crew, setting.num_actors, setting.gpus_per_actor) as processes:
            step("starting Ray")
            with ray_rounds(run.config, setting, MarkedSource(source, folder), job, first) as with_ray:
                works: dict[str, Callable[[], float]] = {
                    DECODE: lambda: processes.decode(tasks),
                    ENCODE: processes.encode,
                    NO_RAY: lambda: processes.tokenize(tasks),
                    RAY: lambda: with_ray.tokenize(tasks),
                }
                rates = in_rounds(works, options.rounds, step)
                times, startup = with_ray.times, with_ray.startup
    return Figures(
        setting, sample.cpu, sample.wall, material.source_read_s, sample.image_bytes, sample.part_bytes,
        sample.num_failed, material.num_images, num_tasks * material.per_shard, rates, times, startup, tried,
        round(load, 2),
    )  # fmt: skip


def in_rounds(works: Mapping[str, Callable[[], float]], rounds: int, step: Callable[[str], None]) -> dict[str, Rates]:
    """Each work once a round, in turn forwards and backwards, so that what changes slowly hits all alike."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds):
        for name in list(works) if number % 2 == 0 else reversed(list(works)):
            step(f"round {number + 1} of {rounds}: {TITLES[name]}")
            found[name].append(works[name]())
    return {name: Rates(tuple(values)) for name, values in found.items()}


class _Steps:
    """Says what is measured now."""

    def __init__(self, progress: JobProgress) -> None:
        self._progress, self._count = progress, 0

    def __call__(self, what: str) -> None:
        self._progress.advance(self._count, what)
        self._count = 1


def _source(run: TokenizeRun, options: BenchOptions) -> Source:
    table = run.table
    return FreeSource(table.tokenizer_id, table.grid, table.codebook_size) if options.free else run.source


def _setting(run: TokenizeRun, num_shards: int, options: BenchOptions) -> Setting:
    """As a run would choose it that had only this machine. Raises CannotMeasure."""
    config, on_gpu = run.config, run.config.device == "cuda"
    machine = this_machine(with_gpus=on_gpu)
    if on_gpu and not machine.gpus and not options.free:
        raise CannotMeasure(
            "the run encodes on GPUs (ray.gpus_per_actor), and this machine has none that torch can use"
        )
    num_actors = min(actors_on(machine, config.ray, num_shards), _room(machine, config.ray))
    decoding = decoding_on(machine, config.ray, num_actors)
    return Setting(
        FREE if options.free else run.table.tokenizer_id,
        "cpu" if options.free else config.device,
        config.precision,
        config.compile,
        config.batch_size,
        ImageSpec.from_json(run.table.image_spec).size,
        int(machine.cpus),
        machine.gpus,
        num_actors,
        0 if options.free else config.ray.gpus_per_actor,
        config.threads,
        decoding.threads,
        decoding.tasks is not None,
        decoding.shards_in_flight,
    )


def _room(machine: Machine, settings: RaySettings) -> int:
    """For actors: the config may name more of them, for a cluster."""
    resources = {"CPU": machine.cpus, "GPU": machine.gpus}
    return max(1, fitting_actors(resources, settings.gpus_per_actor, settings.cpus_per_actor or 1))


def _per_shard(setting: Setting, options: BenchOptions) -> int:
    """Images of a copy: a few batches, and few enough that every actor has shards."""
    slots = setting.num_actors * setting.shards_in_flight
    return min(BATCHES_A_SHARD * setting.batch_size, -(-(options.num_images or IMAGES) // slots))


def _alone(
    run: TokenizeRun, source: Source, job: TokenizeJob, material: Material, step: Callable[[str], None]
) -> StageSample:
    step("loading the model")
    spec, tokenizer = ImageSpec.from_json(run.table.image_spec), source.load()
    sample = measure_stages(
        material.shards, spec, tokenizer, job, material.num_images, lambda stage: step(f"{stage}, alone")
    )
    if (batch_s := sample.wall.encode_s * job.batch_size) > SLOWEST_BATCH_S:
        good = max(1, int(SLOWEST_BATCH_S / sample.wall.encode_s / 2))
        raise CannotMeasure(
            f"a batch of {job.batch_size} images takes {batch_s:.0f} s to encode here, so that all of this would take "
            f"many minutes: add batch_size={good} to measure with smaller ones, or --free to leave the encoder out"
        )
    return sample


def _num_tasks(setting: Setting, sample: StageSample, material: Material, options: BenchOptions) -> int:
    """Of one round: what was asked for, or ROUND_S of work, as many for each actor."""
    if options.num_images:
        return len(material.shards)
    machine = Machine(THIS, setting.cores, setting.gpus)
    ideal = speed(sample.cpu, sample.wall, machine, setting.num_actors, on_gpu=setting.on_gpu).ideal
    slots = setting.num_actors * setting.shards_in_flight
    return slots * max(1, round(SETTLED * ideal * ROUND_S / (material.per_shard * slots)))
