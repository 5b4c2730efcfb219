"""The bytes of a shard are those of the object that was listed, all of one version, and as the store has them."""

from __future__ import annotations

import base64
import gzip
import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from make_data import listed
from pipeline import ranged_reader, shard_stream, storage, store_requests
from pipeline.errors import ShardChanged, ShardTruncated, ShardUnreadable
from pipeline.md5_marks import ENOUGH_STRANGERS, Md5Marks
from pipeline.records import ObjectInfo
from pipeline.shard_patterns import expand
from pipeline.shard_stream import open_shard
from pipeline.shards import read_samples
from web_server import TAR, Web, serve


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_requests, "MAX_PAUSE_S", 0.0)
    monkeypatch.setattr(store_requests, "PATIENCE_S", 0.2)
    monkeypatch.setattr(RangedReader := ranged_reader.RangedReader, "__init__", _small_blocks(RangedReader.__init__))
    monkeypatch.setattr(shard_stream, "_marks", Md5Marks())


def _small_blocks(real: Callable[..., None]) -> Callable[..., None]:
    return lambda self, name, fetch, size_bytes: real(self, name, fetch, size_bytes, 4096)


def read_all(shard: ObjectInfo) -> bytes:
    with open_shard(shard) as stream:
        return b"".join(iter(lambda: stream.read(1000), b""))


# What is opened is what was listed


def test_a_shard_on_a_disk_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(TAR)
    assert read_all(listed(tmp_path / "x.tar")) == TAR


def test_a_packed_shard_has_the_same_samples(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(TAR)
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(TAR))
    plain, packed = (list(read_samples(listed(tmp_path / name))) for name in ("x.tar", "x.tar.gz"))
    assert [(s.key, s.image) for s in plain] == [(s.key, s.image) for s in packed] and len(plain) == 12


