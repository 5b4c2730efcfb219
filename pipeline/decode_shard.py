"""One shard -> its pixel batches: the same iterator wherever it runs. Here on threads of this process."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.batches import pixel_batches
from pipeline.decode_threads import DecodeThreads
from pipeline.images import ImageSpec
from pipeline.memory_budget import keep_large_blocks_apart
from pipeline.metadata import MetadataColumn
from pipeline.records import ObjectInfo, PixelBatch
from pipeline.shards import IMAGE_EXTENSIONS, read_samples


@dataclass(frozen=True)
class DecodeJob:
    """All that a decoder has to know of a run. `threads`: that decode, those of one process."""

    image_spec: dict[str, Any]
    columns: tuple[MetadataColumn, ...]
    batch_size: int
    threads: int
    image_extensions: tuple[str, ...] = IMAGE_EXTENSIONS
    require_end_marker: bool = True


class Decoder(Protocol):
    """Reads and decodes shards, several at once when it is called from several threads."""

    def batches(self, shard: ObjectInfo) -> Generator[PixelBatch, None, None]:
        """In tar order. Raises ShardError or StorageError; what was yielded before that must be thrown away."""

    def close(self) -> None: ...


class ThreadDecoder:
    """Reads on the caller's thread, and decodes on threads that all shards share, the oldest first."""

    def __init__(self, job: DecodeJob) -> None:
        keep_large_blocks_apart()
        self._job, self._spec = job, ImageSpec.from_json(job.image_spec)
        self._threads = DecodeThreads(job.threads)

    def batches(self, shard: ObjectInfo) -> Generator[PixelBatch, None, None]:
        job = self._job
        samples = read_samples(
            shard,
            metadata_extensions=frozenset(column.extension for column in job.columns),
            image_extensions=job.image_extensions,
            require_end_marker=job.require_end_marker,
        )
        batches = pixel_batches(samples, self._spec, job.batch_size, self._threads.next_shard(), columns=job.columns)
        with closing(samples), closing(batches):
            yield from batches

    def close(self) -> None:
        self._threads.close()
