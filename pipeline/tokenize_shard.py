"""One shard from start to finish: bytes -> pixels -> tokens -> one part, published whole."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.decode_shard import DecodeJob, Decoder, ThreadDecoder
from pipeline.errors import PublishFailed, StorageError
from pipeline.memory_budget import keep_large_blocks_apart
from pipeline.output import OutputPrefix
from pipeline.plan import ShardTask
from pipeline.records import (
    DecodedSample,
    FailureReason,
    ImageTokenizer,
    PixelBatch,
    SampleFailure,
    ShardResult,
    ShardState,
    Stage,
)
from pipeline.shards import IMAGE_EXTENSIONS
from pipeline.stage_times import StageClock, StageTimes
from pipeline.token_table import TableSpec, errors_bytes, narrow_tokens, part_bytes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizeJob:
    """All that a worker has to know of a run, beside the tokenizer."""

    output: OutputPrefix
    table: TableSpec
    batch_size: int
    decode_threads: int
    image_extensions: tuple[str, ...] = IMAGE_EXTENSIONS
    require_end_marker: bool = True

    @property
    def decoding(self) -> DecodeJob:
        return DecodeJob(
            self.table.image_spec, self.table.columns, self.batch_size, self.decode_threads, self.image_extensions,
            self.require_end_marker,
        )  # fmt: skip


class TokenizeWorker:
    """Holds one tokenizer and a decoder. `tokenize` may be called from several threads at once, one shard each: while
    one shard's batch is encoded, the others are read, decoded and written. The calls meet in the tokenizer only."""

    def __init__(self, tokenizer: ImageTokenizer, job: TokenizeJob, decoder: Decoder | None = None) -> None:
        """`decoder`: threads of this process where it is left out."""
        if tokenizer.tokenizer_id != job.table.tokenizer_id:
            raise ValueError(f"loaded tokenizer {tokenizer.tokenizer_id}, the run wants {job.table.tokenizer_id}")
        keep_large_blocks_apart()
        self._tokenizer, self._job = tokenizer, job
        self._decoder = decoder or ThreadDecoder(job.decoding)
        self._clock = StageClock()

    def tokenize(self, task: ShardTask) -> ShardResult:
        """Tokenise and publish one shard. Raises ShardError or StorageError (nothing is published then), or
        PublishFailed."""
        started = time.monotonic()
        with self._clock.shard():
            samples, tokens_BN, failures = self._encode_shard(task)
            with self._clock.write():
                part = part_bytes(self._job.table, task.shard, samples, tokens_BN, len(failures))
                self._publish(task, part, failures)
        result = ShardResult(
            storage.public_url(task.shard.url), task.shard.size_bytes, task.shard.etag, ShardState.DONE,
            task.part, len(samples), len(failures), len(part), hashlib.sha256(part).hexdigest(),
            round(time.monotonic() - started, 3),
        )  # fmt: skip
        log.info("%s: %d rows, %d failed, %.1f s", result.shard, result.num_rows, result.num_failed, result.seconds)
        return result

    def take_times(self) -> StageTimes:
        """What was spent since this was last asked, on failed shards too."""
        return self._clock.take()

    def _encode_shard(self, task: ShardTask) -> tuple[list[DecodedSample], NDArray[Any], list[SampleFailure]]:
        rows: list[DecodedSample] = []
        tokens = bytearray()  # grows in place: a list of batches and their whole would be two copies
        failures: list[SampleFailure] = []
        with closing(self._decoder.batches(task.shard)) as batches:
            for batch in self._awaited(batches):
                if batch.samples:
                    tokens += self._encode(batch.pixels_BHWC)[: len(batch.samples)].tobytes()
                rows.extend(batch.samples)
                failures.extend(batch.failures)
                del batch  # not held while the next is awaited: it may be a place in the object store
        table = self._job.table
        return rows, np.frombuffer(tokens, table.token_dtype).reshape(-1, table.num_tokens), failures

    def _awaited(self, batches: Iterator[PixelBatch]) -> Iterator[PixelBatch]:
        """The same, with the waiting counted."""
        while True:
            started = time.monotonic()
            batch = next(batches, None)
            waited_s = time.monotonic() - started
            if batch is None:
                self._clock.waited(waited_s, waited_s)  # until it was known that there is no more
                return
            self._clock.waited(waited_s, batch.reading_s)
            yield batch
            del batch

    def _encode(self, pixels_BHWC: NDArray[np.uint8]) -> NDArray[Any]:
        with self._clock.encode():
            tokens_BHW = self._tokenizer.encode(pixels_BHWC)
        if len(tokens_BHW) != len(pixels_BHWC):
            raise ValueError(f"the encoder gave {len(tokens_BHW)} grids for {len(pixels_BHWC)} images")
        return narrow_tokens(tokens_BHW, self._job.table)

    def _publish(self, task: ShardTask, part: bytes, failures: list[SampleFailure]) -> None:
        """Errors before the part, so that a part implies its errors; the part is the commit."""
        output = self._job.output
        try:
            if failures:
                storage.publish(output.errors(task.part), errors_bytes(task.shard, failures))
            elif task.has_errors_file:
                storage.remove(output.errors(task.part))
            storage.publish(output.part(task.part), part)
        except StorageError as error:
            raise PublishFailed(str(error)) from error

    def close(self) -> None:
        self._decoder.close()


def quarantine(
    output: OutputPrefix, task: ShardTask, reason: FailureReason, message: str, attempts: int
) -> ShardResult:
    """Record a shard that was given up: an errors file with one row of stage `shard`, so that the ledger can be
    made again from the files. A part of earlier bytes of the shard is removed first."""
    storage.remove(output.part(task.part))
    failure = SampleFailure(None, None, None, None, Stage.SHARD, reason, message[:2000])
    storage.publish(output.errors(task.part), errors_bytes(task.shard, [failure]))
    return ShardResult(
        storage.public_url(task.shard.url), task.shard.size_bytes, task.shard.etag, ShardState.QUARANTINED,
        attempts=attempts, reason=reason.value, message=message[:2000],
    )  # fmt: skip
