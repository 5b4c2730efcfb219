"""Samples of a shard: WebDataset's keys and groups, nothing lost on the way, offsets that hold."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import threading
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from make_data import image_bytes, listed, sample_members, tar_bytes
from pipeline import storage
from pipeline.errors import ShardChanged
from pipeline.images import FORMATS
from pipeline.ranged_reader import BLOCK_BYTES
from pipeline.records import FailureReason, RawSample
from pipeline.shards import IMAGE_EXTENSIONS, MAX_IMAGE_BYTES, read_samples, split_key

HOSTILE = [
    "a.jpg", "a.txt", "A.JPG", "dir/a.jpg", "dir.with.dots/a.b.jpg", "dir.with.dots/a.json", "./a.jpg", "../b.jpg",
    "/absolute.jpg", "a//b.jpg", "0/1.1.png", "0/1.png", "x.seg.png", ".hidden.jpg", "dir/.hidden.jpg", ".jpg", "noext",
    "dir/noext", "dir.d/noext", "a..jpg", "a.", "a.jpg.", "é/ü.jpg", "日本語.webp", "\u0041\u030a.jpg", "__meta__",
    "__meta__/x.jpg", "__x__.jpg", "x__y__.jpg", "__a/b__.jpg", "dir/__meta__", "dir/__meta__/y.jpg", "__.__", "____",
    "____.jpg", "sp ace.jpg", "tab\t.jpg", "new\nline.jpg", "trailing.jpg\n", "q?#%41.jpg", "a\\b.jpg", "c.tar.gz",
    "MiXed.JpEg", "x.ÄÖ", "deep/" * 30 + "z.jpg", "n" * 200 + ".jpg", "1.2.3.4.5.6.jpg",
]  # fmt: skip


def write(folder: Path, members: list[tuple[str, bytes]], name: str = "x.tar", **options: Any) -> Path:
    path = folder / name
    path.write_bytes(tar_bytes(members, tarfile.PAX_FORMAT))
    return path


def samples(folder: Path, members: list[tuple[str, bytes]], **options: Any) -> list[RawSample]:
    return list(read_samples(listed(write(folder, members)), **options))


def webdataset_samples(path: Path) -> list[dict[str, Any]]:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    with path.open("rb") as stream:
        return list(group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))


def test_every_format_that_is_decoded_is_found_by_its_usual_extension(tmp_path: Path) -> None:
    Image.init()
    usual = {extension.removeprefix("."): format for extension, format in Image.EXTENSION.items()}
    without_files = {"DIB"}  # a BMP that lost its file header
    assert {usual[extension] for extension in IMAGE_EXTENSIONS} == set(FORMATS) - without_files
    members = [(f"{extension}.{extension}", image_bytes(1, usual[extension])) for extension in IMAGE_EXTENSIONS]
    assert reasons(samples(tmp_path, members)) == [(extension, None) for extension in IMAGE_EXTENSIONS]


def test_keys_extensions_and_groups_are_those_of_webdataset(tmp_path: Path) -> None:
    path = write(tmp_path, [(name, name.encode()) for name in HOSTILE])
    theirs = webdataset_samples(path)
    extensions = {extension for sample in theirs for extension in sample} - {"__key__", "__url__"}
    ours = list(read_samples(listed(path), metadata_extensions=extensions, image_extensions=()))
    assert [s.key for s in ours] == [sample["__key__"] for sample in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.members == {e: data for e, data in other.items() if not e.startswith("__")}


def test_the_one_difference_to_webdataset_is_a_sample_that_it_drops() -> None:
    from webdataset.tariterators import base_plus_ext

    name = "dir.1\n/a.jpg"  # a dot and a newline in the folder's name
    assert base_plus_ext(name) == (None, None)
    assert split_key(name) == ("dir.1\n/a", "jpg")


def test_images_and_metadata_are_those_of_webdataset(tmp_path: Path) -> None:
    path = write(tmp_path, sample_members(0, 5))
    theirs = webdataset_samples(path)
    ours = list(read_samples(listed(path), metadata_extensions={"txt", "json"}))
    assert [(s.key, s.image, dict(s.members)) for s in ours] == [
        (t["__key__"], t["jpg"], {"txt": t["txt"], "json": t["json"]}) for t in theirs
    ]
    assert [s.index for s in ours] == list(range(5))


def test_offset_and_size_give_the_images_bytes_with_one_range_request(tmp_path: Path) -> None:
    members = [("d" * 180 + f"/{n}.jpg", image_bytes(n)) for n in range(3)]
    path = write(tmp_path, members)
    for sample, (_, data) in zip(read_samples(listed(path)), members, strict=True):
        assert sample.offset is not None
        assert storage.read_range(str(path), sample.offset, sample.size) == data == sample.image


def test_a_gzipped_shard_gives_the_same_samples_without_offsets(tmp_path: Path) -> None:
    plain = write(tmp_path, sample_members(0, 3))
    packed = tmp_path / "x.tar.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    ours = [(s.key, s.offset, s.size, s.image) for s in read_samples(listed(packed))]
    assert ours == [(s.key, None, s.size, s.image) for s in read_samples(listed(plain))]


def reasons(found: list[RawSample]) -> list[tuple[str, str | None]]:
    return [(s.key, s.failure and s.failure.value) for s in found]


def test_each_sample_without_one_good_image_says_why_and_none_is_dropped(tmp_path: Path) -> None:
    found = samples(
        tmp_path,
        [
            ("good.jpg", b"1"),
            ("captioned.txt", b"no image here"),
            ("two.jpg", b"1"), ("two.png", b"2"),
            ("twice.jpg", b"1"), ("twice.jpg", b"2"),
            ("upper.JPG", b"1"),
            ("good.png", b"again"),
            ("last.webp", b"1"),
        ],
    )  # fmt: skip
    assert reasons(found) == [
        ("good", None), ("captioned", "no_image"), ("two", "several_images"), ("twice", "several_images"),
        ("upper", None), ("good", "duplicate_key"), ("last", None),
    ]  # fmt: skip
    assert [s.index for s in found] == list(range(7))
    assert found[2].detail == "two.jpg, two.png"
    assert all((s.image is None) == (s.failure is not None) for s in found)


def test_interleaved_members_fall_apart_as_in_webdataset_and_are_reported(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"A"), ("b.txt", b"B")]
    found = samples(tmp_path, members, metadata_extensions={"txt"})
    assert reasons(found) == [("a", None), ("b", None), ("a", "duplicate_key"), ("b", "duplicate_key")]
    assert [s["__key__"] for s in webdataset_samples(tmp_path / "x.tar")] == [s.key for s in found]


def test_what_webdataset_gives_to_no_sample_is_passed_over_and_nothing_else(tmp_path: Path) -> None:
    """README's table of outcomes says these very names."""
    passed = ["dog", ".hid.jpg", "__meta__", "__x__/b.jpg", "a.b/.hid.jpg"]
    taken = {"cat.jpg": "cat", "x/.hid.jpg": "x/", "__meta__.jpg": "__meta__"}
    found = samples(tmp_path, [(name, b"1") for name in [*passed, *taken]])
    assert reasons(found) == [(key, None) for key in taken.values()]
    assert [s["__key__"] for s in webdataset_samples(tmp_path / "x.tar")] == [*taken.values()]


