"""How fast token rows reach a training loop, and how well they are mixed: prints JSON with medians and ratios.

    python tests/bench_token_dataset.py [--rows 200000] [--grid 16] [--shard-rows 5000] [--rounds 5] [--only NAME ...]

One run of made-up tokens (codes as uneven as real ones, captions of ten words) is read whole by each way in turn, round
after round, each in a process of its own that does nothing else; imports are not counted. All give int64 tensors of
`--batch-size` rows, but those named numpy. The ways that do not shuffle have less to do. Hugging Face `datasets` is
left out, and said to be, where it is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.token_dataset import TokenDataset, TokenLoader
from make_data import fake_table, peak_bytes
from pipeline import storage
from pipeline.ledger import Ledger
from pipeline.metadata import MetadataColumn
from pipeline.output import OutputPrefix, RunDescription, claim, part_name
from pipeline.records import DecodedSample, ObjectInfo, ShardResult, ShardState
from pipeline.token_reader import ReaderOptions, TokenReader
from pipeline.token_run import TokenRun
from pipeline.token_table import narrow_tokens, part_bytes

# B rows of a batch, N tokens of a row, R rows in the order in which they come

CODES = 8192
BUFFER_ROWS = 10_000  # of datasets' shuffle
WORDS = ["a", "the", "of", "with", "under", "photo", "cat", "dog", "house", "sky", "red", "person"]
Batches = Iterator[Any]


def make_run(folder: Path, num_rows: int, side: int, shard_rows: int) -> None:
    table = fake_table(grid=(side, side), codebook_size=CODES, columns=(MetadataColumn("caption", "txt"),))
    output, rng = OutputPrefix(str(folder)), np.random.default_rng(0)
    claim(output, RunDescription(table, {}, {}), accept_numerics=False)
    shares = np.arange(1, CODES + 1) ** -0.7
    shares /= shares.sum()
    for number, first in enumerate(range(0, num_rows, shard_rows)):
        shard, count = ObjectInfo(f"s3://bucket/{number:05d}.tar", 1 << 28, "e"), min(shard_rows, num_rows - first)
        tokens_BHW = rng.choice(CODES, size=(count, side, side), p=shares)
        samples = [
            DecodedSample(f"{first + n:08d}", n, 1024 * n, 700, 64, 48, {"caption": " ".join(rng.choice(WORDS, 10))})
            for n in range(count)
        ]
        data = part_bytes(table, shard, samples, narrow_tokens(tokens_BHW, table), 0)
        name = part_name(shard.url)
        storage.publish(output.part(name), data)
        row = ShardResult(shard.url, shard.size_bytes, "e", ShardState.DONE, name, count, 0, len(data))
        Ledger(output).append([row])


# The ways: each gives batches whose length is that of their tokens


def token_loader(output: str, size: int) -> Batches:
    return (batch.tokens for batch in TokenLoader(TokenDataset(output, batch_size=size)))


def token_loader_with_captions(output: str, size: int) -> Batches:
    return (batch.tokens for batch in TokenLoader(TokenDataset(output, batch_size=size, columns=["caption"])))


def token_reader_numpy(output: str, size: int) -> Batches:
    return (batch.tokens_BN for batch in TokenReader(TokenRun.open(output), ReaderOptions(size)))


def pyarrow_lists(output: str, size: int) -> Batches:
    import pyarrow.dataset as ds

    for batch in ds.dataset(f"{output}/tokens").to_batches(columns=["tokens"], batch_size=size):
        yield torch.tensor(batch["tokens"].to_pylist())


def pyarrow_vectorised(output: str, size: int) -> Batches:
    import pyarrow.dataset as ds

    for batch in ds.dataset(f"{output}/tokens").to_batches(columns=["tokens"], batch_size=size):
        yield torch.from_numpy(batch["tokens"].flatten().to_numpy().reshape(batch.num_rows, -1).astype(np.int64))


def datasets_streamed(output: str, size: int, *, shuffled: bool = False, column: str = "tokens") -> Batches:
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=f"{output}/tokens/*.parquet", split="train", streaming=True)
    rows = rows.select_columns([column])
    if shuffled:
        rows = rows.shuffle(seed=0, buffer_size=BUFFER_ROWS)
    for batch in rows.with_format("torch" if column == "tokens" else None).iter(batch_size=size):
        yield batch[column]


def datasets_streamed_and_shuffled(output: str, size: int) -> Batches:
    return datasets_streamed(output, size, shuffled=True)


NAIVE, OURS = "pyarrow lists", "TokenLoader"
WAYS: dict[str, Callable[[str, int], Batches]] = {
    OURS: token_loader,
    "TokenLoader with captions": token_loader_with_captions,
    "TokenReader (numpy)": token_reader_numpy,
    NAIVE: pyarrow_lists,
    "pyarrow vectorised": pyarrow_vectorised,
    "datasets streamed": datasets_streamed,
    "datasets streamed and shuffled": datasets_streamed_and_shuffled,
}
SHUFFLING = {OURS, "TokenLoader with captions", "TokenReader (numpy)", "datasets streamed and shuffled"}


def time_way(name: str, output: str, size: int) -> dict[str, float]:
    """Rows, seconds of the clock and of the processor, and the peak of memory, in this process."""
    torch.set_num_threads(1)
    list(zip(range(2), WAYS[name](output, size), strict=False))  # imports, the first listing
    start, cpu_start, num_rows = time.perf_counter(), time.process_time(), 0
    for batch in WAYS[name](output, size):
        num_rows += len(batch)
        end, cpu_end = time.perf_counter(), time.process_time()  # datasets takes five seconds more to close
    seconds, cpu_seconds = end - start, cpu_end - cpu_start
    return {"rows": num_rows, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": peak_bytes() / 1e6}


def timed_elsewhere(name: str, output: str, size: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--time", name, "--output", output, "--batch-size", str(size)]
    return dict(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=900).stdout))


def speeds(output: str, size: int, num_tokens: int, ways: list[str], rounds: int) -> dict[str, Any]:
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name in ways:
            runs[name].append(timed_elsewhere(name, output, size))
    return {name: _figures(found, num_tokens, name in SHUFFLING) for name, found in runs.items()}


def _figures(runs: list[dict[str, float]], num_tokens: int, shuffles: bool) -> dict[str, Any]:
    rates = sorted(run["rows"] * num_tokens / run["seconds"] / 1e6 for run in runs)
    return {
        "shuffles": shuffles,
        "rows": runs[0]["rows"],
        "million_tokens_per_s": round(statistics.median(rates), 2),
        "least_and_most": [round(rates[0], 2), round(rates[-1], 2)],
        "million_tokens_per_cpu_s": round(
            statistics.median(run["rows"] * num_tokens / run["cpu_seconds"] / 1e6 for run in runs), 2
        ),
        "peak_mb": round(max(run["peak_mb"] for run in runs)),
    }


# How well rows are mixed


def mixing(stored_R: NDArray[np.int64], shard_rows: int, size: int) -> dict[str, float]:
    """Of the rows' places in storage, in the order in which they came, beside what a perfect shuffle has: correlation
    of the two orders (0), mean displacement (1/3 of all rows), how often two in a row are of one shard, and how many
    shards a batch is of."""
    num_rows = len(stored_R)
    shard_R, perfect_R = stored_R // shard_rows, np.random.default_rng(0).permutation(num_rows) // shard_rows
    return {
        "rank_correlation": round(float(np.corrcoef(stored_R, np.arange(num_rows))[0, 1]), 4),
        "mean_displacement": round(float(np.abs(stored_R - np.arange(num_rows)).mean()) / num_rows, 4),
        "same_shard_next": round(_same_next(shard_R), 4),
        "same_shard_next_perfect": round(_same_next(perfect_R), 4),
        "shards_in_a_batch": round(_in_a_batch(shard_R, size), 2),
        "shards_in_a_batch_perfect": round(_in_a_batch(perfect_R, size), 2),
    }


def _same_next(shard_R: NDArray[np.int64]) -> float:
    return float((shard_R[1:] == shard_R[:-1]).mean())


def _in_a_batch(shard_R: NDArray[np.int64], size: int) -> float:
    whole = shard_R[: len(shard_R) // size * size].reshape(-1, size)
    return float(np.mean([len(np.unique(batch)) for batch in whole]))


def mixed_by_us(output: str, size: int) -> NDArray[np.int64]:
    reader = TokenReader(TokenRun.open(output), ReaderOptions(size, ("key",)))
    return np.array([int(key) for batch in reader for key in batch.columns["key"]])


def mixed_by_datasets(output: str, size: int) -> NDArray[np.int64]:
    return np.array([int(key) for keys in datasets_streamed(output, size, shuffled=True, column="key") for key in keys])


def is_installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def bench(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    output, has_datasets = str(folder / "run"), is_installed("datasets")
    make_run(folder / "run", args.rows, args.grid, args.shard_rows)
    ways = [name for name in args.only or WAYS if has_datasets or not name.startswith("datasets")]
    found = speeds(output, args.batch_size, args.grid**2, ways, args.rounds)
    ours = found.get(OURS, {}).get("million_tokens_per_s")
    ratios = {name: round(ours / each["million_tokens_per_s"], 2) for name, each in found.items()} if ours else {}
    orders = {"TokenReader": mixed_by_us} | ({"datasets": mixed_by_datasets} if has_datasets else {})
    return {
        "cores": len(os.sched_getaffinity(0)),
        "rows": args.rows, "tokens_a_row": args.grid**2, "batch_size": args.batch_size, "rounds": args.rounds,
        "without": [] if has_datasets else ["datasets: it is not installed"],
        "speed": found,
        "TokenLoader_is_times_as_fast_as": ratios,
        "mixing": {
            name: mixing(order(output, args.batch_size), args.shard_rows, args.batch_size)
            for name, order in orders.items()
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 200_000), ("grid", 16), ("shard-rows", 5000), ("rounds", 5), ("batch-size", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", nargs="*", choices=list(WAYS), help="these ways")
    parser.add_argument("--time", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.time:
        figures = time_way(args.time, args.output, args.batch_size)
    else:
        with tempfile.TemporaryDirectory() as folder:
            figures = bench(Path(folder), args)
    sys.stdout.write(json.dumps(figures, indent=None if args.time else 1) + "\n")


if __name__ == "__main__":
    main()
