"""Images a second of the tokenising engine, with and without Ray, on the same shards: prints JSON and ratios.

    python tests/bench_engine.py [--shards 'photos/*.tar'] [--images 2048] [--rounds 3] [--gpu-ms 0]

The encoder is free (or sleeps, as a GPU of that speed would), so the figures are the pipeline's own. Runs are
interleaved on one warm cluster of as many CPUs as the machine has; medians with the spread are printed. The decode
ceiling is the same images read and decoded on as many threads, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jobs.actors import ActorPool
from jobs.dispatch import Dispatch
from jobs.pool_settings import PoolSettings
from jobs.ray_actors import RayActors
from make_data import image_bytes, tar_bytes
from pipeline.images import ImageSpec, decode_image
from pipeline.output import OutputPrefix
from pipeline.plan import ShardTask, part_name
from pipeline.records import ObjectInfo
from pipeline.shard_patterns import expand
from pipeline.shards import read_samples
from pipeline.token_table import TableSpec
from pipeline.tokenize_shard import TokenizeJob, TokenizeWorker

CORES = len(os.sched_getaffinity(0))
SHARDS_IN_FLIGHT = 2
SPEC = ImageSpec(size=128, small="upscale")
GPU = threading.Lock()  # encodes one batch after another


@dataclass(frozen=True)
class FreeTokenizer:
    """16x16 tokens of 8192 codes for nothing, or for `image_s` of waiting an image."""

    image_s: float = 0.0
    grid: tuple[int, int] = (16, 16)
    codebook_size: int = 8192
    tokenizer_id: str = "free"

    def load(self) -> FreeTokenizer:
        return self

    def encode(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        with GPU:
            time.sleep(self.image_s * len(pixels_BHWC))
        return pixels_BHWC[:, ::8, ::8, 0].astype(np.int64)


def make_shards(folder: Path, num_images: int, per_shard: int = 256) -> None:
    """JPEGs of 320 to 512 pixels a side."""
    rng = np.random.default_rng(0)
    sides = rng.integers(320, 513, (64, 2)).tolist()
    pictures = [image_bytes(n, width=width, height=height) for n, (width, height) in enumerate(sides)]
    for first in range(0, num_images, per_shard):
        members = [(f"{n:08d}.jpg", pictures[n % 64]) for n in range(first, min(first + per_shard, num_images))]
        (folder / f"bench-{first:08d}.tar").write_bytes(tar_bytes(members))


def decode_only(shards: list[ObjectInfo]) -> int:
    def one(shard: ObjectInfo) -> int:
        return sum(decode_image(s.image, SPEC).pixels_HWC.shape[0] > 0 for s in read_samples(shard) if s.image)

    with ThreadPoolExecutor(CORES) as executor:
        return sum(executor.map(one, shards))


def without_ray(tasks: list[ShardTask], job: TokenizeJob, tokenizer: FreeTokenizer) -> int:
    worker = TokenizeWorker(tokenizer, job)
    with ThreadPoolExecutor(SHARDS_IN_FLIGHT) as executor:
        rows = sum(result.num_rows for result in executor.map(worker.tokenize, tasks))
    worker.close()
    return rows


def measure(run: Callable[[], int]) -> float:
    started = time.perf_counter()
    return run() / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shards", help="a pattern; shards of JPEGs are made without it")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpu-ms", type=float, default=0.0, help="how long the encoder takes for an image")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.shards:
            make_shards(Path(folder), arguments.images)
        report = bench(expand([arguments.shards or folder]), Path(folder), arguments)
    json.dump(report, sys.stdout, indent=2)
    sys.stdout.write("\n")


def bench(shards: list[ObjectInfo], folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    tokenizer = FreeTokenizer(arguments.gpu_ms / 1000)
    table = TableSpec("free", tokenizer.grid, tokenizer.codebook_size, SPEC.to_json())
    job = TokenizeJob(OutputPrefix(str(folder / "out")), table, 64, CORES)
    tasks = [ShardTask(shard, part_name(shard.url)) for shard in shards]
    rates: dict[str, list[float]] = {"decode": [], "no_ray": [], "ray": []}
    with RayEngine(tokenizer, job) as with_ray:
        with_ray(tasks)  # warm: the actor is loaded, the files are in the page cache
        for _ in range(arguments.rounds):
            rates["decode"].append(measure(lambda: decode_only(shards)))
            rates["no_ray"].append(measure(lambda: without_ray(tasks, job, tokenizer)))
            rates["ray"].append(measure(lambda: with_ray(tasks)))
    return {
        "cores": CORES,
        "images": sum(1 for shard in shards for _ in read_samples(shard)),
        "images_per_s": {name: spread(values) for name, values in rates.items()},
        "ratios": {
            "ray_to_no_ray": round(statistics.median(np.divide(rates["ray"], rates["no_ray"])), 3),
            "ray_to_decode_ceiling": round(statistics.median(np.divide(rates["ray"], rates["decode"])), 3),
        },
    }


def spread(values: list[float]) -> dict[str, int]:
    return {"median": round(statistics.median(values)), "min": round(min(values)), "max": round(max(values))}


class RayEngine:
    """One actor on a warm cluster: loading is not counted."""

    def __init__(self, tokenizer: FreeTokenizer, job: TokenizeJob) -> None:
        self._tokenizer, self._job = tokenizer, job

    def __enter__(self) -> RayEngine:
        import ray

        environment = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}
        ray.init(address="local", include_dashboard=False, object_store_memory=150 << 20, log_to_driver=False,
                 logging_level="ERROR", runtime_env=environment)  # fmt: skip
        settings = PoolSettings(1, 0, 1, SHARDS_IN_FLIGHT, 60, 600, 0)
        self._pool = ActorPool(RayActors(self._tokenizer, self._job, settings), settings).__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        self._pool.__exit__()
        ray.shutdown()

    def __call__(self, tasks: list[ShardTask]) -> int:
        dispatch = Dispatch(tasks, attempts=1, in_flight_limit=SHARDS_IN_FLIGHT)
        return sum(result.num_rows for result in self._pool.run(dispatch))  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
