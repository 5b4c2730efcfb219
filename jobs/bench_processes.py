"""The engine without Ray: a process for each actor that the run would have, with the same worker in it. Its decoder and
its tokenizer are measured alone in the same processes, so that all figures are of the same number of threads."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError
from pipeline.plan import ShardTask
from pipeline.tokenize_shard import TokenizeJob, TokenizeWorker

if TYPE_CHECKING:
    from jobs.tokenize_actor import Source

ENCODE_FOR_S = 1.5
DIED = "a process of the benchmark died: is there memory enough for so many?"
VISIBLE = "CUDA_VISIBLE_DEVICES"
_SPAWN = multiprocessing.get_context("spawn")  # a fork of a process with threads, or with CUDA, may hang


class ProcessFailed(PipelineError):
    """A process of the benchmark raised or died."""


@dataclass(frozen=True)
class Crew:
    """What every process is given. `batches`: a file of decoded pixels (B, H, W, C)."""

    source: Source
    job: TokenizeJob
    shards_in_flight: int
    batches: str


class Processes:
    """A `with` block of `number` processes; the methods run one thing in all of them at the same time, and give images
    a second of all together. Raises ProcessFailed."""

    def __init__(self, crew: Crew, number: int, gpus_each: float) -> None:
        pipes = [_SPAWN.Pipe() for _ in range(number)]
        self._connections = [ours for ours, _ in pipes]
        self._processes = [
            _SPAWN.Process(target=_serve, args=(theirs, crew, _visible(index, gpus_each)), daemon=True)
            for index, (_, theirs) in enumerate(pipes)
        ]
        self._theirs = [theirs for _, theirs in pipes]

    def __enter__(self) -> Processes:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is for whoever started them
        try:
            for process, theirs in zip(self._processes, self._theirs, strict=True):
                process.start()
                theirs.close()  # or the end of the process would not be heard
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        try:
            self._answers()  # they are ready
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            if process.pid is not None:
                process.kill()
                process.join()
        for connection in self._connections:
            connection.close()

    def encode(self) -> float:
        """Batches that are decoded already, one after another."""
        return float(sum(self._call("encode", [()] * len(self._connections))))

    def decode(self, tasks: Sequence[ShardTask]) -> float:
        """Reading and decoding, and nothing else."""
        return self._rate("decode", tasks)

    def tokenize(self, tasks: Sequence[ShardTask]) -> float:
        """The whole way of each shard."""
        return self._rate("tokenize", tasks)

    def _rate(self, what: str, tasks: Sequence[ShardTask]) -> float:
        number, started = len(self._connections), time.perf_counter()
        num_images = sum(self._call(what, [(list(tasks[index::number]),) for index in range(number)]))
        return float(num_images / (time.perf_counter() - started))

    def _call(self, what: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        try:
            for connection, some in zip(self._connections, arguments, strict=True):
                connection.send((what, some))
        except ConnectionError as error:
            raise ProcessFailed(DIED) from error
        return self._answers()

    def _answers(self) -> list[Any]:
        return [self._answer(connection) for connection in self._connections]

    def _answer(self, connection: Connection) -> Any:
        try:
            good, value = connection.recv()
        except (EOFError, ConnectionError) as error:
            raise ProcessFailed(DIED) from error
        if not good:
            raise ProcessFailed(str(value))
        return value


def _visible(index: int, gpus_each: float) -> str | None:
    """The GPU of one process, as Ray would give it; None where none is asked for."""
    if not gpus_each:
        return None
    all_of_them = os.environ.get(VISIBLE)
    number = int(index * gpus_each)
    return all_of_them.split(",")[number] if all_of_them else str(number)


def _serve(connection: Connection, crew: Crew, gpu: str | None) -> None:
    """The life of one process: answers calls until the other side is gone."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if gpu is not None:
        os.environ[VISIBLE] = gpu
    try:
        member = _Member(crew)
        connection.send((True, None))
        while True:
            what, arguments = connection.recv()
            connection.send((True, getattr(member, what)(*arguments)))
    except (EOFError, ConnectionError):
        return
    except Exception as error:  # noqa: BLE001  # whatever it is, it is told over there
        traceback.print_exc() if os.environ.get("DVAE_LOG") == "DEBUG" else None
        connection.send((False, f"{type(error).__name__}: {error}"))


class _Member:
    """In one process: a worker, and its tokenizer and its decoder for themselves."""

    def __init__(self, crew: Crew) -> None:
        from jobs.cluster import SWITCH_INTERVAL_S
        from pipeline.decode_shard import ThreadDecoder

        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._in_flight = crew.shards_in_flight
        self._tokenizer = crew.source.load()
        self._decoder = ThreadDecoder(crew.job.decoding)
        self._worker = TokenizeWorker(self._tokenizer, crew.job)
        pixels_NHWC = np.load(Path(crew.batches))
        self._batches = [
            pixels_NHWC[n : n + crew.job.batch_size] for n in range(0, len(pixels_NHWC), crew.job.batch_size)
        ]
        self._tokenizer.encode(self._batches[0])  # what compiles or looks for the best kernel has done so

    def encode(self) -> float:
        """From as many threads as there are shards in flight, as in a run."""
        until = time.perf_counter() + ENCODE_FOR_S
        encode, batches = self._tokenizer.encode, self._batches
        rates: list[float] = self._on_threads(lambda _: _encode(encode, batches, until), range(self._in_flight))
        return sum(rates)

    def decode(self, tasks: Sequence[ShardTask]) -> int:
        def decode(task: ShardTask) -> int:
            return sum(len(batch.samples) for batch in self._decoder.batches(task.shard))

        return sum(self._on_threads(decode, tasks))

    def tokenize(self, tasks: Sequence[ShardTask]) -> int:
        return sum(self._on_threads(lambda task: self._worker.tokenize(task).num_rows, tasks))

    def _on_threads(self, work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        with ThreadPoolExecutor(self._in_flight) as executor:
            return list(executor.map(work, items))


def _encode(
    encode: Callable[[NDArray[np.uint8]], NDArray[Any]], batches: Sequence[NDArray[np.uint8]], until: float
) -> float:
    """Images a second of one thread; one batch at least."""
    started, num_images = time.perf_counter(), 0
    while True:
        num_images += len(encode(batches[num_images // len(batches[0]) % len(batches)]))
        if (now := time.perf_counter()) >= until:
            return num_images / (now - started)
