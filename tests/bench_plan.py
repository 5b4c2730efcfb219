"""What a plan costs on a store that counts requests: prints JSON with seconds, peak memory, and requests by kind.

    python tests/bench_plan.py [--shards 1000000] [--done 500000] [--adopted 200] [--removed 1000]

The store hands out entries as s3fs gives them, 1,000 keys a page; shards and parts have no bytes behind them, but the
ledger is real segments and the parts without a ledger row are real parts. The plan goes through the functions of a run:
expand, make_plan (which reads the ledger), record_plan, then what a Session holds of it while the rest is done, and at
the end the ledger's rows and the manifest of all shards. A process of its own makes the store's content, so that the
peak is the plan's alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from jobs.dispatch import Dispatch
from jobs.recording import Recording
from make_data import fake_table
from pipeline import storage
from pipeline.ledger import Ledger
from pipeline.manifest import write_manifest
from pipeline.output import OutputPrefix, part_name
from pipeline.plan import collector_paused, make_plan, record_plan
from pipeline.records import ObjectInfo, ShardResult, ShardState
from pipeline.shard_patterns import expand
from pipeline.token_table import part_bytes

PAGE_KEYS = 1000  # of a listing, as S3 has it
ROWS_A_SEGMENT = 20_000
SHARD_BYTES, PART_BYTES = 268_435_456, 20_971_520
OUTPUT = OutputPrefix("counted://bucket/out")
WHEN = datetime(2026, 1, 1, tzinfo=UTC)
FAILED_EVERY = 100  # one of so many shards has a failed image


def shard_url(number: int) -> str:
    return f"counted://bucket/in/images-{number:07d}.tar"


class CountedStore(AbstractFileSystem):
    """`counted://bucket/`: small objects with bytes, and folders of entries without."""

    protocol = "counted"
    cachable = True
    requests: ClassVar[Counter[str]] = Counter()
    objects: ClassVar[dict[str, bytes]] = {}
    folders: ClassVar[dict[str, Callable[[], Iterator[tuple[str, int]]]]] = {}

    def find(self, path: str, maxdepth: int | None = None, withdirs: bool = False, **options: Any) -> Any:
        prefix = f"{self._strip_protocol(path)}/"
        found = {name: _entry(name, len(data)) for name, data in self.objects.items() if name.startswith(prefix)}
        for folder, entries in self.folders.items():
            if folder.startswith(prefix) or folder == prefix:
                found.update((folder + name, _entry(folder + name, size)) for name, size in entries())
        self.requests["list"] += max(1, -(-len(found) // PAGE_KEYS))
        return found if options.get("detail") else list(found)

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        found = self.find(path, detail=True)
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        self.requests["head"] += 1
        name = self._strip_protocol(path)
        if name not in self.objects:
            raise FileNotFoundError(path)
        return _entry(name, len(self.objects[name]))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        self.requests["get"] += 1
        try:
            return self.objects[self._strip_protocol(path)][start:end]
        except KeyError:
            raise FileNotFoundError(path) from None

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        self.requests["put"] += 1
        self.objects[self._strip_protocol(path)] = value

    def rm_file(self, path: str) -> None:
        self.requests["delete"] += 1
        with suppress(KeyError):
            del self.objects[self._strip_protocol(path)]

    def _open(self, path: str, mode: str = "rb", block_size: Any = None, **options: Any) -> _CountedFile:
        return _CountedFile(self, path, mode, block_size=block_size)


class _CountedFile(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        return bytes(self.fs.cat_file(self.path, start, end))


def _entry(name: str, size: int) -> dict[str, Any]:
    """As s3fs makes them of a listing."""
    return {
        "Key": name, "LastModified": WHEN, "ETag": f'"{name[-11:]}"', "Size": size,
        "StorageClass": "STANDARD", "type": "file", "size": size, "name": name,
    }  # fmt: skip


def make_content(folder: Path, num_done: int, num_adopted: int, num_removed: int) -> None:
    """Ledger segments, the parts without a row, and the names of all other parts, as files in `folder`."""
    table, first_removed = fake_table(), 9_000_000
    output = OutputPrefix(str(folder))
    with (folder / "names").open("w") as names:
        ledger, rows = Ledger(output), []
        for number in [*range(num_done - num_adopted), *range(first_removed, first_removed + num_removed)]:
            rows.append(_row(number))
            names.write(f"{rows[-1].part}\t{rows[-1].num_failed}\n")
            if len(rows) == ROWS_A_SEGMENT:
                ledger.append(rows)
                rows = []
        ledger.append(rows)
    for number in range(num_done - num_adopted, num_done):
        shard = ObjectInfo(shard_url(number), SHARD_BYTES, _etag(number))
        data = part_bytes(table, shard, [], np.empty((0, table.num_tokens)), 0)
        storage.publish(output.part(part_name(shard.url)), data)


def _etag(number: int) -> str:
    return f"{number:07d}.tar"


def _row(number: int) -> ShardResult:
    url = shard_url(number)
    num_failed = int(number % FAILED_EVERY == 0)
    return ShardResult(
        url, SHARD_BYTES, _etag(number), ShardState.DONE, part_name(url), 10_000 - num_failed, num_failed,
        PART_BYTES, f"{number:064x}", 12.5,
    )  # fmt: skip


def serve(folder: Path, num_shards: int) -> None:
    """The content of `folder` behind the store."""
    fsspec.register_implementation("counted", CountedStore, clobber=True)
    for path in [*folder.glob("ledger/*.parquet"), *folder.glob("tokens/*.parquet")]:
        CountedStore.objects[f"bucket/out/{path.parent.name}/{path.name}"] = path.read_bytes()

    def parts(wanted: Callable[[str], bool], size: int) -> Callable[[], Iterator[tuple[str, int]]]:
        def entries() -> Iterator[tuple[str, int]]:
            with (folder / "names").open() as lines:
                split = (line.rstrip("\n").split("\t") for line in lines)
                yield from ((name, size) for name, num_failed in split if wanted(num_failed))

        return entries

    CountedStore.folders.update({
        "bucket/in/": lambda: ((f"images-{n:07d}.tar", SHARD_BYTES) for n in range(num_shards)),
        "bucket/out/tokens/": parts(lambda _: True, PART_BYTES),
        "bucket/out/errors/": parts(lambda num_failed: num_failed != "0", 4096),
    })  # fmt: skip


class Meter:
    """Seconds (of the clock, of the processor), requests, and the peak of memory so far, after each step."""

    def __init__(self) -> None:
        self.steps: dict[str, dict[str, Any]] = {}
        self._at, self._cpu_at = time.perf_counter(), time.process_time()

    def step(self, name: str) -> None:
        requests, CountedStore.requests = CountedStore.requests, Counter()
        self.steps[name] = {
            "seconds": round(time.perf_counter() - self._at, 2),
            "cpu_seconds": round(time.process_time() - self._cpu_at, 2),
            "peak_mb": memory_mb("VmHWM"),
            "now_mb": memory_mb("VmRSS"),
            "requests": dict(requests),
        }
        self._at, self._cpu_at = time.perf_counter(), time.process_time()


def memory_mb(which: str) -> int:
    """Of this program alone: what getrusage says is at least what the parent had when it forked."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(which)).split()[1]) // 1024


