"""What the benchmark works on: the first images of the configured shards, copied into short shards of its own beside
the output, so that a round takes seconds and the run's own files are never touched."""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jobs.stage_costs import NothingToMeasure, read_first
from pipeline import storage
from pipeline.output import OutputPrefix, part_name
from pipeline.plan import ShardTask
from pipeline.records import ObjectInfo, RawSample
from pipeline.shard_patterns import expand
from pipeline.tokenize_shard import TokenizeJob


@dataclass(frozen=True)
class Material:
    """Copies in shards of `per_shard` images (the last may have fewer). `source_read_s`: seconds an image that reading
    them from their own store took, on one thread, by the clock."""

    shards: tuple[ObjectInfo, ...]
    num_images: int
    per_shard: int
    source_read_s: float

    def tasks(self, number: int) -> list[ShardTask]:
        """So many; where there are fewer shards they come again, under other names."""
        return [
            ShardTask(shard, f"{turn}-{part_name(shard.url)}")
            for turn in range(-(-number // len(self.shards)))
            for shard in self.shards
        ][:number]


def copied(
    shards: Sequence[ObjectInfo], job: TokenizeJob, num_images: int, per_shard: int, output: OutputPrefix
) -> Material:
    """At most `num_images`, or what can be read in a few seconds, into `shards/` of a scratch output. Raises
    ShardError, StorageError, NothingToMeasure."""
    started = time.perf_counter()
    raw = read_first(shards, job, num_images)
    took_s, samples = time.perf_counter() - started, [sample for _, found in raw for sample in found]
    good = [sample for sample in samples if sample.image is not None]
    if not good:
        raise NothingToMeasure(
            f"none of the first {len(samples):,} samples of the shards has an image that can be read"
        )
    per_shard = max(1, min(per_shard, len(good)))
    for first in range(0, len(good), per_shard):
        tar = _tar(good[first : first + per_shard], first, job.image_extensions[0])
        storage.publish(output.file(f"shards/bench-{first:08d}.tar"), tar)
    copies = tuple(expand([output.file("shards")]))
    return Material(copies, len(good), per_shard, took_s / len(samples))


def _tar(samples: Sequence[RawSample], first: int, extension: str) -> bytes:
    """Under new keys: those of different shards may be the same."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for number, sample in enumerate(samples, first):
            for name, data in _members(sample, f"{number:08d}", extension):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def _members(sample: RawSample, key: str, extension: str) -> Iterator[tuple[str, bytes]]:
    assert sample.image is not None
    yield f"{key}.{extension}", sample.image
    yield from ((f"{key}.{other}", data) for other, data in sample.members.items())
