"""`dvae report`: one HTML page about a run, for people who would rather look. What it says is run_page.py's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from jobs.contact_sheet import psnr_db
from jobs.progress import JobProgress
from jobs.report_lineage import lineage
from jobs.report_pace import Pace, pace
from jobs.report_page import TilePair, render
from jobs.run_page import RunFacts, make_page
from jobs.show import Decoder, Original, Originals, load_matching_tokenizer
from jobs.stats import read_stats
from jobs.status import read_status
from jobs.writable import require_file_place
from pipeline import storage
from pipeline.errors import StorageError
from pipeline.failures import plain_text
from pipeline.pictures import draw_pair, encode_png, shrunk_to
from pipeline.plan import PlanRecord, read_plan_record
from pipeline.token_run import TokenRun

# B images, H W token rows and columns, C colours

Row = dict[str, Any]
TILE_SIDE = 256  # pixels at most: the page holds them all


@dataclass(frozen=True)
class Tiles:
    """Pictures of some rows, and why others have none."""

    tiles: tuple[TilePair, ...]
    problems: tuple[str, ...]


def run_report(
    output_url: str, checkpoint: str | None, html: str, *, num_images: int = 12, ray_address: str | None = None
) -> int:
    """Write the page to `html`, any URL. 0, or 1 where a file of the run could not be read. Raises NoRun, RunMismatch
    (also where `checkpoint` did not make these tokens), StorageError."""
    require_file_place(html)
    run = TokenRun.open(output_url)
    decoder = None if checkpoint is None else load_matching_tokenizer(dict(run.description), checkpoint, run.output.url)
    stats = read_stats(run, ray_address=ray_address)
    tiles = look_at(run, decoder, num_images)
    plan = read_plan_record(run.output)
    model = checkpoint or (plan.settings.get("checkpoint") if plan else None)
    facts = RunFacts(
        stats=stats,
        status=read_status(run.output),
        pace=_pace(run),
        tiles=tiles.tiles,
        tile_problems=tiles.problems,
        lineage=tuple(lineage(run.description, plan, model)),
        columns=tuple(column.name for column in run.table.columns),
        checkpoint=storage.public_url(model) if model else None,
        max_failed_samples=_allowed(plan),
    )
    page = render(make_page(facts)).encode()
    storage.publish(storage.normalize(html), page)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{storage.normalize(html)}: {stats.num_images:,} images, {len(page) / 1e6:.1f} MB", markup=False)
    return 1 if stats.num_lost else 0


def _allowed(plan: PlanRecord | None) -> float | None:
    allowed = plan.settings.get("max_failed_samples") if plan else None
    return float(allowed) if isinstance(allowed, int | float) else None


def _pace(run: TokenRun) -> Pace | None:
    rows = {part.name: part.num_rows for part in run.parts}
    return pace(rows, storage.written_at(run.output.tokens_folder()))


def look_at(run: TokenRun, decoder: Decoder | None, number: int) -> Tiles:
    """Rows from all over the run, each original beside what its tokens say; the original alone without a decoder."""
    rows, problems = _rows_all_over(run, number)
    originals = Originals(run.output, dict(run.description))
    found: list[Original] = []
    with JobProgress("pictures", len(rows)) as progress:
        for row in rows:
            found.append(originals.of(row))
            progress.advance(1, "fetched and decoded")
    decoded = _decoded(rows, run, decoder)
    tiles = (_tile(row, one, back) for row, one, back in zip(rows, found, decoded, strict=True))
    problems += [one.problem for one in found if one.problem]
    return Tiles(tuple(tile for tile in tiles if tile is not None), tuple(dict.fromkeys(problems)))


def _rows_all_over(run: TokenRun, number: int) -> tuple[list[Row], list[str]]:
    """The rows in the middle of `number` equal stretches of the run, all columns, and why some cannot be read."""
    rows: list[Row] = []
    problems: list[str] = []
    ends = list(accumulate(part.num_rows for part in run.parts))
    for place in _middles(run.num_rows, number):
        part_number = int(np.searchsorted(ends, place, side="right"))
        part = run.parts[part_number]
        start = place - (ends[part_number] - part.num_rows)
        try:
            rows += run.read_rows(part, start, start + 1).to_pylist()
        except StorageError as error:
            problems.append(str(error))
    return rows, problems


def _middles(total: int, number: int) -> list[int]:
    number = min(total, number)
    return [total * (2 * n + 1) // (2 * number) for n in range(number)]


def _decoded(rows: list[Row], run: TokenRun, decoder: Decoder | None) -> Iterator[NDArray[np.uint8] | None]:
    if decoder is None or not rows:
        return iter([None] * len(rows))
    return iter(decoder.decode(np.array([row["tokens"] for row in rows]).reshape(-1, *run.table.grid)))


def _tile(row: Row, original: Original, decoded: NDArray[np.uint8] | None) -> TilePair | None:
    one = original.pixels_HWC
    pictures = [picture for picture in (one, decoded) if picture is not None]
    if not pictures:
        return None
    both = one is not None and decoded is not None
    note = f"{psnr_db(pictures[0], pictures[1]):.1f} dB" if both else "" if decoded is None else "from tokens alone"
    caption = plain_text(str(row.get("caption") or row["key"])) or ""
    small = [shrunk_to(picture, TILE_SIDE) for picture in pictures]
    return TilePair(encode_png(draw_pair(*small) if both else small[0]), _short(caption), note)


def _short(caption: str, characters: int = 80) -> str:
    return caption if len(caption) <= characters else caption[: characters - 1] + "…"
