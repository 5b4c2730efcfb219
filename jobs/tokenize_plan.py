"""`dvae tokenize --plan`: what a run would do, how long it would take and how much it would write. Starts nothing: no
lease, no Ray (a cluster that the config names is only asked what it has), and not a byte goes to the output."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console

from jobs.estimate import Amount, amount, speed
from jobs.machine import THIS, Machine, actors_on, this_machine
from jobs.plan_report import PlannedRun, Sample, plan_json, plan_lines
from jobs.progress import JobProgress
from jobs.stage_costs import NothingToMeasure, StageSample, measure_stages
from jobs.tokenize_config import TokenizeConfig
from jobs.tokenize_run import TokenizeRun
from pipeline.errors import ShardError
from pipeline.images import ImageSpec
from pipeline.lease import is_held
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix, check_run
from pipeline.plan import Plan, ShardTask, collector_paused, make_plan
from pipeline.records import ShardResult, ShardState
from pipeline.shard_patterns import expand
from pipeline.urls import public_text

if TYPE_CHECKING:
    from jobs.tokenize_actor import Source

log = logging.getLogger(__name__)
SAMPLE_IMAGES = 256
SHARDS_TRIED = 3  # for a sample: the first may be damaged


def run_plan(config: TokenizeConfig, command: str, *, as_json: bool, source: Source | None = None) -> int:
    """Print what `dvae tokenize` would do; 0. `command` is the line that does it; `source` stands in for the
    checkpoint's model, in tests. Raises PipelineError or ModelError where that would, before it starts anything."""
    planned = make_planned_run(config, source)
    console = Console(soft_wrap=True, highlight=False)
    if as_json:
        console.print_json(json.dumps(plan_json(planned)))
    else:
        for line in plan_lines(planned, command):
            console.print(line)
    return 0


def make_planned_run(config: TokenizeConfig, source: Source | None = None) -> PlannedRun:
    run = TokenizeRun.of(config)
    check_run(run.output, run.description(), accept_numerics=config.accept_numerics)
    with collector_paused():
        ledger = _ReadOnce(run.output)
        plan = make_plan(expand(config.shards), run.output, ledger, run.table)
    log.info("plan: %s", plan.describe())
    lost = frozenset(url for url, row in ledger.read().items() if row.state is ShardState.QUARANTINED)
    planned = PlannedRun(run, plan, lost, is_held(run.output), _machine(config))
    return _estimated(planned, source or run.source) if plan.todo else planned


class _ReadOnce(Ledger):
    """Whoever takes rows out of what it gave, has them in the next answer again."""

    _rows: dict[str, ShardResult] | None = None

    def read(self) -> dict[str, ShardResult]:
        self._rows = super().read() if self._rows is None else self._rows
        return dict(self._rows)


def _machine(config: TokenizeConfig) -> Machine:
    """What the run would have. Raises ClusterError when a cluster is named and cannot be asked."""
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    if not address or address == "local":
        return this_machine(with_gpus=config.device == "cuda")
    from jobs.cluster import cluster_resources, connected

    with connected(address):
        there = cluster_resources()
    return Machine(f"the cluster at {address}", there.get("CPU", 0), there.get("GPU", 0))


def _estimated(planned: PlannedRun, source: Source) -> PlannedRun:
    run, machine = planned.run, planned.machine
    on_gpu = run.config.device == "cuda"
    if on_gpu and not this_machine(with_gpus=True).gpus:
        return replace(planned, note="no sample, no estimate: the run encodes on GPUs, and this machine has none")
    sample, problem = _sample(run, planned.plan.todo, source)
    if sample is None:
        return replace(planned, note=f"no sample, no estimate: {problem}")
    num_actors = actors_on(machine, run.config.ray, len(planned.plan.todo))
    elsewhere = "" if machine.name == THIS else "the sample is of this machine: the cluster's may be faster or slower"
    return replace(
        planned,
        sample=sample,
        speed=speed(sample.stages.cpu, sample.stages.wall, machine, num_actors, on_gpu=on_gpu),
        amount=_amount(planned.plan, sample.stages),
        note=elsewhere,
    )


def _sample(run: TokenizeRun, todo: Sequence[ShardTask], source: Source) -> tuple[Sample | None, str]:
    """Of the first shard that can be read, and what was wrong with the last that couldn't."""
    problem = ""
    with tempfile.TemporaryDirectory() as folder, JobProgress("sample", 5) as progress:
        progress.advance(0, "loading the model")
        tokenizer, job = source.load(), replace(run.job(1), output=OutputPrefix(folder))
        for task in todo[:SHARDS_TRIED]:
            spec = ImageSpec.from_json(run.table.image_spec)
            try:
                stages = measure_stages(
                    [task.shard], spec, tokenizer, job, SAMPLE_IMAGES, lambda stage: progress.advance(1, stage)
                )
            except (ShardError, NothingToMeasure) as error:
                problem = public_text(str(error))
            else:
                return Sample(task.shard.url, stages), ""
    return None, problem


def _amount(plan: Plan, stages: StageSample) -> Amount:
    """By the parts that are there; by the sample where there is none."""
    rows, failed = sum(row.num_rows for row in plan.done), sum(row.num_failed for row in plan.done)
    a_row = sum(row.part_bytes for row in plan.done) / rows if rows else stages.part_bytes
    an_image = sum(row.size_bytes for row in plan.done) / (rows + failed) if rows else stages.shard_bytes
    return amount(sum(task.shard.size_bytes for task in plan.todo), an_image, a_row)
