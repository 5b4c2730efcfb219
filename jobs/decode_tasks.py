"""Decoding away from the model: Ray tasks, on any CPU of the cluster, that stream pixel batches to an actor."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Generator
from contextlib import closing
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from jobs.cluster import SWITCH_INTERVAL_S, in_few_words
from jobs.decode_place import BATCHES_AHEAD, DecodeTasks
from jobs.pace import LEAST_DEADLINE_S
from pipeline.decode_shard import DecodeJob, ThreadDecoder
from pipeline.errors import ShardCrashed, ShardError, StorageError
from pipeline.records import ObjectInfo, PixelBatch

RETRIES = 3  # of a task whose process or node died. Ray gives each batch once all the same
SILENT_S = 0.8 * LEAST_DEADLINE_S  # without a batch, of a task that has begun: before its actor is taken to hang
IMPATIENT_S = 5.0  # the wait for a task to begin, once the first was waited for
AT_WORK_S = 30.0  # since a task was heard of: whoever waits may just be behind it in the line
HERE_FOR_S = 60.0  # decode in the actor, when a task did not begin, before another is tried


def decode_shard(job: DecodeJob, shard: ObjectInfo) -> Generator[PixelBatch | None, None, None]:
    """What a task does. The first value says that it has begun."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    yield None
    with closing(ThreadDecoder(job)) as decoder, closing(decoder.batches(shard)) as batches:
        yield from batches


class TaskDecoder:
    """A Decoder, in a model's actor: whoever consumes a stream must have started it. Each shard has a task of its own;
    a shard whose task doesn't begin in time is decoded here, rather than waited for for ever."""

    def __init__(self, job: DecodeJob, tasks: DecodeTasks) -> None:
        self._job, self._wait_s = job, tasks.wait_s
        self._asked_for = str(tasks)
        self._remote = ray.remote(
            num_returns="streaming",
            num_cpus=tasks.cpus,
            resources=dict(tasks.resources) or None,
            label_selector=dict(tasks.labels) or None,
            max_retries=RETRIES,
            _generator_backpressure_num_objects=BATCHES_AHEAD,
        )(decode_shard)
        self._here_until, self._now = 0.0, time.monotonic
        self._knows_cluster, self._heard_at = False, -math.inf  # whether one was waited for; when one was heard of
        self._note, self._lock = "", threading.Lock()
        self._here: ThreadDecoder | None = None

    def batches(self, shard: ObjectInfo) -> Generator[PixelBatch, None, None]:
        """Raises ShardError (ShardCrashed for a task whose process died again and again), StorageError, OSError."""
        if self._now() >= self._here_until:
            stream = self._remote.remote(self._job, shard)
            try:
                if self._has_begun(stream):
                    yield from self._taken(stream, shard)
                    return
            finally:
                ray.cancel(stream)  # a task whose stream is dropped would wait for its reader for ever
        with closing(self._threads().batches(shard)) as batches:
            yield from batches

    def take_note(self) -> str:
        """What a person should know, once."""
        with self._lock:
            note, self._note = self._note, ""
        return note

    def close(self) -> None:
        if self._here is not None:
            self._here.close()

    def _has_begun(self, stream: Any) -> bool:
        """Waits as long as a cluster may take to grow; but not again, once one has begun or could not, except behind
        tasks of this decoder that get on."""
        began = self._now()
        while not ray.wait([stream], timeout=max(0.0, min(IMPATIENT_S, began + self._wait_s - self._now())))[0]:
            now = self._now()
            if now - began >= self._wait_s or (self._knows_cluster and now - self._heard_at > AT_WORK_S):
                self._decode_here(now, now - began)
                return False
        self._knows_cluster, self._heard_at, self._here_until = True, self._now(), 0.0
        return True

    def _decode_here(self, now: float, waited_s: float) -> None:
        with self._lock:
            self._knows_cluster, self._here_until = True, now + HERE_FOR_S
            self._note = (
                f"no decode task began within {waited_s:.0f} s, so shards are decoded in the actor for now: asked for "
                f"{self._asked_for}; ray.decode=threads decodes all of them there, ray.wait_s is how long to wait"
            )

    def _taken(self, stream: Any, shard: ObjectInfo) -> Generator[PixelBatch, None, None]:
        """Views of the object store: a batch's place there is free again when nobody holds the batch."""
        while True:
            if not ray.wait([stream], timeout=SILENT_S)[0]:
                raise ShardCrashed(shard.url, f"its decode task gave nothing for {SILENT_S:.0f} s")
            self._heard_at = self._now()
            reference = next(stream, None)
            if reference is None:
                return
            batch = _value(reference, shard)
            del reference
            if batch is not None:
                yield batch
            del batch

    def _threads(self) -> ThreadDecoder:
        with self._lock:
            self._here = self._here or ThreadDecoder(self._job)
            return self._here


def _value(reference: Any, shard: ObjectInfo) -> PixelBatch | None:
    """Anything but an error of shard or store is charged to the shard: the actor and its model are sound."""
    try:
        batch: PixelBatch | None = ray.get(reference)
        return batch
    except RayTaskError as error:
        if isinstance(error.cause, ShardError | StorageError | OSError):
            raise error.cause from error
        detail = f"its decode task failed: {type(error.cause).__name__}: {in_few_words(error.cause)}"
        raise ShardCrashed(shard.url, detail) from error
    except RayError as error:
        raise ShardCrashed(shard.url, f"its decode task died {RETRIES + 1} times: {in_few_words(error)}") from error
