"""Packing: what goes in comes out of the webdataset library, the same bytes every time, nothing lost."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest

from pipeline import storage
from pipeline.image_folder import PackError, Why
from pipeline.pack import PackSummary, pack
from pipeline.pictures import encode_jpeg, encode_png
from pipeline.shard_patterns import expand


def jpeg(seed: int = 0) -> bytes:
    return encode_jpeg(np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8))


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def photos(folder: Path, count: int = 10) -> Path:
    files: dict[str, bytes] = {}
    for n in range(count):
        files |= {f"a/{n:02d}.jpg": jpeg(n), f"a/{n:02d}.txt": b"photo %d" % n, f"a/{n:02d}.json": b'{"n": %d}' % n}
    return write(folder, files)


def shard_bytes_of(summary: PackSummary) -> dict[str, bytes]:
    return {storage.base_name(url): storage.read_bytes(url) for url in summary.shard_urls}


def read_with_webdataset(summary: PackSummary) -> list[dict[str, Any]]:
    import webdataset

    return list(webdataset.WebDataset(list(summary.shard_urls), shardshuffle=False))


def test_webdataset_reads_back_every_key_and_every_byte(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in")
    summary = pack(folder, str(tmp_path / "out"), shard_samples=4)
    samples = read_with_webdataset(summary)
    assert [s["__key__"] for s in samples] == [f"a/{n:02d}" for n in range(10)]
    for sample in samples:
        for extension in ("jpg", "txt", "json"):
            assert sample[extension] == (folder / f"{sample['__key__']}.{extension}").read_bytes()
    assert [Path(url).name for url in summary.shard_urls] == [f"images-{n:06d}.tar" for n in range(3)]
    assert (summary.num_images, summary.num_captions, summary.num_metadata) == (10, 10, 10)
    assert summary.left_out == ()


HARD_NAMES = (
    "photo.v2.final.jpg",
    "photo.v2.jpg",
    "photo%2Ev2.jpg",
    "a.b/c.d/e.jpg",
    "100%.jpg",
    "Köln/grüße 日本 🙂.jpg",
    "__meta__/inside.jpg",
    "__meta__.jpg",
    "new\nline/and\ttab.jpg",
    "space at end .jpg",
    "UPPER.JPG",
    "d" * 120 + "/" + "n" * 160 + ".jpg",
    "-dash.jpg",
    "'quote\".jpg",
)


def test_dotted_non_ascii_and_other_hard_names_come_back_from_webdataset(tmp_path: Path) -> None:
    contents = {name: jpeg(n) for n, name in enumerate(HARD_NAMES)}
    summary = pack(write(tmp_path / "in", contents), str(tmp_path / "out"))
    read = {unquote(s["__key__"]): s["jpg"] for s in read_with_webdataset(summary)}
    assert read == {name.rpartition(".")[0]: data for name, data in contents.items()}
    assert summary.packed_bytes == sum(map(len, shard_bytes_of(summary).values()))


def test_our_own_reader_gives_the_same_keys_as_webdataset(tmp_path: Path) -> None:
    from pipeline.shards import read_samples

    summary = pack(write(tmp_path / "in", {name: jpeg() for name in HARD_NAMES}), str(tmp_path / "out"))
    (shard,) = expand(summary.shard_urls)
    ours = [(sample.key, sample.failure) for sample in read_samples(shard)]
    assert ours == [(sample["__key__"], None) for sample in read_with_webdataset(summary)]


def test_the_same_folder_gives_the_same_bytes_whatever_its_times_modes_and_place(tmp_path: Path) -> None:
    first = photos(tmp_path / "one")
    second = tmp_path / "elsewhere" / "two"
    for path in sorted(first.rglob("*"), reverse=True):  # written in another order
        if path.is_file():
            (second / path.relative_to(first)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, second / path.relative_to(first))
            os.utime(second / path.relative_to(first), (1, 1))
            (second / path.relative_to(first)).chmod(0o600)
    one = pack(first, str(tmp_path / "out1"), shard_samples=3)
    two = pack(second, str(tmp_path / "out2"), shard_samples=3)
    assert shard_bytes_of(one) == shard_bytes_of(two)


def test_members_have_fixed_owner_mode_and_time(tmp_path: Path) -> None:
    summary = pack(photos(tmp_path / "in", 2), str(tmp_path / "out"))
    with tarfile.open(summary.shard_urls[0]) as tar:
        facts = {(m.uid, m.gid, m.uname, m.gname, m.mode, m.mtime) for m in tar}
    assert facts == {(0, 0, "", "", 0o644, 0)}


@pytest.mark.parametrize("limit", [10_240, 20_480, 40_000])
def test_no_shard_exceeds_the_chosen_size_and_the_planned_size_is_the_real_one(tmp_path: Path, limit: int) -> None:
    summary = pack(photos(tmp_path / "in"), str(tmp_path / "out"), shard_bytes=limit)
    sizes = [len(data) for data in shard_bytes_of(summary).values()]
    assert max(sizes) <= limit
    assert sum(sizes) == summary.packed_bytes


def test_an_image_larger_than_a_shard_gets_one_of_its_own(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"a.jpg": jpeg(), "b.png": bytes(50_000), "c.jpg": jpeg()})
    summary = pack(folder, str(tmp_path / "out"), shard_bytes=20_000)
    assert len(summary.shard_urls) == 3
    assert [s["__key__"] for s in read_with_webdataset(summary)] == ["a", "b", "c"]


def test_nothing_is_decoded_a_text_named_jpg_and_an_empty_file_are_packed(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"text.jpg": b"not an image", "empty.png": b""})
    samples = read_with_webdataset(pack(folder, str(tmp_path / "out")))
    assert [(s.get("jpg"), s.get("png")) for s in samples] == [(None, b""), (b"not an image", None)]


def test_every_file_in_no_shard_is_named_with_its_reason(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", 1)
    write(folder, {"lonely.txt": b"", "x/lonely.json": b"", "readme.md": b"", "noextension": b"", "jpg": b""})
    write(folder, {".DS_Store": b"", ".git/config": b"", "archive.jpg.zip": b"", "._a.jpg": b""})
    (folder / "nothing.jpg").symlink_to(folder / "missing")
    (folder / "linked").symlink_to(folder / "a")
    summary = pack(folder, str(tmp_path / "out"))
    assert [(one.path, one.why) for one in summary.left_out] == [
        (".DS_Store", Why.HIDDEN),
        ("._a.jpg", Why.HIDDEN),
        (".git", Why.HIDDEN),
        ("archive.jpg.zip", Why.UNKNOWN_EXTENSION),
        ("jpg", Why.UNKNOWN_EXTENSION),
        ("linked", Why.NOT_A_FILE),
        ("lonely.txt", Why.NO_IMAGE),
        ("noextension", Why.UNKNOWN_EXTENSION),
        ("nothing.jpg", Why.NOT_A_FILE),
        ("readme.md", Why.UNKNOWN_EXTENSION),
        ("x/lonely.json", Why.NO_IMAGE),
    ]


def test_a_link_to_an_image_is_packed_as_the_image(tmp_path: Path) -> None:
    target = write(tmp_path / "elsewhere", {"real.jpg": jpeg()}) / "real.jpg"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link.jpg").symlink_to(target)
    (sample,) = read_with_webdataset(pack(tmp_path / "in", str(tmp_path / "out")))
    assert (sample["__key__"], sample["jpg"]) == ("link", jpeg())


@pytest.mark.parametrize("pair", [("a/x.jpg", "a/x.png"), ("x.jpg", "x.JPG"), ("x.jpg", "x.jpeg")])
def test_two_images_of_one_name_are_refused_by_name(tmp_path: Path, pair: tuple[str, str]) -> None:
    folder = write(tmp_path / "in", {name: jpeg() for name in pair})
    with pytest.raises(PackError, match="share one name") as error:
        pack(folder, str(tmp_path / "out"))
    assert pair[0] in str(error.value) and pair[1] in str(error.value)
    assert not (tmp_path / "out").exists()


def test_two_captions_of_one_image_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"x.jpg": jpeg(), "x.txt": b"one", "x.TXT": b"two"})
    with pytest.raises(PackError, match=r"x\.TXT and x\.jpg and x\.txt"):
        pack(folder, str(tmp_path / "out"))


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/\xff.jpg")).write_bytes(jpeg())
    with pytest.raises(PackError, match="not UTF-8"):
        pack(tmp_path / "in", str(tmp_path / "out"))


def test_a_missing_folder_and_one_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="is not a folder"):
        pack(tmp_path / "missing", str(tmp_path / "out"))
    with pytest.raises(PackError, match=r"holds no image \(1 other files\)"):
        pack(write(tmp_path / "in", {"a.txt": b""}), str(tmp_path / "out"))


def test_an_output_inside_the_folder_is_refused(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", 1)
    with pytest.raises(PackError, match="lies inside the folder"):
        pack(folder, str(folder / "shards"))


class Killed(Exception):
    pass


def test_killed_after_any_shard_and_run_again_gives_the_same_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photos(tmp_path / "in")
    whole = shard_bytes_of(pack(folder, str(tmp_path / "whole"), shard_samples=3))
    for last in range(4):

        def die(done: int, total: int, last: int = last) -> None:
            if done > last * 3:
                raise Killed

        out = str(tmp_path / f"killed{last}")
        with pytest.raises(Killed):
            pack(folder, out, shard_samples=3, progress=die)
        again = pack(folder, out, shard_samples=3)
        assert shard_bytes_of(again) == whole
        assert again.num_reused == last + 1


def test_killed_before_the_first_shard_leaves_an_output_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = photos(tmp_path / "in"), str(tmp_path / "out")

    def die(shard: object) -> bytes:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.pack.shard_tar", die)
        with pytest.raises(Killed):
            pack(folder, out)
    assert pack(folder, out).num_reused == 0


def test_running_again_on_a_finished_output_writes_no_shard(tmp_path: Path) -> None:
    folder, out = photos(tmp_path / "in"), str(tmp_path / "out")
    first = pack(folder, out, shard_samples=3)
    before = {url: Path(url).stat().st_mtime_ns for url in first.shard_urls}
    assert pack(folder, out, shard_samples=3).num_reused == 4
    assert {url: Path(url).stat().st_mtime_ns for url in first.shard_urls} == before


def test_a_file_changed_in_place_without_changing_its_size_is_packed_anew(tmp_path: Path) -> None:
    folder, out = photos(tmp_path / "in"), str(tmp_path / "out")
    pack(folder, out, shard_samples=3)
    (folder / "a/04.txt").write_bytes(b"PHOTO 4")
    os.utime(folder / "a/04.txt", ns=(1, 1))
    again = pack(folder, out, shard_samples=3)
    assert again.num_reused == 0
    assert read_with_webdataset(again)[4]["txt"] == b"PHOTO 4"
    assert pack(folder, out, shard_samples=3).num_reused == 4


def test_an_output_with_another_packing_is_refused_saying_what_differs(tmp_path: Path) -> None:
    folder, out = photos(tmp_path / "in"), str(tmp_path / "out")
    pack(folder, out, shard_samples=3)
    with pytest.raises(PackError, match="shard_samples was 3, is 4"):
        pack(folder, out, shard_samples=4)
    write(folder, {"a/99.jpg": jpeg()})
    with pytest.raises(PackError, match="num_images was 10, is 11"):
        pack(folder, out, shard_samples=3)


def test_shards_of_unknown_origin_are_not_overwritten(tmp_path: Path) -> None:
    out = write(tmp_path / "out", {"images-000000.tar": b"someone's"})
    with pytest.raises(PackError, match=r"images-000000\.tar is there without its \.pack\.json"):
        pack(photos(tmp_path / "in"), str(out))
    assert (out / "images-000000.tar").read_bytes() == b"someone's"


def test_two_prefixes_live_in_one_output(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    pack(photos(tmp_path / "one"), out, prefix="train")
    pack(photos(tmp_path / "two", 3), out, prefix="train-more")
    assert pack(tmp_path / "one", out, prefix="train").num_reused == 1


def test_packs_to_any_url_and_tells_the_progress(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    out = f"memory://pack-{tmp_path.name}"
    summary = pack(photos(tmp_path / "in"), out, shard_samples=4, progress=lambda *step: steps.append(step))
    assert steps == [(4, 10), (8, 10), (10, 10)]
    with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(summary.shard_urls[0]))) as tar:
        assert len(tar.getnames()) == 12
    assert json.loads(storage.read_bytes(f"{out}/images.pack.json"))["num_shards"] == 3
    assert pack(tmp_path / "in", out, shard_samples=4).num_reused == 3


def test_a_png_keeps_its_extension_and_upper_case_ones_become_lower(tmp_path: Path) -> None:
    png = encode_png(np.zeros((8, 8, 3), np.uint8))
    (sample,) = read_with_webdataset(pack(write(tmp_path / "in", {"X.PNG": png}), str(tmp_path / "out")))
    assert (sample["__key__"], sample["png"]) == ("X", png)


def test_an_avif_is_an_image(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"a.avif": b"bytes are copied as they are", "a.txt": b"caption"})
    assert pack(folder, str(tmp_path / "out")).num_images == 1