@pytest.mark.parametrize("data", [TAR + b"x", TAR[:-512], TAR], ids=["longer", "shorter", "as long"])
def test_a_shard_that_was_replaced_since_it_was_listed_is_refused_with_both_marks(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(TAR)
    shard = listed(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(data)
    os.utime(tmp_path / "x.tar", (5, 5))
    with pytest.raises(ShardChanged) as raised:
        open_shard(shard)
    said = str(raised.value)
    assert f"({len(data)} bytes, mark '5.0')" in said and f"({len(TAR)} bytes, mark '{shard.etag}')" in said
    assert "run again" in said and raised.value.reason == "changed"


def test_a_shard_that_is_replaced_or_removed_while_it_is_read_is_refused_at_its_end(tmp_path: Path) -> None:
    for deed in ("replace", "remove"):
        (tmp_path / "x.tar").write_bytes(TAR)
        with pytest.raises((ShardChanged, ShardUnreadable)) as raised, open_shard(listed(tmp_path / "x.tar")) as stream:
            stream.read(1)
            if deed == "replace":
                (tmp_path / "x.tar").write_bytes(bytes(len(TAR)))
                os.utime(tmp_path / "x.tar", (5, 5))
            else:
                (tmp_path / "x.tar").unlink()
            while stream.read(1000):
                pass
        assert isinstance(raised.value, ShardChanged) or deed == "remove"


def test_a_shard_that_is_gone_is_a_file_not_found_error(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(TAR)
    shard = listed(tmp_path / "x.tar")
    (tmp_path / "x.tar").unlink()
    with pytest.raises(FileNotFoundError):
        open_shard(shard)


# Checksums


class Checked(MemoryFileSystem):
    """A store that gives an MD5, as Google's does. `damage` are the reads, counted over all, that give a wrong byte."""

    protocol = "checked"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    md5: bytes
    damage: Callable[[int, int], bool]  # (which read, its start) -> whether a byte of it is wrong
    reads = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("checked://", "memory://"))

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return {**super().info(path, **options), "md5Hash": base64.b64encode(self.md5).decode()}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        data = bytearray(super().cat_file(path, start, end, **options))
        Checked.reads += 1
        if type(self).damage(Checked.reads, start or 0):
            data[600] ^= 0x55  # of an image
        return bytes(data)


@pytest.fixture
def checked() -> ObjectInfo:
    fsspec.register_implementation("checked", Checked, clobber=True)
    Checked.md5, Checked.reads = hashlib.md5(TAR).digest(), 0
    Checked.damage = staticmethod(lambda read, start: False)  # type: ignore[assignment]
    storage.publish("checked://b/x.tar", TAR)
    return replace(storage.list_files("checked://b")[0], etag="")


def test_bytes_that_have_the_stores_md5_are_read_once(checked: ObjectInfo) -> None:
    assert read_all(checked) == TAR
    assert Checked.reads == -(-len(TAR) // 4096)


def test_one_damaged_byte_is_found_and_the_next_reading_is_good(checked: ObjectInfo) -> None:
    Checked.damage = staticmethod(lambda read, start: read == 2)  # type: ignore[assignment]
    with pytest.raises(ShardUnreadable, match="do not have the store's MD5"):
        read_all(checked)
    assert read_all(checked) == TAR


def test_a_line_that_damages_now_this_now_that_is_never_believed(checked: ObjectInfo) -> None:
    Checked.damage = staticmethod(lambda read, start: read % 2 == 0 or read % 7 == 0)  # type: ignore[assignment]
    for _ in range(3):
        with pytest.raises(ShardUnreadable, match="do not have the store's MD5"):
            read_all(checked)


def test_the_first_objects_of_a_bucket_whose_marks_are_no_md5s_are_read_twice_and_all_are_taken(
    checked: ObjectInfo, caplog: pytest.LogCaptureFixture
) -> None:
    Checked.md5, num_blocks = bytes(16), -(-len(TAR) // 4096)
    shards = [replace(checked, url=f"checked://b/{n}.tar") for n in range(ENOUGH_STRANGERS + 2)]
    for shard in shards:
        storage.publish(shard.url, TAR)
    with caplog.at_level(logging.WARNING):
        assert [read_all(shard) for shard in shards] == [TAR] * len(shards)
    assert Checked.reads == (len(shards) + ENOUGH_STRANGERS) * num_blocks
    assert caplog.text.count("came twice the same") == ENOUGH_STRANGERS
    assert caplog.text.count("checked://b has no MD5s for marks") == 1


def test_one_damaged_object_does_not_stop_the_check_of_its_bucket(checked: ObjectInfo) -> None:
    good, Checked.md5 = Checked.md5, bytes(16)
    for _ in range(ENOUGH_STRANGERS):
        assert read_all(checked) == TAR  # nothing to go by yet
    Checked.md5 = good
    Checked.damage = staticmethod(lambda read, start: read % 2 == 0 or read % 7 == 0)  # type: ignore[assignment]
    with pytest.raises(ShardUnreadable, match="do not have the store's MD5"):
        read_all(checked)


def test_an_object_that_its_store_holds_damaged_is_refused_where_another_has_its_md5(checked: ObjectInfo) -> None:
    assert read_all(checked) == TAR
    Checked.damage = staticmethod(lambda read, start: start == 4096)  # type: ignore[assignment]
    with pytest.raises(ShardUnreadable, match="own mark is not the MD5 of what it gives"):
        read_all(checked)


# Web servers


@pytest.mark.server
def test_a_web_server_with_ranges_is_read_by_ranges() -> None:
    with serve() as url:
        (shard,) = expand([url])
        assert read_all(shard) == TAR
        assert "GET bytes=0-4095" in Web.requests and "GET bytes=4096-8191" in Web.requests
        assert "GET" not in Web.requests


@pytest.mark.server
def test_a_web_server_without_ranges_is_read_in_one_go() -> None:
    with serve(ranges=False) as url:
        (shard,) = expand([url])
        assert len(list(read_samples(shard))) == 12
        assert read_all(shard) == TAR


@pytest.mark.server
def test_a_download_in_one_go_that_is_cut_is_an_error_and_not_a_short_shard() -> None:
    with serve(ranges=False, truncate=len(TAR) - 9000) as url, pytest.raises((ShardTruncated, ShardUnreadable)):
        list(read_samples(ObjectInfo(url, len(TAR), "")))


@pytest.mark.server
def test_a_web_server_that_does_not_say_the_length_is_refused() -> None:
    with serve(length=False) as url, pytest.raises(ShardUnreadable, match="does not say how long it is"):
        list(read_samples(ObjectInfo(url, 0, "")))


@pytest.mark.server
def test_one_block_that_a_web_server_cuts_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_requests, "PATIENCE_S", 60.0)
    with serve(cut_once=["bytes=4096-8191"]) as url:
        (shard,) = expand([url])
        assert read_all(shard) == TAR
    assert Web.requests.count("GET bytes=4096-8191") == 2
