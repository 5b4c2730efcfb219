"""The samples in one shard. Owns WebDataset's grouping rules; tar_members.py owns the tar format."""

from __future__ import annotations

import re
from collections.abc import Collection, Generator, Iterable, Iterator
from contextlib import closing
from functools import lru_cache

from pipeline import shard_stream
from pipeline.records import FailureReason, ObjectInfo, RawSample
from pipeline.tar_members import Member, tar_members

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif")
MAX_IMAGE_BYTES = 256 << 20  # a larger member is stepped over, so that memory stays bounded
MAX_METADATA_BYTES = 16 << 20
_KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
_META_MEMBER = re.compile(r"__[^/]*__($|/)")


@lru_cache(maxsize=16)  # a name is asked after four times in a row
def split_key(name: str) -> tuple[str, str] | None:
    """(key, lower-case extension) of a member, split at the first dot of its base name; None for a member
    that belongs to no sample. The same rule as webdataset's `base_plus_ext` and its default `skip_meta`."""
    match = None if _META_MEMBER.match(name) else _KEY_AND_EXTENSION.match(name)
    return (match[1], match[2].lower()) if match else None


def _extension(name: str) -> str:
    return (split_key(name) or ("", ""))[1]


def read_samples(
    shard: ObjectInfo,
    *,
    metadata_extensions: Collection[str] = (),
    image_extensions: Collection[str] = IMAGE_EXTENSIONS,
    require_end_marker: bool = True,
) -> Generator[RawSample, None, None]:
    """Every sample of the shard, in tar order. Each comes once: one without a single good image member has
    its `failure` set. Raises ShardTruncated, ShardDamaged, ShardChanged or ShardUnreadable; what was yielded
    before that must then be thrown away."""

    def wanted(name: str) -> int:
        extension = _extension(name)
        if _image_rank(extension, image_extensions) is not None:
            return MAX_IMAGE_BYTES
        return MAX_METADATA_BYTES if extension in metadata_extensions else 0

    with closing(shard_stream.open_shard(shard)) as stream:
        members = tar_members(stream, shard, wanted, require_end_marker=require_end_marker)
        seen: set[str] = set()
        for index, (key, group) in enumerate(_groups(members)):
            yield _sample(key, index, group, image_extensions, metadata_extensions, repeated=key in seen)
            seen.add(key)


def _groups(members: Iterable[Member]) -> Iterator[tuple[str, list[Member]]]:
    """Neighbouring members with the same key, as webdataset's `group_by_keys`."""
    current: str | None = None
    group: list[Member] = []
    for member in members:
        split = split_key(member.name)
        if split is None:
            continue
        if current is not None and split[0] != current:
            yield current, group
            group = []
        current = split[0]
        group.append(member)
    if current is not None:
        yield current, group


def _image_rank(extension: str, image_extensions: Collection[str]) -> int | None:
    """0 for an image extension, 1 for one behind another dot (`seg.png`), None for no image."""
    if extension in image_extensions:
        return 0
    return 1 if extension.rpartition(".")[2] in image_extensions else None


def _sample(
    key: str,
    index: int,
    group: list[Member],
    image_extensions: Collection[str],
    metadata_extensions: Collection[str],
    *,
    repeated: bool,
) -> RawSample:
    image, failure, detail = _choose_image(group, image_extensions)
    metadata, metadata_failure, metadata_detail = _choose_metadata(group, metadata_extensions)
    if failure is None:
        failure, detail = metadata_failure, metadata_detail
    if repeated:
        failure, detail = FailureReason.DUPLICATE_KEY, f"the key {key!r} came before in this shard"
    if image is None:
        return RawSample(key, index, None, 0, None, metadata, failure, detail)
    data = None if failure else image.data
    return RawSample(key, index, image.offset, image.size, data, metadata, failure, detail)


def _choose_image(
    group: list[Member], image_extensions: Collection[str]
) -> tuple[Member | None, FailureReason | None, str]:
    ranked = [(_image_rank(_extension(m.name), image_extensions), m) for m in group]
    best = min((rank for rank, _ in ranked if rank is not None), default=None)
    images = [member for rank, member in ranked if rank == best and rank is not None]
    names = ", ".join(member.name for member in images)
    if not images:
        return None, FailureReason.NO_IMAGE, "members: " + ", ".join(m.name for m in group)
    if len(images) > 1:
        return None, FailureReason.SEVERAL_IMAGES, names
    if not images[0].is_file:
        return images[0], FailureReason.UNSUPPORTED_MEMBER, f"{names} is a link or a device, not a file"
    if images[0].data is None:
        return images[0], FailureReason.TOO_MANY_BYTES, f"{names} has {images[0].size} bytes"
    return images[0], None, ""


def _choose_metadata(
    group: list[Member], metadata_extensions: Collection[str]
) -> tuple[dict[str, bytes], FailureReason | None, str]:
    """What is there and cannot be had is a failure: only what is not there may become a null."""
    found: dict[str, bytes] = {}
    for member in group:
        extension = _extension(member.name)
        if extension not in metadata_extensions:
            continue
        if not member.is_file:
            return found, FailureReason.UNSUPPORTED_MEMBER, f"{member.name} is a link or a device, not a file"
        if member.data is None:
            return found, FailureReason.TOO_MANY_BYTES, f"{member.name} has {member.size} bytes"
        if extension in found:
            return found, FailureReason.BAD_METADATA, f"{member.name} is there twice"
        found[extension] = member.data
    return found, None, ""
