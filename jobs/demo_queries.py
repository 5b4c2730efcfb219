"""What the demo asks of its own Parquet files, in plain SQL, with DuckDB."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.errors import PipelineError

MOST_USED = """\
SELECT token, count(*) AS uses, count(DISTINCT key) AS images
FROM (SELECT key, unnest(tokens) AS token FROM {tokens})
GROUP BY token ORDER BY uses DESC, token LIMIT 10"""

CAPTIONS = """\
SELECT split_part(caption, ':', 1) AS caption, count(DISTINCT key) AS images,
       count(DISTINCT key) FILTER (split = 'heldout') AS held_out, count(DISTINCT token) AS distinct_tokens
FROM (SELECT *, unnest(tokens) AS token FROM {tokens})
GROUP BY 1 ORDER BY distinct_tokens DESC, 1"""

ERRORS = """\
SELECT reason, count(*) AS files, string_agg(key, ', ' ORDER BY key) AS keys, min(message) AS message
FROM {errors} GROUP BY reason ORDER BY files DESC, reason"""

TOTALS = """\
SELECT (SELECT count(*) FROM {tokens}) AS rows, (SELECT count(*) FROM {errors}) AS errors,
       min(len(tokens)) AS shortest, max(len(tokens)) AS longest,
       min(list_min(tokens)) AS lowest, max(list_max(tokens)) AS highest
FROM {tokens}"""


@dataclass(frozen=True)
class Answer:
    sql: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


def ask(output: str, query: str) -> Answer:
    """The answer to one of the queries above for the run at `output`, and the SQL as a person would type it."""
    try:
        import duckdb
    except ImportError as error:
        raise PipelineError("the demo's queries need DuckDB: pip install 'dvae-ray[demo]'") from error
    sql = query.format(tokens=_files(output, "tokens"), errors=_files(output, "errors"))
    with duckdb.connect() as connection:
        if not storage.is_local(output):
            connection.register_filesystem(storage.filesystem(output)[0])
        result = connection.execute(sql)
        columns = tuple(str(column[0]) for column in result.description or ())
        return Answer(sql, columns, tuple(tuple(row) for row in result.fetchall()))


def _files(output: str, folder: str) -> str:
    return "'" + f"{output}/{folder}/*.parquet".replace("'", "''") + "'"
