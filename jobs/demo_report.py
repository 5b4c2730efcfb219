"""The demo's page: what was measured, put into words, charts and tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.contact_sheet import psnr_db
from jobs.demo_checks import HeldOut, code_uses
from jobs.demo_queries import CAPTIONS, ERRORS, MOST_USED, Answer, ask
from jobs.report_charts import Series, line_chart
from jobs.report_page import Chart, Check, Figure, Report, Table, TilePair
from jobs.report_pieces import READING_NOTE, back_into_pictures, code_use_chart, reading_lines
from jobs.show import Row
from pipeline.pictures import draw_pair, encode_png

QUERIES = (
    ("Captions", CAPTIONS, "How many tiles carry which caption, and how many of the codes they use."),
    ("Failures by reason", ERRORS, "Every image that has no tokens is here, with its reason. Nothing else is lost."),
    ("Most used tokens", MOST_USED, "The codes that stand in the most places, and in how many images."),
)


@dataclass(frozen=True)
class Results:
    """All that the page is made of."""

    output: str  # as a person would type it
    training: str
    run: dict[str, Any]
    rows: tuple[Row, ...]
    held_out: HeldOut
    checks: tuple[Check, ...]
    evaluations: tuple[Row, ...]  # of the training, by step
    num_packed: int
    token_bytes: int  # of all parts
    seconds: dict[str, float]  # by part of the demo


def shown_rows(held_out: HeldOut) -> list[int]:
    """Which held-out tiles are shown: of each photograph two, a third and two thirds into its list."""
    chosen: dict[str, list[int]] = {}
    for n, row in enumerate(held_out.rows):
        chosen.setdefault(row["source"], []).append(n)
    return [places[len(places) * part // 3] for _, places in sorted(chosen.items()) for part in (1, 2)]


def make_report(results: Results) -> Report:
    run, total_s = results.run, sum(results.seconds.values())
    image = run["image_spec"]["size"]
    return Report(
        title="A small dVAE, trained and used on this machine",
        subtitle=(
            f"The photographs of scikit-image, cut into tiles of {image} × {image} pixels; a discrete VAE trained on "
            f"most of them; every tile turned into {run['grid'][0]} × {run['grid'][1]} integers and stored as "
            f"Parquet. {_times(results.seconds)}, {total_s:.0f} s in all."
        ),
        figures=tuple(_figures(results)),
        checks=results.checks,
        tiles=tuple(_tiles(results.held_out)),
        tiles_title="Held-out tiles: original, and from tokens",
        tiles_note=(
            "From parts of the photographs that training never saw. Left the tile, right what the decoder makes of its "
            f"tokens alone. Over all {len(results.held_out.rows)} held-out tiles: {results.held_out.psnr_db:.1f} dB; "
            f"a thumbnail of {run['grid'][0]} × {run['grid'][1]} plain pixels, enlarged, reaches "
            f"{results.held_out.thumbnail_psnr_db:.1f} dB with "
            f"{24 / math.log2(run['codebook_size']):.1f} times the bits."
        ),
        charts_title="Training and code use",
        charts=(
            _training_chart(results.evaluations, results.held_out),
            code_use_chart(code_uses(results.rows, run["codebook_size"]), "over all tiles"),
        ),
        tables=tuple(_table(title, note, ask(results.output, query)) for title, query, note in QUERIES),
        snippets=(*reading_lines(results.output), back_into_pictures(results.output, results.training)),
        reading_note=READING_NOTE,
    )


def _times(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {s:.0f} s" for name, s in seconds.items()).capitalize()


def _figures(results: Results) -> Iterable[Figure]:
    held_out, num_rows = results.held_out, len(results.rows)
    yield Figure(f"{results.num_packed:,}", "images packed")
    yield Figure(f"{num_rows:,}", "images tokenised")
    yield Figure(f"{results.num_packed - num_rows:,}", "failed, each with its reason")
    yield Figure(f"{held_out.psnr_db:.1f} dB", "held-out tiles, from their tokens")
    yield Figure(f"{held_out.used_codes} of {results.run['codebook_size']}", "codes used by held-out tiles")
    yield Figure(f"{results.token_bytes / max(1, num_rows):,.0f} B", "of Parquet per image, keys and captions included")


def _tiles(held_out: HeldOut) -> Iterable[TilePair]:
    for n in shown_rows(held_out):
        original, decoded = held_out.original_BHWC[n], held_out.decoded_BHWC[n]
        row = held_out.rows[n]
        yield TilePair(encode_png(draw_pair(original, decoded)), row["caption"], f"{psnr_db(original, decoded):.1f} dB")


def _training_chart(evaluations: Sequence[Row], held_out: HeldOut) -> Chart:
    series = [
        Series(name, tuple((line["step"], line[key]) for line in evaluations))
        for name, key in (("soft", "psnr_soft"), ("argmax", "psnr_hard"))
    ]
    steps = [line["step"] for line in evaluations]
    series.append(Series("thumbnail", tuple((step, held_out.thumbnail_psnr_db) for step in (min(steps), max(steps)))))
    svg = line_chart(series, x_label="training step", y_label="dB")
    return Chart(
        svg,
        "How close held-out tiles come back while training goes on: through the soft relaxation, and through plain "
        "tokens (argmax). The relaxation is sharpened on the way, so that the two meet.",
    )


def _table(title: str, note: str, answer: Answer) -> Table:
    numbers = frozenset(
        n for n in range(len(answer.columns)) if answer.rows and isinstance(answer.rows[0][n], int | float)
    )
    rows = tuple(tuple(f"{cell:,}" if isinstance(cell, int) else cell for cell in row) for row in answer.rows)
    return Table(title, answer.columns, rows, note=note, sql=answer.sql, numbers=numbers)
