"""Runs made of tokens alone: parts, errors files and a ledger as a driver leaves them, of no images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix, RunDescription, claim, part_name
from pipeline.records import DecodedSample, ObjectInfo, SampleFailure, ShardResult, ShardState
from pipeline.token_table import TableSpec, errors_bytes, narrow_tokens, part_bytes


class TokensRun:
    """`add` publishes a shard's part and its row of the ledger, as `dvae tokenize` would."""

    def __init__(self, url: str, table: TableSpec) -> None:
        self.output, self.table = OutputPrefix(storage.normalize(url)), table
        claim(self.output, RunDescription(table, {}, {}), accept_numerics=False)

    def add(self, shard: str, tokens_BN: np.ndarray, failures: Sequence[SampleFailure] = (), seconds: float = 2) -> str:
        """URL of the part."""
        info, name = ObjectInfo(shard, 10**9, "e"), part_name(shard)
        samples = [DecodedSample(f"{shard}/{n}", n, 1024 * n, 700, 64, 48, {}) for n in range(len(tokens_BN))]
        tokens = narrow_tokens(np.asarray(tokens_BN).reshape(-1, *self.table.grid), self.table)
        data = part_bytes(self.table, info, samples, tokens, len(failures))
        if failures:
            storage.publish(self.output.errors(name), errors_bytes(info, failures))
        storage.publish(self.output.part(name), data)
        counts = {"num_rows": len(samples), "num_failed": len(failures), "part_bytes": len(data), "seconds": seconds}
        Ledger(self.output).append([ShardResult(shard, 10**9, "e", ShardState.DONE, name, **counts)])
        return self.output.part(name)


def damage_tokens(part: str, name: str = "tokens") -> None:
    """Flip a byte in the middle of a local part's column of tokens, or of another."""
    path = Path(part)
    groups = pq.read_metadata(path).row_group(0)
    (column,) = (c for c in map(groups.column, range(groups.num_columns)) if c.path_in_schema.startswith(name))
    data = bytearray(path.read_bytes())
    data[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size // 2] ^= 1
    path.write_bytes(data)


def zipf_tokens(num_rows: int, table: TableSpec, seed: int, shuffled: int | None = None) -> np.ndarray:
    """tokens_BN, some codes far more often than others; `shuffled`: as by another model, whose codes mean other
    things."""
    rng = np.random.default_rng(seed)
    ranks = np.arange(1, table.codebook_size + 1)
    edges = np.cumsum(1 / ranks) / np.sum(1 / ranks)
    tokens_BN = np.searchsorted(edges, rng.random((num_rows, table.num_tokens))).clip(0, table.codebook_size - 1)
    return (
        tokens_BN if shuffled is None else np.random.default_rng(shuffled).permutation(table.codebook_size)[tokens_BN]
    )