def test_the_same_key_in_two_shards_is_no_failure(tmp_path: Path) -> None:
    for name in ("one.tar", "two.tar"):
        (sample,) = read_samples(listed(write(tmp_path, [("a.jpg", b"1")], name)))
        assert sample.failure is None


@pytest.mark.parametrize(
    ("names", "image"),
    [(["x.png", "x.seg.png"], "x.png"), (["x.seg.png", "x.png"], "x.png"), (["x.seg.png"], "x.seg.png"),
     (["0/1.1.png"], "0/1.1.png"), (["x.seg.png", "x.depth.png"], None), (["x.jpg", "x.mask.jpg", "x.txt"], "x.jpg")],
)  # fmt: skip
def test_an_image_behind_a_second_dot_counts_only_where_there_is_no_plain_one(
    tmp_path: Path, names: list[str], image: str | None
) -> None:
    (sample,) = samples(tmp_path, [(name, name.encode()) for name in names])
    assert sample.image == (image.encode() if image else None)
    assert sample.failure == (None if image else FailureReason.SEVERAL_IMAGES)


def test_only_the_extensions_asked_for_are_images(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("a.left", b"2"), ("b.jpg", b"3")]
    assert reasons(samples(tmp_path, members, image_extensions=("left",))) == [("a", None), ("b", "no_image")]


