"""The demo's page: what was measured, put into words, charts and tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.contact_sheet import psnr_db
from jobs.demo_checks import HeldOut, code_uses
from jobs.demo_queries import CAPTIONS, ERRORS, MOST_USED, Answer, ask
from jobs.report_charts import Series, bar_chart, line_chart
from jobs.report_page import Chart, Check, Figure, Report, Snippet, Table, TilePair
from jobs.show import Row
from pipeline import storage
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
        tiles_note=(
            "From parts of the photographs that training never saw. Left the tile, right what the decoder makes of its "
            f"tokens alone. Over all {len(results.held_out.rows)} held-out tiles: {results.held_out.psnr_db:.1f} dB; "
            f"a thumbnail of {run['grid'][0]} × {run['grid'][1]} plain pixels, enlarged, reaches "
            f"{results.held_out.thumbnail_psnr_db:.1f} dB with "
            f"{24 / math.log2(run['codebook_size']):.1f} times the bits."
        ),
        charts=(_training_chart(results.evaluations, results.held_out), _code_chart(results)),
        tables=tuple(_table(title, note, ask(results.output, query)) for title, query, note in QUERIES),
        snippets=(*reading_lines(results.output), back_into_pictures(results.output, results.training)),
        reading_note=(
            "Each row of the token table is one image: its key, its caption, its tokens row by row, and where its "
            "bytes lie in the shard. Any engine that knows Parquet reads the folder as one table."
        ),
    )


def reading_lines(output: str) -> tuple[Snippet, ...]:
    """How a person reads the tokens: a line for each library, to be pasted as it is."""
    files = f"{output}/tokens/*.parquet"
    query, head = f"SELECT key, caption, tokens FROM '{files}' LIMIT 5", "head(5)"
    store = "" if storage.is_local(output) else 'import fsspec; duckdb.register_filesystem(fsspec.filesystem("s3")); '
    return (
        Snippet("DuckDB", f'import duckdb; {store}print(duckdb.sql("{query}"))'),
        Snippet(
            "Polars", f'import polars; print(polars.scan_parquet("{files}").select("key", "tokens").{head}.collect())'
        ),
        Snippet("Python", f'import pyarrow.dataset; print(pyarrow.dataset.dataset("{output}/tokens").{head})'),
    )


def back_into_pictures(output: str, training: str) -> Snippet:
    return Snippet(
        "From tokens back to pixels",
        "import pyarrow.dataset\n"
        "from jobs.api import load_tokenizer\n"
        f'rows = pyarrow.dataset.dataset("{output}/tokens").head(5)\n'
        f'pixels_BHWC = load_tokenizer("{training}").decode(rows["tokens"].to_pylist())',
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


def _code_chart(results: Results) -> Chart:
    uses_K = code_uses(results.rows, results.run["codebook_size"])
    order = np.argsort(-uses_K, kind="stable")
    svg = bar_chart(
        [float(uses_K[k]) for k in order],
        [f"token {k}: {uses_K[k]:,} times" for k in order],
        x_label="codes, the most used first",
        y_label="uses",
    )
    used = int((uses_K > 0).sum())
    return Chart(
        svg, f"How often each of the {len(uses_K)} codes is used over all tiles; {used} are used at least once."
    )


def _table(title: str, note: str, answer: Answer) -> Table:
    numbers = frozenset(
        n for n in range(len(answer.columns)) if answer.rows and isinstance(answer.rows[0][n], int | float)
    )
    rows = tuple(tuple(f"{cell:,}" if isinstance(cell, int) else cell for cell in row) for row in answer.rows)
    return Table(title, answer.columns, rows, note=note, sql=answer.sql, numbers=numbers)
