"""From object storage to object storage, on a real S3 server."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import pytest

from jobs.local_servers import S3Server
from make_data import write_checkpoint, write_shards
from pipeline import shard_stream, storage
from pipeline.errors import NoShardsMatched, ShardChanged, ShardUnreadable, StorageError
from pipeline.md5_marks import Md5Marks
from pipeline.ranged_reader import BLOCK_BYTES
from pipeline.records import ObjectInfo
from pipeline.shard_patterns import expand
from pipeline.shard_stream import open_shard
from s3_clients import s3_clients_of

pytestmark = pytest.mark.server
COUNTS = [5, 11]


def upload(folder: Path, url: str) -> None:
    for path in folder.iterdir():
        storage.publish(storage.join(url, path.name), path.read_bytes())


def dvae(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.ray
def test_tokenises_from_and_to_a_bucket_and_duckdb_reads_it_there(s3: str, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", COUNTS)
    upload(tmp_path / "shards", f"{s3}/in")
    upload(write_checkpoint(tmp_path / "checkpoint"), f"{s3}/checkpoint")
    (tmp_path / "t.yaml").write_text(f"checkpoint: {s3}/checkpoint\nshards: {s3}/in/made-*.tar\noutput: {s3}/out\n")

    done = dvae("tokenize", str(tmp_path / "t.yaml"), "batch_size=8")
    assert done.returncode == 0, done.stderr
    assert f"2 of 2 shards · {sum(COUNTS)} images tokenised · 0 failed" in done.stdout

    connection = duckdb.connect()  # the default one belongs to the whole process, and knows each filesystem once
    connection.register_filesystem(fsspec.filesystem("s3"))
    query = f"SELECT key, shard, len(tokens) FROM '{s3}/out/tokens/*.parquet' ORDER BY key"
    rows = connection.sql(query).fetchall()
    assert [row[0] for row in rows] == [f"img{n:05d}" for n in range(sum(COUNTS))]
    assert rows[0][1:] == (f"{s3}/in/made-000000.tar", 4)
    names = {storage.base_name(info.url) for info in storage.list_files(f"{s3}/out")}
    assert {"run.json", "manifest.json"} <= names and "lease.json" not in names

    again = dvae("tokenize", str(tmp_path / "t.yaml"), "batch_size=8")
    assert again.returncode == 0 and "nothing to do" in again.stdout
    status = dvae("status", f"{s3}/out")
    assert status.returncode == 0 and "complete" in status.stdout


def test_create_only_is_refused_where_something_is_and_admits_its_own_success(s3: str) -> None:
    url = f"{s3}/created"
    assert storage.create(url, b"writer one")
    assert not storage.create(url, b"writer two")
    assert storage.create(url, b"writer one")  # the answer to the first try was lost: the client tries again
    assert storage.read_bytes(url) == b"writer one"


def test_swap_replaces_only_what_was_seen_and_admits_its_own_success(s3: str) -> None:
    url = f"{s3}/swapped"
    assert not storage.swap(url, b"writer one", b"nothing")
    storage.publish(url, b"old")
    assert storage.swap(url, b"writer one", b"old")
    assert not storage.swap(url, b"writer two", b"old")
    assert storage.swap(url, b"writer one", b"old")  # the answer to the first try was lost: the client tries again
    assert storage.read_bytes(url) == b"writer one"


def test_of_many_that_swap_at_once_exactly_one_succeeds(s3: str) -> None:
    url = f"{s3}/contested"
    for round in range(3):
        storage.publish(url, b"old %d" % round)
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda n, r=round: storage.swap(url, b"%d %d" % (r, n), b"old %d" % r), range(8)))
        assert sum(won) == 1
        assert storage.read_bytes(url) == b"%d %d" % (round, won.index(True))


def test_a_large_object_goes_in_parts_and_comes_back_as_it_was(s3: str) -> None:
    data = random.Random(0).randbytes(101 << 20)
    storage.publish(f"{s3}/large.tar", data)
    (info,) = storage.list_files(f"{s3}/large.tar")
    assert "-" in info.etag  # several parts: no MD5 of the whole
    with open_shard(info) as stream:
        assert b"".join(iter(lambda: stream.read(1 << 20), b"")) == data
    storage.remove(info.url)


def upload_parts(url: str, data: bytes, ends: list[int]) -> ObjectInfo:
    """By hand: s3fs's own parts may have any size too, where it writes a file piece by piece."""
    fs, path = storage.filesystem(url)
    where = dict(zip(("Bucket", "Key"), fs.split_path(path), strict=False))
    where["UploadId"] = fs.call_s3("create_multipart_upload", **where)["UploadId"]
    parts = []
    for number, (start, end) in enumerate(pairwise([0, *ends]), 1):
        sent = fs.call_s3("upload_part", **where, PartNumber=number, Body=data[start:end])
        parts.append({"PartNumber": number, "ETag": sent["ETag"]})
    fs.call_s3("complete_multipart_upload", **where, MultipartUpload={"Parts": parts})
    (info,) = storage.list_files(url)
    return info


