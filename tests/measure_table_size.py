"""How many bytes a token takes in a part, beside the order-0 entropy of the codes and beside other ways to keep them.

python tests/measure_table_size.py                             20,000 rows of 32x32 tokens, drawn with the shares of a
                                                               codebook of 8,192 codes whose entropy is 11.9 bits
python tests/measure_table_size.py --output runs/tokens        the rows of a run (all in memory)
python tests/measure_table_size.py --rows 2000 --side 16 --codes 1024 --bits 8

Prints JSON. `bound` is what no code that looks at one token at a time can beat, given the shares; `ratio` is to it.
Times are medians of `--rounds` rounds of all variants in turn, on one thread.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from make_data import fake_table
from pipeline.records import DecodedSample, ObjectInfo
from pipeline.token_run import TokenRun
from pipeline.token_table import ROW_GROUP_ROWS, TableSpec, part_bytes, token_schema

# B rows, N tokens of a row, K codes

PART_ROWS = 5000
Tokens = NDArray[np.signedinteger[Any]]


@dataclass(frozen=True)
class Way:
    """One way to keep the tokens of a shard, there and back."""

    write: Callable[[Tokens], bytes]
    read: Callable[[bytes], Any]


def parquet(rows: int = ROW_GROUP_ROWS, **options: Any) -> Way:
    def write(tokens_BN: Tokens) -> bytes:
        sink = io.BytesIO()
        kept = {"compression": "zstd", "use_dictionary": True, "write_page_checksum": True, **options}
        pq.write_table(column(tokens_BN), sink, row_group_size=rows, **kept)
        return sink.getvalue()

    return Way(write, lambda data: pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False))


def column(tokens_BN: Tokens) -> pa.Table:
    spec = fake_table(grid=(1, tokens_BN.shape[1]), codebook_size=8192 if tokens_BN.dtype == np.int16 else 40_000)
    type_ = token_schema(spec).field("tokens").type
    return pa.table({"tokens": pa.FixedSizeListArray.from_arrays(pa.array(tokens_BN.reshape(-1)), type=type_)})


def encoded(encoding: str, **options: Any) -> Way:
    return parquet(use_dictionary=False, column_encoding=encoding, **options)


def arrow_ipc() -> Way:
    def write(tokens_BN: Tokens) -> bytes:
        sink, table = io.BytesIO(), column(tokens_BN)
        with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(table, ROW_GROUP_ROWS)
        return sink.getvalue()

    return Way(write, lambda data: pa.ipc.open_file(data).read_all())


def npy(dtype: Any, save: Callable[..., None] = np.save) -> Way:
    """One file an image, as several peers leave them; here one after another."""

    def write(tokens_BN: Tokens) -> bytes:
        files = io.BytesIO()
        for tokens_N in tokens_BN:
            save(files, tokens_N.astype(dtype))
        return files.getvalue()

    def read(data: bytes) -> None:
        files = io.BytesIO(data)
        while files.tell() < len(data):
            np.load(files)

    return Way(write, read)


WAYS = {
    "ours: int16, dictionary, zstd 1": parquet(),
    "zstd 3": parquet(compression_level=3),
    "zstd 9": parquet(compression_level=9),
    "zstd 19": parquet(compression_level=19),
    "gzip": parquet(compression="gzip"),
    "brotli": parquet(compression="brotli"),
    "snappy": parquet(compression="snappy"),
    "lz4": parquet(compression="lz4"),
    "dictionary alone": parquet(compression="none"),
    "no dictionary, zstd": parquet(use_dictionary=False),
    "no dictionary, zstd 19": parquet(use_dictionary=False, compression_level=19),
    "bare: neither": parquet(use_dictionary=False, compression="none"),
    "byte stream split, zstd": encoded("BYTE_STREAM_SPLIT"),
    "delta binary packed, zstd": encoded("DELTA_BINARY_PACKED"),
    "row groups of 512": parquet(512),
    "row groups of 16,384": parquet(16_384),
    "Arrow IPC, zstd": arrow_ipc(),
    "a .npy an image, int16": npy(np.int16),
    "a .npy an image, int64": npy(np.int64),
}


def entropy_bits(tokens_BN: Tokens) -> float:
    """Order 0, of a token: -sum p log2 p over the shares p of the codes."""
    uses_K = np.bincount(tokens_BN.reshape(-1))
    shares = uses_K[uses_K > 0] / tokens_BN.size
    return float(-(shares * np.log2(shares)).sum())


def drawn(rows: int, num_tokens: int, codes: int, bits: float, seed: int = 0) -> Tokens:
    """Independent tokens whose shares fall as a power of the rank, the power chosen so that the entropy is `bits`."""
    rng, low, high = np.random.default_rng(seed), 0.0, 4.0
    for _ in range(50):
        shares_K = np.arange(1, codes + 1) ** -((low + high) / 2)
        shares_K /= shares_K.sum()
        if -(shares_K * np.log2(shares_K)).sum() > bits:
            low = (low + high) / 2
        else:
            high = (low + high) / 2
    tokens = rng.choice(rng.permutation(codes), size=rows * num_tokens, p=shares_K)
    return tokens.reshape(rows, num_tokens).astype(np.int16 if codes <= 32_768 else np.int32)


def of_run(url: str) -> tuple[Tokens, float | None, TableSpec]:
    """Tokens, bytes of a row in the run's parts, all columns included, and the table."""
    run = TokenRun.open(url)
    tokens = [batch.tokens_BN for batch in run.batches(run.parts)]
    return np.concatenate(tokens), sum(part.size_bytes for part in run.parts) / max(1, run.num_rows), run.table


