"""Ray Data's ways to do it: as its documentation shows, and tuned in two ways by somebody who knows it.

`Ran.started` is the clock of a run: the first moment at which any of its functions was at work. Planning, and the start
of worker processes before that, are not held against Ray Data: our actors are warm too when our clock starts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from peers_scripts import collated, pixels, resized
from peers_workloads import BATCH_SIZE, CORES, Ran, Work
from pipeline.images import ImageSpec

START_S = 120
Source = Any  # with .load() -> ImageTokenizer


class Encode:
    """The actor class of map_batches."""

    def __init__(self, source: Source) -> None:
        self._tokenizer = source.load()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tokens_BHW = self._tokenizer.encode(np.ascontiguousarray(batch["pixels"]))
        return {"key": batch["key"], "tokens": tokens_BHW.reshape(len(tokens_BHW), -1).astype(np.int16)}


def defaults(work: Work) -> Ran:
    """read_webdataset as it comes, which decodes; map to resize, map_batches with an actor, write_parquet."""
    import ray

    marks = _marks(work)
    images = ray.data.read_webdataset(list(work.shards))
    smaller = images.map(partial(_resize, spec=work.spec, marks=marks))
    _write(smaller, work, _actors(work))
    return _ran(marks)


def _resize(row: dict[str, Any], spec: ImageSpec, marks: str) -> dict[str, Any]:
    from PIL import Image

    _mark(marks)
    image = Image.fromarray(row["jpg"])
    return {"key": row["__key__"], "pixels": resized(image, spec)}


def tuned_read(work: Work) -> Ran:
    """read_webdataset without decoding, a map_batches that decodes; as many blocks as shards."""
    import ray

    marks = _marks(work)
    raw = ray.data.read_webdataset(list(work.shards), decoder=None, override_num_blocks=len(work.shards))
    decoded = raw.map_batches(partial(_decode, spec=work.spec, marks=marks), batch_size=BATCH_SIZE)
    _write(decoded, work, _actors(work))
    return _ran(marks)


def _decode(batch: dict[str, Any], spec: ImageSpec, marks: str) -> dict[str, np.ndarray]:
    _mark(marks)
    return {"key": batch["__key__"], "pixels": np.stack([pixels(data, spec) for data in batch["jpg"]])}


def tuned_tasks(work: Work) -> Ran:
    """A task for each shard reads, decodes and yields whole batches: no row of Python between the tar and the actor."""
    import ray

    marks = _marks(work)
    shards = ray.data.from_items([{"shard": shard} for shard in work.shards], override_num_blocks=len(work.shards))
    decoded = shards.map_batches(partial(_decode_shards, spec=work.spec, marks=marks), batch_size=1)
    _write(decoded, work, _actors(work))
    return _ran(marks)


def _decode_shards(batch: dict[str, Any], spec: ImageSpec, marks: str) -> Iterator[dict[str, np.ndarray]]:
    import webdataset

    _mark(marks)
    samples = webdataset.WebDataset(list(batch["shard"]), shardshuffle=False).to_tuple("__key__", "jpg")
    waiting: list[tuple[str, np.ndarray]] = []
    for key, data in samples:
        waiting.append((key, pixels(data, spec)))
        if len(waiting) == BATCH_SIZE:
            yield _as_batch(waiting)
            waiting = []
    if waiting:
        yield _as_batch(waiting)


def _as_batch(samples: list[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    keys, pixels_BHWC = collated(samples)
    return {"key": np.array(keys), "pixels": pixels_BHWC}


def _actors(work: Work) -> dict[str, Any]:
    """One actor with the GPU, and all cores for decoding; of a model on the CPU as many actors as cores, which leave
    a core for decoding."""
    from ray.data import ActorPoolStrategy

    if work.row.on_gpu:
        return {"compute": ActorPoolStrategy(size=1), "num_gpus": 1, "num_cpus": 0}
    return {"compute": ActorPoolStrategy(size=CORES), "num_cpus": 1 / CORES}


def _write(images: Any, work: Work, actors: dict[str, Any]) -> None:
    import ray

    context, source = ray.data.DataContext.get_current(), work.source(threads=1)
    context.enable_progress_bars = False
    context.wait_for_min_actors_s = START_S  # the model is loaded before anything is read, as it is with everybody
    tokens = images.map_batches(Encode, fn_constructor_args=(source,), batch_size=BATCH_SIZE, **actors)
    tokens.write_parquet(work.output)


_MARKED: set[str] = set()


def _marks(work: Work) -> str:
    folder = Path(work.output + "-marks")
    folder.mkdir(parents=True)
    return str(folder)


def _mark(marks: str) -> None:
    """Once in each process: the moment at which it was first at work."""
    if marks not in _MARKED:
        _MARKED.add(marks)
        (Path(marks) / str(time.monotonic())).touch()


def _ran(marks: str) -> Ran:
    return Ran(min(float(path.name) for path in Path(marks).iterdir()))
