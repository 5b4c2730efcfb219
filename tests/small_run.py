"""Finished runs of a few images in this process, with neither torch nor Ray: parts, errors, ledger, plan, manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jobs.compact import run_compact
from make_data import fake_table, image_bytes, tar_bytes
from pipeline import storage
from pipeline.ledger import Ledger
from pipeline.manifest import write_manifest
from pipeline.metadata import MetadataColumn
from pipeline.output import OutputPrefix, RunDescription, claim
from pipeline.plan import make_plan, record_plan
from pipeline.records import FailureReason, ShardState
from pipeline.shard_patterns import expand
from pipeline.token_run import TokenRun
from pipeline.token_table import TableSpec
from pipeline.tokenize_shard import TokenizeJob, TokenizeWorker, quarantine

CAPTION = MetadataColumn("caption", "txt", "string")


class Squares:
    """Tokens are the red of each of `side` x `side` cells, in 16 steps."""

    codebook_size = 16

    def __init__(self, side: int = 2) -> None:
        self.grid, self.tokenizer_id = (side, side), f"squares-{side}"

    def encode(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        step = pixels_BHWC.shape[1] // self.grid[0]
        return pixels_BHWC[:, ::step, ::step, 0] // 16

    @property
    def table(self) -> TableSpec:
        return fake_table(
            tokenizer_id=self.tokenizer_id, grid=self.grid, codebook_size=self.codebook_size, columns=(CAPTION,)
        )


def write_captioned(url: str, first: int, captions: Sequence[str | None]) -> None:
    """A tar of an image for each caption, keys from `img<first>` on; where it is None, bytes that are no image."""
    members = []
    for n, caption in enumerate(captions, first):
        key = f"img{n:05d}"
        members.append((f"{key}.jpg", b"no image" if caption is None else image_bytes(n)))
        members.append((f"{key}.txt", (caption or "").encode()))
    storage.publish(url, tar_bytes(members))


def tokenize_all(shards: str, output_url: str, side: int = 2, lost: Mapping[str, str] | None = None) -> OutputPrefix:
    """What `dvae tokenize` leaves of the shards below `shards`. `lost`: a word of a shard's name -> why it is
    quarantined."""
    output, tokenizer = OutputPrefix(output_url), Squares(side)
    claim(output, RunDescription(tokenizer.table, {}, {}), accept_numerics=False)
    ledger = Ledger(output)
    plan = make_plan(expand([shards]), output, ledger, tokenizer.table)
    record_plan(output, plan, {})
    worker = TokenizeWorker(tokenizer, TokenizeJob(output, tokenizer.table, batch_size=4, decode_threads=1))
    for task in plan.todo:
        why = next((why for word, why in (lost or {}).items() if word in task.shard.url), None)
        give_up = (output, task, FailureReason.SHARD_TRUNCATED, why)
        ledger.append([quarantine(*give_up, attempts=1) if why else worker.tokenize(task)])
    worker.close()
    rows = [row for row in ledger.read().values() if row.state is not ShardState.REMOVED]
    write_manifest(output, tokenizer.table, rows, [])
    return output


SHARDS: list[list[str | None]] = [["a", "b", None], ["c"], [], ["d\nd", None, "", "<e>"], ["f"], ["g"]]
LOST = {"photos-4": "it is cut"}  # of `f`
NUM_ROWS, NUM_FAILED = 7, 2


def six_shards(folder: str, output: str) -> OutputPrefix:
    """A run of SHARDS: NUM_ROWS rows, NUM_FAILED errors and a shard that was given up."""
    first = 0
    for number, captions in enumerate(SHARDS):
        write_captioned(f"{folder}/shards/photos-{number}.tar", first, captions)
        first += max(1, len(captions))
    return tokenize_all(f"{folder}/shards", output, lost=LOST)


def two_parts(source: OutputPrefix) -> int:
    """A target that two or three of the parts fit into."""
    return 2 * max(part.size_bytes for part in TokenRun.open(source.url).parts)


def compact(source: OutputPrefix, dest: str, **options: Any) -> int:
    return run_compact(source.url, dest, **{"target_bytes": two_parts(source), "as_json": True, **options})


def damage(path: Path) -> None:
    """Another bit, the same size."""
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