@pytest.fixture(scope="module")
def parted(s3: str) -> ObjectInfo:
    data = random.Random(0).randbytes(12 << 20)
    return upload_parts(f"{s3}/parted/even.tar", data, [5 << 20, 10 << 20, 12 << 20])


def read_with(monkeypatch: pytest.MonkeyPatch, info: ObjectInfo, damaged: list[bool]) -> bytes:
    """Reads it by a line that damages a byte of the n-th request where `damaged[n]`."""
    found = storage.look_at(info.url)

    def fetch(start: int, end: int) -> bytes:
        assert found.fetch is not None
        data = bytearray(found.fetch(start, end))
        data[100] ^= damaged.pop(0) if damaged else False
        return bytes(data)

    monkeypatch.setattr(storage, "look_at", lambda url: replace(found, fetch=fetch))
    with open_shard(info) as stream:
        return b"".join(iter(lambda: stream.read(1 << 20), b""))


def test_the_bytes_of_an_object_that_came_in_parts_are_checked(
    parted: ObjectInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_stream, "_marks", Md5Marks())
    assert storage.look_at(parted.url).part_bytes == 5 << 20
    with pytest.raises(ShardUnreadable, match="do not have the store's MD5"):
        read_with(monkeypatch, parted, [False, True])
    monkeypatch.setattr(storage, "open_stream", lambda url: pytest.fail("read twice"))
    data = read_with(monkeypatch, parted, [])
    assert data == random.Random(0).randbytes(12 << 20)
    kin = shard_stream._kin(parted, storage.look_at(parted.url))
    assert shard_stream._marks._proven == {kin}  # so it did match


@pytest.mark.parametrize("ends", [[5, 11, 12], [6, 11, 12], [5, 12]])
def test_an_object_whose_parts_are_not_of_one_size_has_no_md5(s3: str, ends: list[int]) -> None:
    data = random.Random(0).randbytes(12 << 20)
    info = upload_parts(f"{s3}/parted/uneven.tar", data, [end << 20 for end in ends])
    found = storage.look_at(info.url)
    assert (found.etag, found.md5, found.part_bytes) == (info.etag, None, None)
    with open_shard(info) as stream:
        assert b"".join(iter(lambda: stream.read(1 << 20), b"")) == data


