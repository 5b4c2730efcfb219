"""Our engine: on Ray with what its defaults choose on this machine, and its worker without Ray; and what decoding alone
takes."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

from jobs.cluster import SWITCH_INTERVAL_S
from jobs.config import check
from jobs.stage_costs import stage_costs
from jobs.tokenize_config import TokenizeConfig
from peers_workloads import BATCH_SIZE, CORES, Ran, Work
from pipeline.images import decode_image
from pipeline.plan import ShardTask
from pipeline.records import ShardResult
from pipeline.shards import read_samples
from pipeline.tokenize_shard import TokenizeWorker

START_S = 120.0
STAGE_IMAGES = 256


def decode_only(work: Work) -> Ran:
    """The ceiling: the images read and decoded on as many threads as cores, and nothing else."""

    def one(task: ShardTask) -> int:
        images = (sample.image for sample in read_samples(task.shard))
        return sum(decode_image(image, work.spec).pixels_HWC.shape[0] > 0 for image in images if image)

    with ThreadPoolExecutor(CORES) as executor:
        return Ran(num_images=sum(executor.map(one, work.tasks)))


def stages_alone(work: Work) -> Ran:
    """CPU seconds an image of reading, decoding, encoding and writing, each by itself on one thread."""
    tokenizer, job = work.tokenizer(threads=1), work.job(1)
    costs = stage_costs([task.shard for task in work.tasks], work.spec, tokenizer, job, STAGE_IMAGES)
    names = ("read_s", "decode_s", "encode_s", "write_s")
    return Ran(num_images=costs.num_images, stages={name: getattr(costs, name) for name in names})


def config(work: Work, **options: Any) -> TokenizeConfig:
    """As a user would write it; `options`: settings of its section `ray`."""
    gpus = {"gpus_per_actor": 1} if work.row.on_gpu else {}
    values = {"checkpoint": work.checkpoint, "shards": list(work.shards), "output": work.output}
    return check(TokenizeConfig, {**values, "batch_size": BATCH_SIZE, "ray": {**gpus, **options}}, "bench")


def without_ray(work: Work) -> Ran:
    """As many workers in this process as the engine has actors, on threads."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)  # as an actor does
    num_workers = 1 if work.row.on_gpu else CORES
    in_flight = config(work).ray.shards_in_flight
    with ExitStack() as stack:
        source, job = work.source(threads=1), work.job(max(1, CORES // num_workers))
        workers = [stack.enter_context(closing(TokenizeWorker(source.load(), job))) for _ in range(num_workers)]
        started = time.monotonic()
        pools = [stack.enter_context(ThreadPoolExecutor(in_flight)) for _ in workers]
        results = [
            pools[n % num_workers].submit(workers[n % num_workers].tokenize, task) for n, task in enumerate(work.tasks)
        ]
        _check([result.result() for result in results])
    return Ran(started)


def on_ray(work: Work) -> Ran:
    return _on_ray(work)


def _on_ray(work: Work, **options: Any) -> Ran:
    """The clock starts when all actors are loaded: the cluster is warm."""
    import ray

    from jobs.actors import ActorPool
    from jobs.dispatch import Dispatch
    from jobs.pool_settings import decode_threads, pool_settings
    from jobs.ray_actors import RayActors

    settings = config(work, **options)
    pool_size = pool_settings(settings, len(work.shards))
    job = work.job(decode_threads(settings, pool_size.num_actors))
    actors = _remembering(RayActors)(work.source(settings.threads), job, pool_size)
    with ActorPool(actors, pool_size) as pool:
        ray.wait(actors.loads, num_returns=pool_size.num_actors, timeout=START_S)
        started = time.monotonic()
        dispatch = Dispatch(work.tasks, attempts=1, in_flight_limit=settings.ray.shards_in_flight)
        _check(list(pool.run(dispatch)))
    return Ran(started)


def _remembering(base: type[Any]) -> type[Any]:
    """RayActors that keep the calls that load, so that one can wait for them all."""

    class Remembering(base):  # type: ignore[misc]
        def load(self, actor: Any) -> Any:
            self.__dict__.setdefault("loads", []).append(super().load(actor))
            return self.loads[-1]

    return Remembering


def _check(results: list[Any]) -> None:
    """The rows are counted in the files; a shard that was given up must not pass for a fast one."""
    assert all(isinstance(result, ShardResult) and not result.num_failed for result in results), results