def measure(folder: Path, num_shards: int, pattern: str) -> dict[str, Any]:
    serve(folder, num_shards)
    meter = Meter()
    meter.step("start")
    with collector_paused():
        shards = expand([pattern])
    meter.step("expand")
    with collector_paused():
        plan = make_plan(shards, OUTPUT, Ledger(OUTPUT), fake_table())
    del shards
    meter.step("make_plan")
    record_plan(OUTPUT, plan, {})
    said, removed, num_adopted, num_before = plan.describe(), plan.removed, len(plan.adopted), len(plan.done)
    recording = Recording(Ledger(OUTPUT), plan)
    totals = recording.totals
    dispatch = Dispatch(plan.todo, attempts=3, in_flight_limit=2)
    plan = replace(plan, done=(), adopted=())
    meter.step("recording and dispatch")
    for number in range(num_before, num_shards):
        recording.note(_row(number))
    recording.close()
    meter.step("rows of the rest")
    left = not dispatch.finished
    del plan, dispatch
    rows = recording.rows(removed)
    meter.step("ledger read again")
    write_manifest(OUTPUT, fake_table(), rows, removed)
    meter.step("write_manifest")
    write_manifest(OUTPUT, fake_table(), rows, removed)
    meter.step("write_manifest again")

    def total(what: str) -> float:
        return round(sum(meter.steps[name][what] for name in ("expand", "make_plan")), 2)

    return {
        "plan": said, "adopted": num_adopted, "rows": totals.num_rows, "left": left,
        "manifest_mb": round(len(CountedStore.objects["bucket/out/manifest.json"]) / 1e6, 1), "steps": meter.steps,
        "plan_seconds": total("seconds"), "plan_cpu_seconds": total("cpu_seconds"),
        "plan_peak_mb": meter.steps["make_plan"]["peak_mb"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--done", type=int, default=500_000)
    parser.add_argument("--adopted", type=int, default=200)
    parser.add_argument("--removed", type=int, default=1000)
    parser.add_argument("--pattern", default="counted://bucket/in/*.tar")
    parser.add_argument("--content", help="a folder that an earlier run of this program made")
    options = parser.parse_args()
    logging.basicConfig(level="ERROR")
    if options.content:
        sys.stdout.write(json.dumps(measure(Path(options.content), options.shards, options.pattern), indent=1) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        make_content(Path(folder), options.done, options.adopted, options.removed)
        again = [sys.executable, __file__, *sys.argv[1:], "--content", folder]
        sys.stdout.write(subprocess.run(again, stdout=subprocess.PIPE, text=True, check=True).stdout)


if __name__ == "__main__":
    main()
