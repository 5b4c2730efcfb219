"""One file of a compacted run: the rows of its parts, and nothing else."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from make_data import fake_table
from pipeline.compact_file import Held, cut, merged_rows, require_same_rows
from pipeline.errors import Damaged
from pipeline.metadata import MetadataColumn
from pipeline.records import DecodedSample, ObjectInfo
from pipeline.token_table import TableSpec, part_bytes, token_schema


def part(first: int, num_rows: int, scores: list[float | None]) -> Held:
    table = scored()
    samples = [
        DecodedSample(f"k{first + n}", n, None if n % 2 else n, 1, 2, 3, {"score": scores[n % len(scores)]})
        for n in range(num_rows)
    ]
    tokens_BN = np.arange(first, first + num_rows * 4).reshape(num_rows, 4) % 16
    shard = ObjectInfo(f"s{first}.tar", 10_000, "e")
    return Held(f"{first}.parquet", part_bytes(table, shard, samples, tokens_BN, 0))


def scored() -> TableSpec:
    return fake_table(columns=(MetadataColumn("score", "json.score", "float32"),))


def test_rows_fill_row_groups_across_parts_and_nan_and_null_come_through() -> None:
    parts = [part(0, 1500, [1.0, float("nan"), None]), part(5000, 0, []), part(6000, 3000, [None])]
    merged = merged_rows(scored(), parts, {"num_rows": 4500})
    metadata = pq.read_metadata(pa.BufferReader(merged))
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [2048, 2048, 404]
    require_same_rows(merged, parts, token_schema(scored()))
    assert merged == merged_rows(scored(), parts, {"num_rows": 4500})


@pytest.mark.parametrize("others", [[(0, 5), (9, 5)], [(9, 5), (0, 4)], [(9, 5)], [(0, 5), (9, 4)], []])
def test_other_rows_than_those_of_the_parts_are_noticed(others: list[tuple[int, int]]) -> None:
    merged = merged_rows(scored(), [part(9, 5, [0.5]), part(0, 5, [None, float("nan")])], {})
    with pytest.raises(Damaged):
        require_same_rows(merged, [part(*other, [0.5]) for other in others], token_schema(scored()))


def test_cut_gives_the_pieces_asked_for() -> None:
    schema = pa.schema([("n", pa.int64())])
    tables = [pa.table({"n": list(values)}, schema=schema) for values in (range(5), [], range(5, 6), range(6, 11))]
    pieces = [piece["n"].to_pylist() for piece in cut(iter(tables), [0, 2, 4, 0, 9], schema)]
    assert pieces == [[], [0, 1], [2, 3, 4, 5], [], [6, 7, 8, 9, 10]]
