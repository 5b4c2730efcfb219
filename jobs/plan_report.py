"""What `dvae tokenize --plan` found, and how that is told. tokenize_plan.py finds it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.markup import escape

from jobs.estimate import ENGINE_SHARE, Amount, Speed
from jobs.machine import Machine
from jobs.stage_costs import StageCosts, StageSample
from jobs.tokenize_run import TokenizeRun
from jobs.wording import about, duration, rate, size
from pipeline.plan import Plan, ShardTask
from pipeline.records import ShardResult
from pipeline.urls import base_name, public_url

SHOWN = 3  # of the first and of the last shards


@dataclass(frozen=True)
class Sample:
    """A measured piece of one shard."""

    shard: str
    stages: StageSample


@dataclass(frozen=True)
class PlannedRun:
    """`lost`: shards that an earlier run quarantined. `sample`, `speed` and `amount` are there where there is something
    to do and it could be measured; `note` says why not, or what to bear in mind."""

    run: TokenizeRun
    plan: Plan
    lost: frozenset[str]
    is_held: bool
    machine: Machine
    sample: Sample | None = None
    speed: Speed | None = None
    amount: Amount | None = None
    note: str = ""

    @property
    def left_s(self) -> float | None:
        """Seconds of work, its start left out."""
        return self.amount.num_images / self.speed.images_per_s if self.amount and self.speed else None

    def is_lost(self, task: ShardTask) -> bool:
        return public_url(task.shard.url) in self.lost


def plan_json(planned: PlannedRun) -> dict[str, Any]:
    """All shards by name, and every figure."""
    plan, sample = planned.plan, planned.sample
    return {
        "output": public_url(planned.run.output.url),
        "tokenizer_id": planned.run.table.tokenizer_id,
        "driver_at_work": planned.is_held,
        "num_shards": plan.num_shards,
        "todo_by_reason": {str(why): count for why, count in plan.todo_by_reason.items()},
        "todo": [_task_json(planned, task) for task in plan.todo],
        "done": [row.shard for row in plan.done],
        "removed": [row.shard for row in plan.removed],
        "machine": asdict(planned.machine),
        "sample": _sample_json(sample) if sample else None,
        "speed": {**asdict(planned.speed), "images_per_s": planned.speed.images_per_s} if planned.speed else None,
        "amount": asdict(planned.amount) if planned.amount else None,
        "left_s": planned.left_s,
        "note": planned.note,
    }


def _task_json(planned: PlannedRun, task: ShardTask) -> dict[str, Any]:
    shard = task.shard
    return {"shard": public_url(shard.url), "size_bytes": shard.size_bytes, "tried_again": planned.is_lost(task)}


def _sample_json(sample: Sample) -> dict[str, Any]:
    stages = sample.stages
    return {
        "shard": public_url(sample.shard),
        "num_images": stages.cpu.num_images,
        "num_failed": stages.num_failed,
        "cpu_s": asdict(stages.cpu),
        "wall_s": asdict(stages.wall),
        "image_bytes": stages.image_bytes,
        "shard_bytes": stages.shard_bytes,
        "part_bytes": stages.part_bytes,
    }


def plan_lines(planned: PlannedRun, command: str) -> Iterator[str]:
    """With rich's markup."""
    for name, text in _lines(planned):
        yield f"{name:<12}{escape(text)}"
    if not planned.plan.todo:
        yield "[green]nothing to do[/]"
    yield "nothing was started and nothing written; to start:"
    yield f"  {escape(command)}"


def _lines(planned: PlannedRun) -> Iterator[tuple[str, str]]:
    plan, table = planned.plan, planned.run.table
    height, width = table.grid
    yield "run", public_url(planned.run.output.url) + (" (a driver is at work there)" if planned.is_held else "")
    yield "tokenizer", f"{table.tokenizer_id} · {height}x{width} tokens of {table.codebook_size:,} codes"
    yield "plan", plan.describe()
    yield from _named("to do", [_task_text(planned, task) for task in plan.todo])
    yield from _named("done", [base_name(row.shard) for row in plan.done])
    yield from _named("removed", [_removed_text(row) for row in plan.removed])
    if planned.sample:
        yield from _sample_lines(planned, planned.sample)
    if planned.amount and planned.speed:
        yield from _estimate_lines(planned, planned.amount, planned.speed)
    if planned.note:
        yield "note", planned.note


def _named(what: str, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The first few and the last few."""
    if len(names) <= 2 * SHOWN + 1:
        shown = list(names)
    else:
        shown = [*names[:SHOWN], f"… {len(names) - 2 * SHOWN:,} more (--json lists all)", *names[-SHOWN:]]
    yield from ((what if not n else "", text) for n, text in enumerate(shown))


def _task_text(planned: PlannedRun, task: ShardTask) -> str:
    again = ", quarantined before: tried again" if planned.is_lost(task) else ""
    return f"{base_name(public_url(task.shard.url))}  {size(task.shard.size_bytes)}{again}"


def _removed_text(row: ShardResult) -> str:
    return f"{base_name(row.shard)}  {row.num_rows:,} images, no longer in the input (--prune drops them)"


def _sample_lines(planned: PlannedRun, sample: Sample) -> Iterator[tuple[str, str]]:
    numerics, stages = planned.run.source.numerics(), sample.stages
    failed = f", {stages.num_failed:,} of them bad" if stages.num_failed else ""
    how = f"{numerics['device']}, {numerics['precision']}, batch {numerics['batch_size']}"
    yield "sample", f"{stages.cpu.num_images:,} images of {base_name(public_url(sample.shard))}{failed} ({how})"
    yield "", "ms an image on one thread: " + costs_text(stages.wall) + " (to a local folder)"


def costs_text(costs: StageCosts) -> str:
    named = {"read": costs.read_s, "decode": costs.decode_s, "encode": costs.encode_s, "write": costs.write_s}
    return ", ".join(f"{name} {1000 * seconds:.3g}" for name, seconds in named.items())


def _estimate_lines(planned: PlannedRun, left: Amount, speed: Speed) -> Iterator[tuple[str, str]]:
    machine = planned.machine
    what = "cores" if speed.limit == "cores" else "encoders"
    gpus = f", {machine.gpus:g} GPUs" if machine.gpus else ""
    actors = f"{speed.num_actors:,} {'actor' if speed.num_actors == 1 else 'actors'}"
    yield "speed", f"about {rate(speed.images_per_s)} images/s, {ENGINE_SHARE:.0%} of what the {what} could do"
    yield "with", f"{actors} on {machine.name} ({machine.cpus:g} CPUs{gpus})"
    time_left = f": {duration(planned.left_s)}" if planned.left_s is not None else ""
    yield "left", f"about {about(left.num_images)} images in {size(left.shard_bytes)} of shards{time_left}"
    a_row = left.part_bytes / max(1.0, left.num_images)
    yield "output", f"about {size(left.part_bytes)} more, {a_row:,.0f} bytes an image"
