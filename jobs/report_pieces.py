"""Pieces that several report pages have: how codes are used, and how the tokens are read."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from jobs.report_charts import bar_chart
from jobs.report_page import Chart, Snippet
from pipeline import storage

# K codes, G neighbours in the order of their use

MOST_BARS = 256
READING_NOTE = (
    "Each row of the token table is one image: its key, its caption, its tokens row by row, and where its bytes lie in "
    "the shard. Any engine that knows Parquet reads the folder as one table."
)


def code_use_chart(uses_K: NDArray[np.int64], of_what: str) -> Chart:
    """A bar for each code, the most used first; of many codes one for each few, as high as their mean."""
    order_K = np.argsort(-uses_K, kind="stable")
    groups = np.array_split(order_K, min(MOST_BARS, len(order_K)))
    svg = bar_chart(
        [float(uses_K[codes].mean()) for codes in groups],
        [_title(codes, uses_K) for codes in groups],
        x_label="codes, the most used first",
        y_label="uses",
        x_to=len(uses_K),
    )
    used = int((uses_K > 0).sum())
    caption = f"How often each of the {len(uses_K):,} codes is used {of_what}; {used:,} are used at least once."
    if len(groups) < len(uses_K):
        caption += f" Each bar is the mean of {len(groups[0])} codes."
    return Chart(svg, f"{caption} Code {order_K[0]} is used most: {uses_K[order_K[0]]:,} times.")


def _title(codes: NDArray[np.intp], uses_K: NDArray[np.int64]) -> str:
    if len(codes) == 1:
        return f"token {codes[0]}: {uses_K[codes[0]]:,} times"
    return f"{len(codes)} codes, as token {codes[0]}: {uses_K[codes].mean():,.0f} times each"


def reading_lines(output: str, columns: str = "key, caption, tokens") -> tuple[Snippet, ...]:
    """How a person reads the tokens: a line for each library, to be pasted as it is."""
    files = f"{output}/tokens/*.parquet"
    query, head = f"SELECT {columns} FROM '{files}' LIMIT 5", "head(5)"
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
