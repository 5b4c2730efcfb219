"""`dvae demo`: photographs -> tiles -> shards -> training -> tokens -> queries, pictures and a page that checks itself.

Everything lands in one folder; running it again goes on where it stopped. demo_sites.py says where the data lies and
the jobs run.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as ConsoleTable

from jobs import demo_images
from jobs.contact_sheet import contact_sheet_png
from jobs.demo_checks import check_all, look_at_held_out, read_rows
from jobs.demo_damage import ODD_FILES, make_odd_files
from jobs.demo_images import make_tiles
from jobs.demo_queries import ask
from jobs.demo_report import QUERIES, Results, make_report, shown_rows
from jobs.demo_sites import Here, OnCluster, Site, local_cluster
from jobs.report_page import Check, render
from jobs.report_pieces import reading_lines
from jobs.show import load_matching_tokenizer
from jobs.train_output import TrainOutput
from pipeline import storage
from pipeline.errors import PipelineError
from pipeline.output import OutputPrefix, listed, read_run
from pipeline.pack import PackSummary, pack

SHARD_SAMPLES = 400


class DemoError(PipelineError):
    """The demo's folder is something else's, or the demo is not run from a checkout."""


@dataclass(frozen=True)
class DemoFolder:
    """Where everything lies, as the user would type it."""

    path: Path

    def at(self, *names: str) -> str:
        return str(self.path.joinpath(*names))

    def read_json(self, name: str) -> dict[str, Any] | None:
        """None also for a file that is not one of ours."""
        try:
            found = json.loads((self.path / name).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        storage.publish(self.at(name), json.dumps(value, indent=2).encode())


class Clock:
    """Seconds of each part of the demo. A part that found its work done keeps the time that the work took."""

    def __init__(self, folder: DemoFolder, console: Console) -> None:
        self._folder, self._console = folder, console
        self._kept = folder.read_json("times.json") or {}
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str, title: str, *, done: bool = False) -> Iterator[None]:
        self._console.print(f"\n[bold]{title}[/]" + (" [dim](reusing what is there)[/]" if done else ""))
        started = time.monotonic()
        yield
        measured = time.monotonic() - started
        self.seconds[name] = self._kept.get(name, measured) if done else measured
        self._folder.write_json("times.json", {**self._kept, **self.seconds})


def run_demo(folder: str, *, on_cluster: bool = False) -> int:
    """The whole journey. Exit code 0: all checks passed; 1: one failed, or a job was incomplete; 130: stopped."""
    console = Console(soft_wrap=True, highlight=False)
    place = open_folder(folder, on_cluster=on_cluster)
    again = shlex.join(["dvae", "demo", *(["--cluster"] if on_cluster else []), "--dir", folder])
    if not on_cluster:
        return journey(place, Here(str(place.path), again), console)
    with local_cluster(place.path / "cluster") as site:
        console.print(f"an S3 server with the bucket {site.root}, and Ray at {site.dashboard}")
        code = journey(place, site, console)
        _leave_open(site, console)
    return code


def _leave_open(site: OnCluster, console: Console) -> None:
    """Somebody who sits there may look into the bucket before it goes."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        console.print("\n[bold]The servers run until you press Enter.[/] In another terminal:")
        console.print("  export " + " ".join(f"{name}={value}" for name, value in site.client.items()), markup=False)
        with suppress(EOFError):
            input()


def journey(place: DemoFolder, site: Site, console: Console) -> int:
    clock = Clock(place, console)
    with clock.part("tiles", "1. Photographs into tiles", done=(place.path / "images.json").exists()):
        console.print(make_images(place))
    done = storage.exists(storage.join(site.shards, "damaged.pack.json"))
    with clock.part("packing", "2. Tiles into WebDataset shards", done=done):
        packed = [pack_images(place, site, split, console) for split in ("train", "heldout", "damaged")]
    done = storage.exists(storage.join(site.training, "model", "checkpoint.json"))
    with clock.part("training", "3. Training on Ray", done=done):
        code = site.train()
    if code:
        return code
    done = storage.exists(storage.join(site.tokenised, "manifest.json"))
    with clock.part("tokenising", "4. Tokenising through Ray actors", done=done):
        code = site.tokenize()
    if code:
        return code
    with clock.part("looking", "5. Looking at the result"):
        results = look(site, sum(one.num_images for one in packed), clock)
    return conclude(place, site, results, console)


def open_folder(folder: str, *, on_cluster: bool = False) -> DemoFolder:
    """Claim the folder, or go on with a demo's. Raises DemoError when it holds something else."""
    if set(folder) & set("*?[]{}"):
        raise DemoError(f"--dir {folder!r} would be read as a pattern; name a folder without any of * ? [ ] {{ }}")
    place = DemoFolder(Path(folder))
    kind = "dvae demo --cluster" if on_cluster else "dvae demo"
    made_of = {"kind": kind, "tiles": _recipe(), "at": str(place.path.resolve())}  # tokens name their shards
    if place.path.exists() and (not place.path.is_dir() or any(place.path.iterdir())):
        found = place.read_json("demo.json") if place.path.is_dir() else None
        if found is None:
            raise DemoError(f"{folder} is there and is no demo's; name another folder with --dir")
        if found != made_of:
            raise DemoError(f"{folder} is of another version or kind of demo, or was moved; remove it or name another")
    place.write_json("demo.json", made_of)
    return place


