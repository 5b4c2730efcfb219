"""How fast `dvae stats` counts, and in how much memory: python tests/bench_stats.py [--rows 2000000 ...] prints JSON.

Synthetic runs of 8x8 tokens of 1,024 codes in shards of 10,000 images; each is counted by the command in a process of
its own, `--rounds` times in turn. Medians; `least_peak_mb` is what the command takes for a run of no rows."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from make_data import fake_table
from make_tokens_run import TokensRun, zipf_tokens

TABLE = fake_table(grid=(8, 8), codebook_size=1024)
SHARD_ROWS = 10_000


def make_run(folder: Path, num_rows: int) -> str:
    made = TokensRun(str(folder / f"rows-{num_rows}"), TABLE)
    for shard in range(-(-num_rows // SHARD_ROWS)):
        tokens_BN = zipf_tokens(min(SHARD_ROWS, num_rows - shard * SHARD_ROWS), TABLE, seed=shard)
        made.add(f"/in/{shard:06d}.tar", tokens_BN)
    return made.output.url


def measure(url: str, *options: str) -> dict[str, Any]:
    """Of one run of the command: seconds from the first part to the last, and the process's peak memory."""
    command = [sys.executable, "-m", "jobs.cli", "stats", url, "--json", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    found = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0 and found["num_standing_out"] == 0
    num_tokens = sum(found["code_uses"])
    return {"counting_s": found["counting_s"], "num_tokens": num_tokens, "peak_mb": usage.ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[200_000, 2_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        urls = {rows: make_run(Path(folder), rows) for rows in [0, *options.rows]}
        rounds = [{rows: measure(url) for rows, url in urls.items()} for _ in range(options.rounds)]
    median = {
        rows: {name: statistics.median(one[rows][name] for one in rounds) for name in rounds[0][rows]} for rows in urls
    }
    runs = [
        {
            "rows": rows,
            "tokens": int(found["num_tokens"]),
            "counting_s": round(found["counting_s"], 2),
            "million_tokens_per_s": round(found["num_tokens"] / found["counting_s"] / 1e6, 1),
            "rows_per_s": round(rows / found["counting_s"]),
            "peak_mb": round(found["peak_mb"]),
        }
        for rows, found in median.items()
        if rows
    ]
    peaks = {
        "least_peak_mb": round(median[0]["peak_mb"]),
        "peak_of_last_to_first": runs[-1]["peak_mb"] / runs[0]["peak_mb"],
    }
    sys.stdout.write(json.dumps({"runs": runs, **peaks, "rounds": options.rounds, "cores": os.cpu_count()}, indent=1))


if __name__ == "__main__":
    main()
