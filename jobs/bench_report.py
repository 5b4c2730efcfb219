"""What `dvae bench` found, as JSON and as tables. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from jobs.bench_advice import advice
from jobs.bench_figures import DECODE, ENCODE, NO_RAY, RAY, TITLES, Figures
from jobs.wording import rate, size

STAGES = ("read", "decode", "encode", "write")


def bench_json(figures: Figures) -> dict[str, Any]:
    """All that was measured (seconds, bytes, images a second), what follows from it, and the advice."""
    return {
        **asdict(figures),
        "images_per_s": {
            name: {"median": rates.median, "min": rates.low, "max": rates.high, "share_of_ideal": figures.share(name)}
            for name, rates in figures.rates.items()
        },
        "ideal_images_per_s": figures.ideal,
        "cores_images_per_s": figures.cores_rate,
        "ray_to_no_ray": figures.ray_share,
        "encoder_busy": figures.times.encoder_busy,
        "advice": advice(figures),
    }


def print_bench(figures: Figures, console: Console) -> None:
    for line in _heading(figures):
        console.print(line)
    tables = [_stage_table(figures), _rate_table(figures)]
    for table in [*tables, _sweep_table(figures)] if figures.sweep else tables:
        console.print()
        console.print(table)
    console.print()
    for line in [*_startup(figures), "", "[bold]advice[/]"]:
        console.print(line)
    for text in advice(figures):
        console.print(Padding(text, (0, 0, 0, 2)))


def _heading(figures: Figures) -> Iterator[str]:
    setting = figures.setting
    gpus = f", {setting.gpus:g} GPUs" if setting.gpus else ""
    encoder = "a free encoder" if setting.is_free else f"tokenizer {setting.encoder}"
    bad = f", {figures.num_failed:,} of them bad" if figures.num_failed else ""
    yield f"[bold]{setting.cores} cores{gpus}[/] · {encoder}"
    compiled = ", compiled" if setting.compiled else ""
    yield f"encoding on {setting.device}, {setting.precision}{compiled}, batch {setting.batch_size}"
    in_tasks = " a task" if setting.decodes_in_tasks else ""
    threads = f"{_count(setting.decode_threads, 'decode thread')}{in_tasks}, {_count(setting.threads, 'torch thread')}"
    in_flight = f"{_count(setting.shards_in_flight, 'shard')} in flight"
    yield f"{_count(setting.num_actors, 'actor')}, each with {in_flight}, {threads}"
    measured = (
        f"{figures.num_images:,} images of {size(figures.image_bytes)}{bad}, {figures.num_round_images:,} in a round"
    )
    yield f"{measured}; {setting.image_size} px; {figures.part_bytes:,.0f} bytes a row"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for number, column in enumerate((f"[bold]{title}[/]", *columns)):
        table.add_column(column, justify="right" if number else "left", header_style="")
    return table


def _stage_table(figures: Figures) -> Table:
    """Each stage alone, beside what the shards of the run with Ray wait for."""
    table = _table("each stage alone", "CPU ms/image", "share", "clock ms/image", "in the run")
    times = figures.times
    spent = dict(zip(STAGES, (times.read_s, times.pixels_s, times.encode_s, times.write_s), strict=True))
    all_s = sum(spent.values()) or 1.0
    for stage in STAGES:
        cpu, wall = (getattr(costs, f"{stage}_s") for costs in (figures.cpu, figures.wall))
        share, in_run = cpu / figures.cpu.total_s, spent[stage] / all_s
        table.add_row(stage, f"{1000 * cpu:.3f}", f"{share:.0%}", f"{1000 * wall:.3f}", f"{in_run:.0%}")
    table.add_row("all", f"{1000 * figures.cpu.total_s:.3f}", "100%", f"{1000 * figures.wall.total_s:.3f}", "100%")
    return table


def _rate_table(figures: Figures) -> Table:
    table = _table("images a second", "median", "least", "most", "of the ideal")
    for name in (DECODE, ENCODE, NO_RAY, RAY):
        rates = figures.rates[name]
        table.add_row(TITLES[name], rate(rates.median), rate(rates.low), rate(rates.high), _share(figures, name))
    table.add_row("the ideal", rate(figures.ideal), "", "", "100%")
    return table


def _share(figures: Figures, name: str) -> str:
    return "–" if name == ENCODE and figures.setting.is_free else f"{figures.share(name):.0%}"


def _sweep_table(figures: Figures) -> Table:
    table = _table("batch size", "one encoder, images/s", "pixels of a batch")
    for one in figures.sweep:
        now = " (now)" if one.batch_size == figures.setting.batch_size else ""
        said = "not tried" if one.images_per_s is None else rate(one.images_per_s)
        pixels = size(figures.setting.batch_bytes * one.batch_size / figures.setting.batch_size)
        table.add_row(f"{one.batch_size}{now}", said, pixels)
    return table


def _startup(figures: Figures) -> Iterator[str]:
    startup, busy = figures.startup, figures.times.encoder_busy
    yield f"with Ray: {figures.ray_share:.0%} of the rate without; encoders have work {busy:.0%} of the time"
    yield (
        f"start: Ray up {startup.ray_s:.1f} s, actors loaded {startup.actors_s:.1f} s, "
        f"first batch encoded {startup.first_image_s:.1f} s"
    )
