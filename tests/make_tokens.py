"""Runs of made-up tokens, part by part: no image, no tokenizer, as many rows as are wanted."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from make_data import fake_table
from pipeline import storage
from pipeline.ledger import Ledger
from pipeline.metadata import MetadataColumn
from pipeline.output import OutputPrefix, RunDescription, claim, part_name
from pipeline.records import DecodedSample, ObjectInfo, ShardResult, ShardState
from pipeline.token_run import TokenRun
from pipeline.token_table import TableSpec, narrow_tokens, part_bytes

TABLE = fake_table(grid=(2, 3), columns=(MetadataColumn("caption", "txt"),))


def shard_bytes(shard: str, num_rows: int, table: TableSpec = TABLE, etag: str = "e") -> bytes:
    samples = [
        DecodedSample(f"{shard}-{n}", n, 1024 * n, 700, 64, 48, {"caption": None if n % 3 else f"ü\0 {n}"})
        for n in range(num_rows)
    ]
    tokens_BHW = np.random.default_rng(zlib.crc32(shard.encode())).integers(
        0, table.codebook_size, (num_rows, *table.grid)
    )
    return part_bytes(table, ObjectInfo(shard, 10**6, etag), samples, narrow_tokens(tokens_BHW, table), num_failed=0)


class TokenWorld:
    """An output whose parts are made one by one, with a row in the ledger or without."""

    def __init__(self, url: str) -> None:
        self.output = OutputPrefix(url)
        claim(self.output, RunDescription(TABLE, {}, {}), accept_numerics=False)

    def add(self, shard: str, num_rows: int, *, recorded: bool = True, **changes: Any) -> str:
        data, name = shard_bytes(shard, num_rows, **changes), part_name(shard)
        storage.publish(self.output.part(name), data)
        if recorded:
            self.record(shard, part=name, num_rows=num_rows, part_bytes=len(data))
        return name

    def record(self, shard: str, state: ShardState = ShardState.DONE, **values: Any) -> None:
        Ledger(self.output).append([ShardResult(shard, 10**6, "e", state, **values)])

    def open(self) -> TokenRun:
        return TokenRun.open(self.output.url)

    def rows(self) -> list[dict[str, Any]]:
        run = self.open()
        return [row for part in run.parts for row in run.read_part(part).to_pylist()]
