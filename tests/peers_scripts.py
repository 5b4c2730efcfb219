"""The scripts that people write: a plain loop, and torch's DataLoader over webdataset. The same pixels as ours, by
Pillow; the rows go to Parquet."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from peers_workloads import BATCH_SIZE, CORES, Ran, Work
from pipeline.images import ImageSpec
from pipeline.records import ImageTokenizer

ROWS_PER_FILE = 1024


def pixels(data: bytes, spec: ImageSpec) -> np.ndarray:
    return resized(Image.open(io.BytesIO(data)).convert("RGB"), spec)


def resized(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """uint8 (size, size, 3): shorter side to `size`, centre crop."""
    ratio = spec.size / min(image.size)
    width, height = (max(spec.size, round(ratio * side)) for side in image.size)
    image = image.resize((width, height), Image.Resampling[spec.resample.upper()])
    left, top = round((width - spec.size) / 2), round((height - spec.size) / 2)
    return np.asarray(image.crop((left, top, left + spec.size, top + spec.size)))


def plain_loop(work: Work) -> Ran:
    """webdataset, Pillow, a batch, the encoder; a Parquet file for each shard. One process, one thread of Python."""
    import webdataset

    tokenizer, started = work.tokenizer(threads=CORES), time.monotonic()
    for shard in work.shards:
        samples = webdataset.WebDataset([shard], shardshuffle=False).to_tuple("__key__", "jpg")
        decoded = ((key, pixels(data, work.spec)) for key, data in samples)
        encoded = [_encoded(tokenizer, batch) for batch in _batches(decoded)]
        _write(Path(work.output) / f"{Path(shard).stem}.parquet", encoded)
    return Ran(started)


def _batches(samples: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[list[str], np.ndarray]]:
    batch: list[tuple[str, np.ndarray]] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == BATCH_SIZE:
            yield collated(batch)
            batch = []
    if batch:
        yield collated(batch)


def collated(batch: list[tuple[str, np.ndarray]]) -> tuple[list[str], np.ndarray]:
    return [key for key, _ in batch], np.stack([each for _, each in batch])


def _encoded(tokenizer: ImageTokenizer, batch: tuple[list[str], np.ndarray]) -> tuple[list[str], np.ndarray]:
    keys, pixels_BHWC = batch
    return keys, tokenizer.encode(pixels_BHWC).reshape(len(keys), -1)


def _write(path: Path, encoded: list[tuple[list[str], np.ndarray]]) -> None:
    keys = [key for some, _ in encoded for key in some]
    tokens_BN = np.concatenate([tokens for _, tokens in encoded]).astype(np.int16)
    column = pa.FixedSizeListArray.from_arrays(pa.array(tokens_BN.reshape(-1)), tokens_BN.shape[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"key": keys, "tokens": column}), path, compression="zstd")


class _Decode:
    """A class and not a closure: DataLoader's workers may have to pickle it."""

    def __init__(self, spec: ImageSpec) -> None:
        self._spec = spec

    def __call__(self, sample: tuple[str, bytes]) -> tuple[str, np.ndarray]:
        return sample[0], pixels(sample[1], self._spec)


def data_loader(work: Work) -> Ran:
    """As many workers as cores read, decode and batch; the encoder and the writing are in this process."""
    import torch
    import webdataset

    torch.set_num_threads(1)  # the workers have the cores
    tokenizer, started = work.tokenizer(threads=1), time.monotonic()
    samples = webdataset.WebDataset(list(work.shards), shardshuffle=False, empty_check=False).to_tuple("__key__", "jpg")
    batches = samples.map(_Decode(work.spec)).batched(BATCH_SIZE, collation_fn=_to_torch)
    loader = torch.utils.data.DataLoader(
        batches, batch_size=None, num_workers=CORES, prefetch_factor=4, multiprocessing_context="fork"
    )  # the default on Linux, which a process that was spawned itself does not have
    waiting: list[tuple[list[str], np.ndarray]] = []
    for number, (keys, tensor) in enumerate(loader):
        waiting.append(_encoded(tokenizer, (keys, tensor.numpy())))
        if sum(len(some) for some, _ in waiting) >= ROWS_PER_FILE:
            _write(Path(work.output) / f"{number:08d}.parquet", waiting)
            waiting = []
    if waiting:
        _write(Path(work.output) / "last.parquet", waiting)
    return Ran(started)


def _to_torch(batch: list[tuple[str, np.ndarray]]) -> tuple[list[str], object]:
    """A tensor goes from a worker to the loop through shared memory, an array by a pipe."""
    import torch

    keys, pixels_BHWC = collated(batch)
    return keys, torch.from_numpy(pixels_BHWC)