def test_a_store_that_does_not_say_how_large_a_part_is_is_read_unchecked(
    parted: ObjectInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise OSError(22, "not implemented")

    monkeypatch.setattr(storage.filesystem(parted.url)[0], "call_s3", refuse)
    found = storage.look_at(parted.url)
    assert (found.md5, found.part_bytes) == (None, None)


def test_a_large_object_whose_last_part_fails_is_not_there(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fs = storage.filesystem(s3)[0]
    real = fs._call_s3

    async def fail(method: str, *arguments: Any, **options: Any) -> Any:
        if method == "upload_part" and options["PartNumber"] == 3:
            raise PermissionError("no more")
        return await real(method, *arguments, **options)

    monkeypatch.setattr(fs, "_call_s3", fail)
    with pytest.raises(StorageError, match="no more"):
        storage.publish(f"{s3}/half/large", bytes(101 << 20))
    monkeypatch.undo()
    assert storage.list_files(f"{s3}/half") == [] and storage.stat(f"{s3}/half/large") is None
    assert not fs.call_s3("list_multipart_uploads", Bucket="test-bucket").get("Uploads")


def test_a_shard_that_is_replaced_while_it_is_read_is_refused_at_once(s3: str) -> None:
    size = 3 * BLOCK_BYTES
    storage.publish(f"{s3}/replaced.tar", bytes(size))
    (info,) = storage.list_files(f"{s3}/replaced.tar")
    with open_shard(info) as stream:
        stream.read(1)
        storage.publish(info.url, b"x" * size)
        with pytest.raises(ShardChanged, match=f"was replaced while it was read .*{info.etag}"):
            while data := stream.read(1 << 20):
                assert b"x" not in data  # never bytes of two versions
    with pytest.raises(ShardChanged, match="run again"):
        open_shard(info)


def test_a_part_that_came_in_one_put_has_its_md5_for_a_mark(s3: str) -> None:
    """On which the check of a shard's bytes stands."""
    data = bytes(range(256)) * 40_000  # more than one chunk of the server's
    storage.publish(f"{s3}/md5/x.tar", data)
    (info,) = storage.list_files(f"{s3}/md5")
    assert info.etag == hashlib.md5(data).hexdigest()
    assert storage.look_at(info.url).md5 == hashlib.md5(data).digest()


def test_keys_with_question_marks_and_hashes_are_shards_like_others(s3: str) -> None:
    names = ["a#1.tar", "a?1.tar", "a?2.tar"]
    for name in names:
        storage.publish(f"{s3}/odd/{name}", name.encode())
    shards = expand([f"{s3}/odd"])
    assert [storage.public_url(shard.url) for shard in shards] == [f"{s3}/odd/{name}" for name in names]
    for shard, name in zip(shards, names, strict=True):
        with open_shard(shard) as stream:
            assert stream.read() == name.encode()
        storage.remove(shard.url)
    assert storage.list_files(f"{s3}/odd") == []


def test_a_range_behind_the_end_is_an_error_and_not_a_short_answer(s3: str) -> None:
    storage.publish(f"{s3}/ten", b"0123456789")
    assert storage.read_range(f"{s3}/ten", 2, 3) == b"234"
    with pytest.raises(StorageError):
        storage.read_range(f"{s3}/ten", 8, 3)


def test_listings_are_never_stale(s3: str) -> None:
    assert storage.list_files(f"{s3}/fresh") == []
    storage.publish(f"{s3}/fresh/a.tar", b"x")
    assert [(info.url, info.size_bytes) for info in storage.list_files(f"{s3}/fresh")] == [(f"{s3}/fresh/a.tar", 1)]
    first = expand([f"{s3}/fresh/*.tar"])
    storage.publish(f"{s3}/fresh/a.tar", b"y")
    assert expand([f"{s3}/fresh/*.tar"])[0].etag != first[0].etag


def test_stat_is_never_stale_and_says_what_a_listing_says(s3: str) -> None:
    url = f"{s3}/stat/a.tar"
    assert storage.stat(url) is None
    for data in (b"one", b"other"):
        storage.publish(url, data)
        assert [storage.stat(url)] == storage.list_files(f"{s3}/stat")
    storage.remove(url)
    assert storage.stat(url) is None and storage.stat(s3) is None


def test_what_is_not_there_is_said_with_its_url(s3: str) -> None:
    with pytest.raises(NoShardsMatched, match="nothing-here"):
        expand([f"{s3}/nothing-here/*.tar"])
    with pytest.raises(NoShardsMatched, match="no-such-bucket"):
        expand(["s3://no-such-bucket/a.tar"])
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{s3}/nothing")


def test_a_server_killed_and_started_again_has_what_it_had(tmp_path: Path) -> None:
    """So that tests may kill the server that a run writes to."""
    server = S3Server(tmp_path, "killed-bucket")
    server.start()
    try:
        with s3_clients_of(server.environment):
            for n in range(5):
                storage.publish(f"s3://killed-bucket/{n}", b"%d" % n * 1000)
            server.kill()
            server.start()
            found = [storage.read_bytes(i.url) for i in storage.list_files("s3://killed-bucket")]
            assert found == [b"%d" % n * 1000 for n in range(5)]
    finally:
        server.stop()
