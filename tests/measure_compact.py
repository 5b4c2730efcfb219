"""`dvae compact` on a made run of many parts: rows a second, bytes, and the most memory that it takes.

python tests/measure_compact.py --parts 1000 --rows 1000 --side 16      makes the run anew, in --folder; prints JSON
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from make_data import fake_table
from measure_table_size import Tokens, drawn
from pipeline import storage
from pipeline.ledger import Ledger
from pipeline.manifest import write_manifest
from pipeline.output import OutputPrefix, RunDescription, claim, part_name
from pipeline.records import DecodedSample, ObjectInfo, ShardResult, ShardState
from pipeline.token_table import TableSpec, part_bytes

# B rows of a part, N tokens of a row
CODES, BITS = 8192, 11.86


def make_run(output: OutputPrefix, table: TableSpec, num_parts: int, num_rows: int) -> None:
    """Each part has other rows of the same drawn tokens."""
    claim(output, RunDescription(table, {}, {}), accept_numerics=False)
    tokens_BN = drawn(num_rows, table.num_tokens, CODES, BITS)
    rows = [make_part(output, table, number, (tokens_BN + number) % CODES) for number in range(num_parts)]
    Ledger(output).append(rows)
    write_manifest(output, table, rows, [])


def make_part(output: OutputPrefix, table: TableSpec, number: int, tokens_BN: Tokens) -> ShardResult:
    shard = ObjectInfo(f"s3://images/made/{number:07d}.tar", 1 << 40, f"{number:032x}")
    samples = [
        DecodedSample(f"{number:07d}{n:05d}", n, 1024 + 50_000 * n, 48_211, 512, 384, {}) for n in range(len(tokens_BN))
    ]
    data = part_bytes(table, shard, samples, tokens_BN, 0)
    name = part_name(shard.url)
    storage.publish(output.part(name), data)
    sha256 = hashlib.sha256(data).hexdigest()
    return ShardResult(
        shard.url, shard.size_bytes, shard.etag, ShardState.DONE, name, len(samples), 0, len(data), sha256
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="compact-measured")
    parser.add_argument("--parts", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--target-bytes", type=int, default=256 << 20)
    args = parser.parse_args()
    folder = Path(args.folder).resolve()
    storage.remove_folder(str(folder))
    table = fake_table(grid=(args.side, args.side), codebook_size=CODES)
    make_run(OutputPrefix(f"{folder}/run"), table, args.parts, args.rows)
    command = [sys.executable, "-m", "jobs.cli", "compact", f"{folder}/run", f"{folder}/dest", "--json"]
    started = time.monotonic()
    process = subprocess.Popen([*command, "--target-bytes", str(args.target_bytes)], stdout=subprocess.PIPE)
    said = process.stdout.read() if process.stdout else b""
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    report = json.loads(said)
    figures = {
        "exit_code": os.waitstatus_to_exitcode(status),
        "seconds": round(seconds, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_bytes": usage.ru_maxrss * 1024,
        "rows_per_s": round(report["num_rows"] / seconds),
        "part_bytes_per_s": round(report["part_bytes"] / seconds),
        "ratio": round(report["num_bytes"] / report["part_bytes"], 4),
    }
    sys.stdout.write(json.dumps({**figures, **report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
