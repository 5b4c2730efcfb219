"""A run as a Delta Lake table: its log beside run.json names the parts where they are. The only module that knows
deltalake, which speaks to the store by itself.

The table's folder is the run's, for a log may only name what lies below it. Its log and its removed files are kept for
ever, so that `vacuum`, which removes whatever the log does not name, leaves the run's other files alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.errors import PipelineError, RunMismatch, StorageError
from pipeline.token_run import Part, TokenRun
from pipeline.token_table import token_schema

TRIES = 5
FOR_EVER = "interval 36500 days"
SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "file")


@dataclass(frozen=True)
class Registered:
    """The table's newest version, and what it has that the one before had not. A part that was made anew is in
    `num_added`. `missing`: parts that are not in it, though the run should have them."""

    url: str
    version: int
    num_parts: int
    num_rows: int
    num_added: int
    num_removed: int
    missing: tuple[str, ...] = ()


def register(output_url: str) -> Registered:
    """Make the table, or its next version where parts came, went or were made anew. Raises PipelineError where it
    cannot be, NoRun, RunMismatch where the table is of another run, StorageError."""
    deltalake = _deltalake()
    url, options = _location(storage.normalize(output_url))
    try:
        for _ in range(TRIES):
            is_there = deltalake.DeltaTable.is_deltatable(url, options)
            table = deltalake.DeltaTable(url, storage_options=options) if is_there else None
            run = TokenRun.open(output_url)  # after the table, which is so never newer than the run
            with contextlib.suppress(deltalake.exceptions.CommitFailedError):
                version = _update(deltalake, run, table) if table else _create(deltalake, run, url, options)
                if version is not None:
                    return version
    except (deltalake.exceptions.DeltaError, OSError) as error:
        raise StorageError(f"cannot register {storage.public_url(url)}: {storage.public_text(str(error))}") from error
    raise StorageError(f"{storage.public_url(url)} was registered by others each time: run the same command again")


def _deltalake() -> Any:
    try:
        import deltalake.exceptions
    except ImportError as error:
        raise PipelineError(
            "Delta Lake tables need a package that is not installed: pip install 'dvae-ray[delta]'"
        ) from error
    return deltalake


def _location(url: str) -> tuple[str, dict[str, str]]:
    """The URL as deltalake wants it. It finds credentials and endpoint in the environment, as other clients do, but
    speaks no plain HTTP unless it is told; and of a `%` in a path it makes another path."""
    if "%" in url:
        raise PipelineError(f"{storage.public_url(url)}: deltalake reads no path with a %; move the run to another")
    if "://" in url and url.partition("://")[0] not in SCHEMES:
        raise PipelineError(f"{storage.public_url(url)}: Delta Lake tables are for disks, s3://, gs:// and az://")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    return url, {"allow_http": "true"} if endpoint.startswith("http://") else {}


def _create(deltalake: Any, run: TokenRun, url: str, options: dict[str, str]) -> Registered | None:
    """None where somebody else made it meanwhile."""
    try:
        deltalake.transaction.create_table_with_add_actions(
            url, _schema(deltalake, run), [_added(deltalake, part) for part in run.parts], mode="error",
            description=_description(run), storage_options=options,
            configuration={"delta.deletedFileRetentionDuration": FOR_EVER, "delta.logRetentionDuration": FOR_EVER},
        )  # fmt: skip
    except deltalake.exceptions.DeltaError:
        if not deltalake.DeltaTable.is_deltatable(url, options):
            raise
        return None
    return _registered(run, 0, len(run.parts), 0)


def _update(deltalake: Any, run: TokenRun, table: Any) -> Registered | None:
    """None where somebody else made a version meanwhile: ours may be of an earlier state of the run than theirs."""
    if (other := table.metadata().description) != _description(run):
        where = storage.public_url(run.output.url)
        raise RunMismatch(f"{where} holds a Delta Lake table of {other or 'others'}: remove its _delta_log")
    known, here = _known(table), {_path(part): part for part in run.parts}
    new = [part for path, part in here.items() if known.get(path) != (part.size_bytes, part.num_rows)]
    gone = [_removed(deltalake, path, size_bytes) for path, (size_bytes, _) in known.items() if path not in here]
    version = int(table.version())
    if new or gone:
        actions = [*gone, *(_added(deltalake, part) for part in new)]
        table.create_write_transaction(actions, mode="append", schema=_schema(deltalake, run))
        table.update_incremental()
        version += 1
    return _registered(run, version, len(new), len(gone)) if table.version() == version else None


def _registered(run: TokenRun, version: int, num_added: int, num_removed: int) -> Registered:
    return Registered(run.output.url, version, len(run.parts), run.num_rows, num_added, num_removed, run.missing)


def _known(table: Any) -> Mapping[str, tuple[int, int]]:
    """Size and rows by path, of the newest version."""
    actions = table.get_add_actions(flatten=True)
    columns = [actions.column(name).to_pylist() for name in ("path", "size_bytes", "num_records")]
    return {path: (size_bytes, num_rows) for path, size_bytes, num_rows in zip(*columns, strict=True)}


def _description(run: TokenRun) -> str:
    """What the rows are of: unlike a property of our own, every writer of Delta Lake takes it."""
    return f"tokens of {run.table.tokenizer_id}"


def _schema(deltalake: Any, run: TokenRun) -> Any:
    return deltalake.Schema.from_arrow(token_schema(run.table))


def _path(part: Part) -> str:
    return f"tokens/{part.name}"


def _added(deltalake: Any, part: Part) -> Any:
    """With what lets a reader pass over a part: all its rows are of one shard."""
    stats: dict[str, Any] = {"numRecords": part.num_rows}
    if part.shard is not None and part.num_rows:
        stats |= {"minValues": {"shard": part.shard}, "maxValues": {"shard": part.shard}, "nullCount": {"shard": 0}}
    return deltalake.transaction.AddAction(
        path=_path(part), size=part.size_bytes, partition_values={}, modification_time=_now_ms(), data_change=True,
        stats=json.dumps(stats),
    )  # fmt: skip


def _removed(deltalake: Any, path: str, size_bytes: int) -> Any:
    return deltalake.transaction.RemoveAction(path, True, _now_ms(), size_bytes, {})


def _now_ms() -> int:
    return int(time.time() * 1000)
