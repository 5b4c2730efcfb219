"""Tokenizers that stand in for a model inside real Ray actors: they record, are slow, die, hang. Sources are plain
data, so that they travel to the actors; what they do there goes through files, for all to see."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jobs.checkpoints import CheckpointHead
from pipeline.plan import ShardTask
from pipeline.records import ShardResult
from pipeline.tokenize_shard import TokenizeWorker


class HeadTokenizer:
    """Claims to be the checkpoint's tokenizer; its tokens are pixels, so every image has its own."""

    def __init__(self, head: CheckpointHead) -> None:
        self.grid, self.codebook_size, self.tokenizer_id = head.grid, head.codebook_size, head.tokenizer_id

    def encode(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        step = pixels_BHWC.shape[1] // self.grid[0]
        return pixels_BHWC[:, ::step, ::step].sum(axis=3, dtype=np.int64) % self.codebook_size


@dataclass(frozen=True)
class FakeSource:
    """`seconds`: how long a batch takes, as on a GPU of that speed: one after another."""

    head: CheckpointHead
    seconds: float = 0.0

    def load(self) -> HeadTokenizer:
        tokenizer = HeadTokenizer(self.head)
        encode, gpu = tokenizer.encode, threading.Lock()

        def slow(pixels_BHWC: np.ndarray) -> np.ndarray:
            with gpu:
                time.sleep(self.seconds)
            return encode(pixels_BHWC)

        tokenizer.encode = slow  # type: ignore[method-assign]
        return tokenizer


@dataclass(frozen=True)
class RecordingSource(FakeSource):
    """Writes `<time> <pid> <shards open>` to a file whenever its worker takes up a shard or is done with one.
    `first_waits_for`: the first shards stay open until so many were at once, a minute at most."""

    log: str = ""
    first_waits_for: int = 1

    def load(self) -> HeadTokenizer:
        tokenize, num_open, most, changed = TokenizeWorker.tokenize, 0, 0, threading.Condition()

        def note(change: int) -> None:
            nonlocal num_open, most
            with changed, Path(self.log).open("a") as file:
                num_open += change
                most = max(most, num_open)
                file.write(f"{time.time()} {os.getpid()} {num_open}\n")
                changed.notify_all()

        def recorded(worker: TokenizeWorker, task: ShardTask) -> ShardResult:
            note(+1)
            try:
                with changed:
                    changed.wait_for(lambda: most >= self.first_waits_for, 60)
                return tokenize(worker, task)
            finally:
                note(-1)

        TokenizeWorker.tokenize = recorded  # type: ignore[method-assign]
        return super().load()


@dataclass(frozen=True)
class ShardFault(FakeSource):
    """Does `deed` in the actor when it reads a shard with `needle` in its name; `times`: how often in all."""

    needle: str = ""
    deed: str = "exit"  # see `do`
    times: int = 1_000_000
    marks: str = ""  # a folder: one file for each deed done

    def load(self) -> HeadTokenizer:
        from pipeline import decode_shard

        read_samples = decode_shard.read_samples

        def faulty(shard: Any, **options: Any) -> Iterator[Any]:
            if self.needle in shard.url and len(list(Path(self.marks).iterdir())) < self.times:
                (Path(self.marks) / f"{time.time_ns()}").touch()
                do(self.deed)
            yield from read_samples(shard, **options)

        decode_shard.read_samples = faulty
        return super().load()


@dataclass(frozen=True)
class SeveralFaults(FakeSource):
    """Shards with these words in their names suffer these deeds, whenever they are read."""

    deeds: tuple[tuple[str, str], ...] = ()

    def load(self) -> HeadTokenizer:
        from pipeline import decode_shard

        read_samples = decode_shard.read_samples

        def faulty(shard: Any, **options: Any) -> Iterator[Any]:
            for needle, deed in self.deeds:
                if needle in shard.url:
                    do(deed)
            yield from read_samples(shard, **options)

        decode_shard.read_samples = faulty
        return super().load()


class CannotTravel(Exception):
    """Pickled, it cannot be made again: it wants two arguments and holds one."""

    def __init__(self, what: str, more: str) -> None:
        super().__init__(f"{what} {more}")


def do(deed: str) -> None:
    """What may befall a process that reads a shard."""
    if deed == "exit":
        os._exit(11)
    if deed == "kill":  # as the kernel or Ray's memory monitor do
        os.kill(os.getpid(), signal.SIGKILL)
    if deed == "hang":
        time.sleep(3600)
    if deed == "break":  # the process, for good
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if deed == "cuda out of memory":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    if deed == "out of memory":
        raise MemoryError
    if deed == "cannot travel":
        raise CannotTravel("no words", "for it")
    raise OSError("the store fell over")


@dataclass(frozen=True)
class LoadFault(FakeSource):
    """The first `good` loads succeed, and no other. Each leaves a mark with its number."""

    good: int = 1
    marks: str = ""

    def load(self) -> HeadTokenizer:
        if self._number() >= self.good:
            raise OSError("this machine cannot load it")
        return super().load()

    def _number(self) -> int:
        for number in itertools.count():
            with suppress(FileExistsError):
                (Path(self.marks) / str(number)).touch(exist_ok=False)
                return number
        raise AssertionError