def test_members_that_belong_to_no_sample_are_passed_over(tmp_path: Path) -> None:
    members = [("README", b"x"), ("a.jpg", b"1"), ("__index__", b"x"), ("a.txt", b"A"), (".DS_Store", b"x")]
    (sample,) = samples(tmp_path, members, metadata_extensions={"txt"})
    assert (sample.key, sample.image, sample.members) == ("a", b"1", {"txt": b"A"})


def with_link(folder: Path, name: str, type: bytes) -> Path:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for member, data in (("a.jpg", b"1"), ("a.txt", b"A"), ("b.jpg", b"2")):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo(name)
        link.type, link.linkname = type, "a" + Path(name).suffix
        tar.addfile(link)
    (folder / "links.tar").write_bytes(out.getvalue())
    return folder / "links.tar"


@pytest.mark.parametrize("type", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_an_image_or_a_caption_that_is_a_link_is_a_failure_never_a_null(tmp_path: Path, type: bytes) -> None:
    """GNU tar stores the second of two equal files that are hard links as a link."""
    image = list(read_samples(listed(with_link(tmp_path, "c.jpg", type)), metadata_extensions={"txt"}))
    assert reasons(image) == [("a", None), ("b", None), ("c", "unsupported_member")]
    caption = list(read_samples(listed(with_link(tmp_path, "b.txt", type)), metadata_extensions={"txt"}))
    assert reasons(caption) == [("a", None), ("b", "unsupported_member")]
    ignored = list(read_samples(listed(with_link(tmp_path, "b.txt", type))))
    assert reasons(ignored) == [("a", None), ("b", None)]


def test_metadata_that_is_there_twice_or_is_too_large_is_a_failure_never_a_null(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.shards.MAX_METADATA_BYTES", 100)
    members = [
        ("a.jpg", b"1"),
        ("a.txt", b"x" * 101),
        ("b.jpg", b"2"),
        ("b.txt", b"B"),
        ("b.TXT", b"C"),
        ("c.jpg", b"3"),
    ]
    assert reasons(samples(tmp_path, members, metadata_extensions={"txt"})) == [
        ("a", "too_many_bytes"), ("b", "bad_metadata"), ("c", None),
    ]  # fmt: skip
    assert reasons(samples(tmp_path, members)) == [("a", None), ("b", None), ("c", None)]


def test_an_image_larger_than_the_limit_is_stepped_over_with_bounded_memory(tmp_path: Path) -> None:
    size, path = MAX_IMAGE_BYTES + 1, tmp_path / "huge.tar"  # two gigabytes: test_tar_members.py
    info = tarfile.TarInfo("huge.jpg")
    info.size = size
    with path.open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.seek(size + -size % 512, os.SEEK_CUR)  # a hole: takes no room on the disk
        file.write(tar_bytes([("small.jpg", b"1")]))
    tracemalloc.start()
    try:
        huge, small = read_samples(listed(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (huge.failure, huge.size, huge.image) == (FailureReason.TOO_MANY_BYTES, size, None)
    assert small.image == b"1"
    assert peak < 16 << 20


def test_an_empty_image_member_is_kept_for_the_decoder_to_refuse(tmp_path: Path) -> None:
    (sample,) = samples(tmp_path, [("a.jpg", b"")])
    assert (sample.image, sample.size, sample.failure) == (b"", 0, None)


def test_a_shard_that_shrank_since_it_was_listed_is_another_one(tmp_path: Path) -> None:
    path = write(tmp_path, sample_members(0, 8))
    shard = listed(path)
    path.write_bytes(tar_bytes(sample_members(0, 1)))
    with pytest.raises(ShardChanged, match=r"10240 bytes.*than the one listed.*30720 bytes"):
        list(read_samples(shard))


def test_leaving_early_leaves_no_file_open_and_no_thread(tmp_path: Path) -> None:
    shard = listed(write(tmp_path, [*sample_members(0, 3), ("large.bin", bytes(3 * BLOCK_BYTES))]))
    reading = read_samples(shard)
    next(reading)
    reading.close()
    for thread in threading.enumerate():
        if thread.name == "fetch":  # the next block, which was under way
            thread.join(60)
    assert not [t for t in threading.enumerate() if t.name == "fetch"]
    assert open_files(shard.url) == 0


def open_files(path: str) -> int:
    """This process's descriptors of that file; other threads open and close others meanwhile."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(descriptor.readlink())
    return found.count(Path(path).resolve())