def _recipe() -> str:
    """What the tiles depend on."""
    parts = (demo_images.PHOTOS, demo_images.TILE_PX, demo_images.STRIDE_PX, demo_images.MARGIN_PX)
    names = [odd.name for odd in ODD_FILES]
    return hashlib.sha256(repr((parts, names)).encode()).hexdigest()[:16]


def make_images(place: DemoFolder) -> str:
    """Tiles and odd files, unless all are there; what there is, in words."""
    counts = place.read_json("images.json")
    if counts is None:
        tiles = make_tiles(place.path / "images")
        counts = {"train": tiles.train, "heldout": tiles.heldout}
        counts["damaged"] = make_odd_files(place.path / "images" / "damaged")
        place.write_json("images.json", counts)  # last: it says that all are there
    return (
        f"{counts['train']:,} tiles to train on, {counts['heldout']:,} held out, {counts['damaged']} odd or damaged "
        f"files in {place.at('images')}"
    )


def pack_images(place: DemoFolder, site: Site, split: str, console: Console) -> PackSummary:
    summary = pack(place.path / "images" / split, site.shards, shard_samples=SHARD_SAMPLES, prefix=split)
    reused = f", {summary.num_reused} of them there already" if summary.num_reused else ""
    shards = f"{len(summary.shard_urls)} shards{reused}, {summary.packed_bytes / 1e6:.1f} MB"
    console.print(f"{split}: {summary.num_images:,} images in {shards}")
    return summary


def look(site: Site, num_packed: int, clock: Clock) -> Results:
    """Measure the held-out tiles from their stored tokens, and check every claim."""
    output = OutputPrefix(storage.normalize(site.tokenised))
    run = read_run(output) or {}
    decoder = load_matching_tokenizer(run, site.training, output.url)
    rows = read_rows(output)
    held_out = look_at_held_out(output, run, rows, decoder)
    metrics = TrainOutput(storage.normalize(site.training)).read_metrics()
    evaluations = tuple(line for line in metrics if line["kind"] == "eval")
    return Results(
        output=site.tokenised,
        training=site.training,
        run=run,
        rows=tuple(rows),
        held_out=held_out,
        checks=check_all(output, run, num_packed, rows, held_out, evaluations[-1]),
        evaluations=evaluations,
        num_packed=num_packed,
        token_bytes=sum(info.size_bytes for info in listed(output.tokens_folder()).values()),
        seconds=clock.seconds,
    )


def conclude(place: DemoFolder, site: Site, results: Results, console: Console) -> int:
    """Write the pictures and the page, print tables, checks, and how to go on."""
    storage.publish(place.at("heldout.png"), _sheet(results))
    storage.publish(place.at("report.html"), render(make_report(results)).encode())
    for title, query, _ in QUERIES:
        _print_answer(console, title, results.output, query)
    _print_checks(console, results.checks)
    _print_what_is_where(console, place, site, results)
    return 0 if all(check.passed for check in results.checks) else 1


def _sheet(results: Results) -> bytes:
    held_out, places = results.held_out, shown_rows(results.held_out)
    grid = results.run["grid"]
    return contact_sheet_png(
        {"original": held_out.original_BHWC[places], "from tokens": held_out.decoded_BHWC[places]},
        [held_out.rows[n]["caption"] for n in places],
        title=f"Held-out tiles: {grid[0]}x{grid[1]} tokens each, of {results.run['codebook_size']} codes · "
        f"{held_out.psnr_db:.1f} dB over all {len(held_out.rows)}",
    )


def _print_answer(console: Console, title: str, output: str, query: str) -> None:
    answer = ask(output, query)
    console.print(f"\n[bold]{escape(title)}[/]")
    console.print(answer.sql, style="dim", markup=False)
    table = ConsoleTable(*answer.columns)
    for row in answer.rows:
        table.add_row(*(escape(f"{cell:,}" if isinstance(cell, int) else str(cell)) for cell in row))
    console.print(table)


def _print_checks(console: Console, checks: tuple[Check, ...]) -> None:
    console.print("\n[bold]Checks[/]")
    for check in checks:
        colour = "green" if check.passed else "red"
        console.print(f"[{colour}]{check.verdict}[/]  {escape(check.claim)}: {escape(check.found)}")


def _print_what_is_where(console: Console, place: DemoFolder, site: Site, results: Results) -> None:
    console.print("\n[bold]What was made[/]")
    for where, what in (
        (place.at("report.html"), "the page: open it in a browser"),
        (place.at("heldout.png"), "held-out tiles, original and from tokens"),
        (site.shards, "the packed images"),
        (site.training, "checkpoints, metrics, pictures and the model"),
        (site.tokenised, "tokens/ and errors/ as Parquet, and what the run promised"),
    ):
        console.print(f"  {escape(where)}: {what}")
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in results.seconds.items())
    console.print(f"  {spent}; {sum(results.seconds.values()):.0f} s in all")
    console.print("\n[bold]Read the tokens[/]")
    for line in reading_lines(results.output):
        console.print(f"  {line.name}: {line.code}", markup=False)
