"""Our engine: on Ray with what its defaults choose on this machine, and its worker without Ray; and what decoding alone
takes."""

from __future__ import annotations

import multiprocessing
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

from jobs.cluster import SWITCH_INTERVAL_S
from jobs.config import check
from jobs.decode_place import SHARDS_ON_THREADS
from jobs.dispatch import Dispatch
from jobs.stage_costs import stage_costs
from jobs.tokenize_config import TokenizeConfig
from peers_workloads import BATCH_SIZE, CORES, Ran, Work, tasks
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
    """The engine's worker in this process; of a model on the CPU one in each of as many processes as cores, each with
    its share of the shards, as the actors have them."""
    if work.row.on_gpu:
        load(work, CORES)
        forget_rows(work)
        return Ran(tokenize(work.tasks))
    with ProcessPoolExecutor(CORES, multiprocessing.get_context("fork")) as pool:
        ready = multiprocessing.get_context("fork").Manager().Barrier(CORES)
        wait_for([pool.submit(load, work, 1, ready) for _ in range(CORES)])
        forget_rows(work)
        started = time.monotonic()
        wait_for([pool.submit(tokenize, work.tasks[n::CORES]) for n in range(CORES)])
    return Ran(started)


_WORKER: list[TokenizeWorker] = []  # of this process


def load(work: Work, decode_threads: int, ready: Any = None) -> None:
    """`ready`: a barrier of all processes, so that each of them loads."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)  # as an actor does
    _WORKER[:] = [TokenizeWorker(work.tokenizer(threads=1), work.job(decode_threads))]
    for task in tasks(work.warm):
        _WORKER[0].tokenize(task)
    if ready is not None:
        ready.wait(START_S)


def tokenize(some: Sequence[ShardTask]) -> float:
    """When it began."""
    started = time.monotonic()
    with ThreadPoolExecutor(SHARDS_ON_THREADS) as executor:
        _check(list(executor.map(_WORKER[0].tokenize, some)))
    _WORKER[0].close()
    return started


def forget_rows(work: Work) -> None:
    """Those of the small shards, which warmed the processes."""
    shutil.rmtree(work.output, ignore_errors=True)


def wait_for(futures: Iterable[Future[Any]]) -> None:
    for future in futures:
        future.result()


def on_ray(work: Work) -> Ran:
    """Decoding on threads of the actors."""
    return _on_ray(work, decode="threads")


def on_ray_tasks(work: Work) -> Ran:
    """Decoding in tasks, beside an actor that waits for its GPU and needs no core set aside."""
    return _on_ray(work, decode="tasks", **({"cpus_per_actor": 0} if work.row.on_gpu else {}))


def _on_ray(work: Work, **options: Any) -> Ran:
    """The clock starts when each actor is loaded and has had a small shard, as in a long run."""
    import ray

    from jobs.actors import ActorPool
    from jobs.pool_settings import pool_settings
    from jobs.ray_actors import RayActors

    settings = config(work, **options)
    pool_size = pool_settings(settings, len(work.shards))
    job = work.job(pool_size.decode_threads)
    actors = _remembering(RayActors)(work.source(settings.threads), job, pool_size)
    with ActorPool(actors, pool_size) as pool:
        ray.wait(actors.loads, num_returns=pool_size.num_actors, timeout=START_S)
        _check(list(pool.run(Dispatch(tasks(work.warm), attempts=1, in_flight_limit=pool_size.shards_in_flight))))
        forget_rows(work)
        started = time.monotonic()
        _check(list(pool.run(Dispatch(work.tasks, attempts=1, in_flight_limit=pool_size.shards_in_flight))))
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
