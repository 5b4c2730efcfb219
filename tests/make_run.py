"""Whole tokenising runs in this process, without Ray: the real plan, worker, ledger and manifest."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fakes import HeadTokenizer
from jobs.checkpoints import read_head
from jobs.config import check
from jobs.tokenize_config import TokenizeConfig
from jobs.tokenize_dataset import run_tokenize
from jobs.tokenize_run import TokenizeRun, held
from make_data import image_bytes, tar_bytes
from pipeline import storage
from pipeline.errors import ShardError
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix
from pipeline.plan import ShardTask, make_plan, record_plan
from pipeline.records import FailureReason, ImageTokenizer, ShardResult
from pipeline.shard_patterns import expand
from pipeline.tokenize_shard import TokenizeWorker, quarantine


def run_config(checkpoint: Path, shards: str | Path, output: str | Path, **changes: Any) -> TokenizeConfig:
    values = {"checkpoint": str(checkpoint), "shards": str(shards), "output": str(output), "batch_size": 8}
    return check(TokenizeConfig, {**values, "metadata": {"caption": {"from": "txt"}}, **changes}, "test")


def write_shard(path: Path, first: int, good: str) -> None:
    """A tar of one sample for each letter of `good`: `+` an image, `-` bytes that are none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [(f"img{first + n:05d}", image_bytes(first + n) if c == "+" else b"no image") for n, c in enumerate(good)]
    members = [[(f"{key}.jpg", data), (f"{key}.txt", f"picture {key}".encode())] for key, data in images]
    path.write_bytes(tar_bytes([member for sample in members for member in sample]))


def tokenize_here(config: TokenizeConfig, tokenizer: ImageTokenizer | None = None) -> int:
    """As `dvae tokenize`, with one worker in this process and one attempt a shard."""
    run = TokenizeRun.of(config)
    with held(run) as ledger:
        plan = make_plan(expand(config.shards), run.output, ledger, run.table)
        if plan.todo:
            storage.remove(run.output.file("manifest.json"))
            record_plan(run.output, plan, config.public_settings())
        worker = TokenizeWorker(tokenizer or HeadTokenizer(read_head(config.checkpoint)), run.job(2))
        results = [_tokenized(worker, run.output, task) for task in plan.todo]
        worker.close()
        ledger.append([*plan.adopted, *results])
    lost = any(result.reason for result in results)
    return 1 if lost else run_tokenize(config, "dvae tokenize")  # which has nothing to do but write the manifest


def _tokenized(worker: TokenizeWorker, output: OutputPrefix, task: ShardTask) -> ShardResult:
    try:
        return worker.tokenize(task)
    except ShardError as error:
        return quarantine(output, task, FailureReason(f"shard_{error.reason}"), str(error), attempts=1)


def part_of(output: Path, shard: str) -> Path:
    (path,) = (output / "tokens").glob(f"{shard}-*.parquet")
    return path


def rewrite_part(
    output: Path,
    shard: str,
    change: Callable[[pa.Table], pa.Table] = lambda rows: rows,
    /,
    **footer: Any,
) -> Path:
    """Write a part anew with other rows or another footer, and its sha256, size and number of rows into the ledger."""
    path = part_of(output, shard)
    rows = change(pq.read_table(path))
    metadata = json.dumps({**json.loads(rows.schema.metadata[b"dvae"]), **footer}).encode()
    sink = io.BytesIO()
    pq.write_table(rows.replace_schema_metadata({b"dvae": metadata}), sink, compression="zstd")
    path.write_bytes(sink.getvalue())
    record_part(output, path, num_rows=rows.num_rows)
    return path


def record_part(output: Path, path: Path, **changes: Any) -> None:
    """Make the ledger agree with the bytes of a part."""
    ledger, data = Ledger(OutputPrefix(str(output))), path.read_bytes()
    (row,) = (row for row in ledger.read().values() if row.part == path.name)
    ledger.append([replace(row, part_bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), **changes)])