def whole_part_bytes(tokens_BN: Tokens, codes: int) -> float:
    """Bytes of a row in a part with all its own columns, and no metadata."""
    spec = fake_table(grid=(1, tokens_BN.shape[1]), codebook_size=codes)
    samples = [
        DecodedSample(f"{n:09d}", n, 1024 + 50_000 * n, 48_211 + n % 977, 512, 384, {}) for n in range(len(tokens_BN))
    ]
    shard = ObjectInfo("s3://images/laion/00000-of-09999.tar", 50_000 * len(samples), "0" * 32)
    return len(part_bytes(spec, shard, samples, tokens_BN, 0)) / len(tokens_BN)


def measured(tokens_BN: Tokens, rounds: int) -> dict[str, dict[str, float]]:
    """By the name of the way: bytes of a row, and tokens a second written and read."""
    chunks = [tokens_BN[first : first + PART_ROWS] for first in range(0, len(tokens_BN), PART_ROWS)]
    writing: dict[str, list[float]] = {name: [] for name in WAYS}
    reading: dict[str, list[float]] = {name: [] for name in WAYS}
    num_bytes = {}
    for _ in range(rounds):
        for name, way in WAYS.items():
            started = time.perf_counter()
            files = [way.write(chunk) for chunk in chunks]
            written = time.perf_counter()
            for data in files:
                way.read(data)
            writing[name].append(written - started)
            reading[name].append(time.perf_counter() - written)
            num_bytes[name] = sum(map(len, files))
    bound = entropy_bits(tokens_BN) / 8 * tokens_BN.size
    return {
        name: {
            "bytes_a_row": round(num_bytes[name] / len(tokens_BN), 1),
            "ratio": round(num_bytes[name] / bound, 4),
            "written_tokens_per_s": round(tokens_BN.size / statistics.median(writing[name])),
            "read_tokens_per_s": round(tokens_BN.size / statistics.median(reading[name])),
        }
        for name in WAYS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="a run of dvae tokenize, in place of drawn tokens")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--codes", type=int, default=8192)
    parser.add_argument("--bits", type=float, default=11.86)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    pa.set_cpu_count(1)
    if args.output:
        tokens_BN, part_row_bytes, table = of_run(args.output)
        codes = table.codebook_size
    else:
        tokens_BN, codes = drawn(args.rows, args.side**2, args.codes, args.bits), args.codes
        part_row_bytes = whole_part_bytes(tokens_BN[:PART_ROWS], codes)
    bits = entropy_bits(tokens_BN)
    bound = bits / 8 * tokens_BN.shape[1]
    report = {
        "rows": len(tokens_BN), "tokens_a_row": tokens_BN.shape[1], "codes": codes, "entropy_bits": round(bits, 4),
        "bound_bytes_a_row": round(bound, 1),
        "part_bytes_a_row": round(part_row_bytes, 1), "part_ratio": round(part_row_bytes / bound, 4),
        "rows_a_file": PART_ROWS, "tokens_alone": measured(tokens_BN, args.rounds),
    }  # fmt: skip
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
