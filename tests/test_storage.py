"""URLs and bytes: whole objects or none, listings that leave nothing out, and no credentials in what is shown."""

from __future__ import annotations

import errno
import functools
import http.server
import io
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from make_data import Killed, MortalStore
from pipeline import local_disk, storage, store_requests
from pipeline.errors import BadUrl, NoShardsMatched, PipelineError, ShardTruncated, StorageError
from pipeline.output import part_name
from pipeline.records import ObjectInfo
from pipeline.shard_patterns import expand
from pipeline.stored_object import time_of
from web_server import TAR, serve


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def urls(patterns: list[str]) -> list[str]:
    return [info.url for info in expand(patterns)]


def make(folder: Path, *paths: str) -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(path.encode())
    return folder


# Spelling


@pytest.mark.parametrize(
    ("url", "spelled"),
    [("/a/b/", "/a/b"), ("file:///a/b", "/a/b"), ("/a/../b//c", "/b/c"), ("s3://bucket/key/", "s3://bucket/key"),
     ("s3://bucket/a//b", "s3://bucket/a//b"), ("s3a://b/x.tar", "s3://b/x.tar"), ("gcs://b/x.tar", "gs://b/x.tar"),
     ("//tmp/x", "/tmp/x"), ("///tmp/x", "/tmp/x"), ("file:////tmp/x", "/tmp/x"), ("/", "/"),
     ("file://localhost/tmp/x", "/tmp/x"), ("s3ax://b/x", "s3ax://b/x")],
)  # fmt: skip
def test_a_url_has_one_spelling(url: str, spelled: str) -> None:
    assert storage.normalize(url) == spelled == storage.normalize(spelled)


@pytest.mark.parametrize(
    ("url", "said"),
    [("", "an empty URL names nothing"), ("  ", "an empty URL"), ("s3:/bucket/x", "write s3://bucket/x"),
     ("https:/user:S3CR3T@host/x", "one slash after its scheme")],
)  # fmt: skip
def test_what_would_be_a_local_name_that_nobody_means_is_refused(url: str, said: str) -> None:
    with pytest.raises(BadUrl, match=said):
        storage.normalize(url)


def test_a_shard_in_the_root_is_not_looked_for_in_the_working_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make(tmp_path, "nope.tar")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NoShardsMatched, match="the folder / holds no such file"):
        urls(["/nope.tar"])


def test_a_whole_bucket_stands_for_the_shards_in_it() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe({"/whole-bucket/b.tar": b"b", "/whole-bucket/a.tar": b"a", "/whole-bucket/notes.txt": b"n"})
    assert urls(["memory://whole-bucket"]) == ["memory://whole-bucket/a.tar", "memory://whole-bucket/b.tar"]


def test_a_web_server_that_sends_more_than_it_said_is_cut_off() -> None:
    out = io.BytesIO()
    with serve() as url:
        storage.copy_stream(f"{url}/x.tar", out, len(TAR))
        assert out.getvalue() == TAR
        with pytest.raises(StorageError, match=f"sends more than {len(TAR) - 1:,} bytes"):
            storage.copy_stream(f"{url}/x.tar", io.BytesIO(), len(TAR) - 1)


def test_relative_paths_become_absolute_and_home_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert storage.normalize("a/b.tar") == str(tmp_path / "a" / "b.tar")
    assert storage.normalize("~/b.tar") == "/home/me/b.tar"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:secret@host:8000/a/b.tar?token=abc&x=/y#part", "https://host:8000/a/b.tar"),
        ("https://secret@host/b.tar", "https://host/b.tar"),
        ("https://host?token=abc", "https://host"),
        ("s3://bucket/a@b/c.tar", "s3://bucket/a@b/c.tar"),
        ("https://[::1]:80/x.tar?q", "https://[::1]:80/x.tar"),
        ("https://[broken/x.tar?q", "https://[broken/x.tar"),
        ("abfss://container@account.dfs.core.windows.net/x.tar?sas=1", "abfss://container@account.dfs.core.windows.net/x.tar"),
        ("/local/what?/a#b@c.tar", "/local/what?/a#b@c.tar"),
        ("s3://bucket/why?/x#1.tar", "s3://bucket/why?/x#1.tar"),
        ("gs://bucket/a?b=c&d.tar", "gs://bucket/a?b=c&d.tar"),
        ("az://box/x?y.tar?se=1&sig=abc%3D", "az://box/x?y.tar"),
        ("s3://user:secret@bucket/what?.tar", "s3://bucket/what?.tar"),
        ("s3://b/x.tar?X-Amz-Algorithm=A&X-Amz-Signature=abc", "s3://b/x.tar"),
        ("s3://b/x.tar?a=1&AWSAccessKeyId=abc&Signature=def", "s3://b/x.tar"),
        ("s3://b/x.tar?versionId=abc", "s3://b/x.tar"),
        ("gs://b/x.tar#access_token=abc", "gs://b/x.tar"),
    ],
)  # fmt: skip
def test_what_is_shown_of_a_url_holds_no_credentials_and_no_query(url: str, shown: str) -> None:
    assert storage.public_url(url) == shown == storage.public_url(shown)


@pytest.mark.parametrize(
    ("url", "name"),
    [("s3://b/a/x?1#2.tar", "x?1#2.tar"), ("https://h/a/x.tar?b=/y", "x.tar"), ("s3://b", ""), ("https://h", ""),
     ("/a/x#1.tar", "x#1.tar"), ("x.tar", "x.tar")],
)  # fmt: skip
def test_the_last_piece_of_a_url(url: str, name: str) -> None:
    assert storage.base_name(url) == name


def test_shards_whose_names_differ_behind_a_question_mark_have_parts_of_their_own() -> None:
    names = ("a?1.tar", "a?2.tar", "a#1.tar", "a.tar")
    assert len({part_name(f"s3://b/{name}") for name in names}) == len(names)
    assert part_name("https://h/a.tar?sig=1") == part_name("https://h/a.tar?sig=2")


def test_urls_inside_messages_are_shown_the_same_way() -> None:
    text = "403, message='Forbidden', url='https://u:pw@h/x.tar?sig=abc' (see s3://b/k?versionId=1), not mail@host"
    assert storage.public_text(text) == "403, message='Forbidden', url='https://h/x.tar' (see s3://b/k not mail@host"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("GET /b/x.tar?X-Amz-Signature=SEC gave 403", "GET /b/x.tar?… gave 403"),
     ("HEAD '/b/x.tar?versionId=1&sig=SEC'", "HEAD '/b/x.tar?…'"), ("/b/x.tar?auth=SEC", "/b/x.tar?…"),
     ("bad sig=SEC&se=1, token=SEC", "bad sig=…&se=1, token=…"),
     ("AWSAccessKeyId=SEC was refused", "AWSAccessKeyId=… was refused"),
     ("x-amz-security-token=SEC; aws_secret_access_key=SEC", "x-amz-security-token=…; aws_secret_access_key=…"),
     ("https://h/x.tar?a=SEC: GET /x.tar?a=SEC", "https://h/x.tar GET /x.tar?…"),
     ("s3://b/a?1.tar is gone", "s3://b/a?1.tar is gone"), ("/d/what?.tar and a?1.tar", "/d/what?.tar and a?1.tar"),
     ("num_tokens=5, key=img1, offset=7", "num_tokens=5, key=img1, offset=7")],
)  # fmt: skip
def test_queries_and_signatures_in_messages_are_hidden_wherever_they_stand(text: str, shown: str) -> None:
    assert storage.public_text(text) == shown == storage.public_text(shown)


@pytest.mark.timeout(60)  # it took minutes
@pytest.mark.parametrize("piece", ["x", "?", "?a", "a.", "x-amz-", "_token", "http://", "?x=1&", "://"])
def test_a_text_of_many_characters_is_made_public_at_once(piece: str) -> None:
    text = piece * (300_000 // len(piece)) + " s3://key:secret@b/k?x-amz-signature=abc"
    assert "secret" not in storage.public_text(text) and "abc" not in storage.public_text(text)


def test_errors_of_shards_hold_no_credentials() -> None:
    error = ShardTruncated("https://u:pw@h/x.tar?sig=abc", "gone: https://u:pw@h/x.tar?sig=abc")
    assert str(error) == "https://h/x.tar: gone: https://h/x.tar"
    assert "pw" not in repr(error) and "abc" not in repr(error)


def test_a_package_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match=r"pip install 'dvae-ray\[gcs\]'"):
        storage.read_bytes("gs://bucket/x")
    with pytest.raises(StorageError, match="no URL that can be opened"):
        storage.read_bytes("nonsense://x")


# Publishing


def test_publish_makes_folders_and_replaces_what_was_there(tmp_path: Path) -> None:
    url = str(tmp_path / "a" / "b" / "c.bin")
    storage.publish(url, b"one")
    storage.publish(url, b"two")
    assert storage.read_bytes(url) == b"two"
    assert names(tmp_path / "a" / "b") == ["c.bin"]


def test_publish_that_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*taken: IsADirectoryError"):
        storage.publish(str(tmp_path / "taken"), b"x")
    assert names(tmp_path) == ["taken"]


def publish_for_ever(url: str) -> None:
    for n in range(1 << 20):
        storage.publish(url, bytes([n % 256]) * (1 << 20))


def test_a_process_killed_while_it_publishes_leaves_a_whole_object_and_no_listed_leftovers(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for delay_s in (0.02, 0.05, 0.08):
        process = context.Process(target=publish_for_ever, args=(str(tmp_path / "x.bin"),))
        process.start()
        time.sleep(delay_s)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if (tmp_path / "x.bin").exists():
            data = (tmp_path / "x.bin").read_bytes()
            assert len(data) == 1 << 20 and len(set(data)) == 1
        assert [i.url for i in storage.list_files(str(tmp_path))] in ([], [str(tmp_path / "x.bin")])
    storage.remove_temporaries(str(tmp_path))
    assert names(tmp_path) in ([], ["x.bin"])


def test_create_is_refused_where_something_is_unless_it_is_our_own(tmp_path: Path) -> None:
    MortalStore.fresh()
    for url in (str(tmp_path / "lease"), "memory://storage-test/lease", "mortal://lease"):
        assert storage.create(url, b"writer one")
        assert not storage.create(url, b"writer two")
        assert storage.create(url, b"writer one")  # an answer that was lost makes a client try again
        assert storage.read_bytes(url) == b"writer one"
        storage.remove(url)
    assert names(tmp_path) == []


def test_only_one_of_many_creators_succeeds(tmp_path: Path) -> None:
    results: list[bool] = []
    start = threading.Barrier(8)

    def create(writer: int) -> None:
        start.wait()
        results.append(storage.create(str(tmp_path / "lease"), b"writer %d" % writer))

    threads = [threading.Thread(target=create, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False] * 7 + [True]


def test_a_mount_without_hard_links_can_create_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "as on some FUSE mounts")

    monkeypatch.setattr(local_disk.os, "link", no_links)
    assert storage.create(str(tmp_path / "lease"), b"writer one")
    assert not storage.create(str(tmp_path / "lease"), b"writer two")
    assert names(tmp_path) == ["lease"]


def test_removing_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    storage.publish(str(tmp_path / "other"), b"x")
    storage.remove(str(tmp_path / "nothing"))
    storage.remove("memory://storage-test/nothing")
    assert names(tmp_path) == ["other"]


@pytest.mark.parametrize("action", ["publish", "create"])
def test_writing_where_no_folder_can_be_names_the_url_and_the_remedy(action: str) -> None:
    with pytest.raises(StorageError, match=r"/proc/nope/out: .*; check the bucket or the folder"):
        getattr(storage, action)("/proc/nope/out", b"x")


class NoSuchBucket(MemoryFileSystem):
    """Says it as s3fs does."""

    protocol = "nobucket"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        raise FileNotFoundError("The specified bucket does not exist")

    def rm_file(self, path: str) -> None:
        raise FileNotFoundError("The specified bucket does not exist")


@pytest.mark.parametrize("action", ["publish", "create"])
def test_writing_to_a_bucket_that_is_not_there_names_it(action: str) -> None:
    fsspec.register_implementation("nobucket", NoSuchBucket, clobber=True)
    with pytest.raises(StorageError, match=r"nobucket://tpyo/run\.json: .*; check the bucket or the folder"):
        getattr(storage, action)("nobucket://tpyo/run.json", b"x")
    storage.remove("nobucket://tpyo/run.json")


def test_an_object_that_goes_while_it_is_compared_was_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "memory://storage-test/brief"
    assert storage.create(url, b"writer one")

    def gone(*_: Any) -> bytes:
        raise FileNotFoundError(url)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", gone)
    assert not storage.create(url, b"writer two")
    storage.remove(url)


def test_removing_a_folder_takes_what_a_killed_writer_left_and_nothing_beside_it(tmp_path: Path) -> None:
    make(tmp_path, "step-1/model", "step-1/.model.0123.tmp", "step-1/below/x", "step-10/model")
    for base in (str(tmp_path), "memory://storage-test/folders"):
        for name in ("step-1/model", "step-1/below/x", "step-10/model"):
            storage.publish(f"{base}/{name}", b"x")
        storage.remove_folder(f"{base}/step-1")
        storage.remove_folder(f"{base}/step-1")  # not there any more
        assert urls_below(base) == [f"{base}/step-10/model"]
    assert names(tmp_path) == ["step-10"]
    storage.remove("memory://storage-test/folders/step-10/model")


def urls_below(url: str) -> list[str]:
    return [info.url for info in storage.list_files(url)]


def test_temporaries_of_a_killed_writer_are_not_listed_and_are_removed_on_a_disk_only(tmp_path: Path) -> None:
    make(tmp_path, "tokens/a.parquet", "tokens/.a.parquet.0123.tmp")
    assert [i.url for i in storage.list_files(str(tmp_path))] == [str(tmp_path / "tokens" / "a.parquet")]
    storage.remove_temporaries(str(tmp_path))
    storage.remove_temporaries("memory://storage-test")
    assert names(tmp_path / "tokens") == ["a.parquet"]


# Reading


def test_a_missing_object_is_a_file_not_found_error_everywhere(tmp_path: Path) -> None:
    for url in (str(tmp_path / "no"), "memory://storage-test/no"):
        with pytest.raises(FileNotFoundError):
            storage.read_bytes(url)
        with pytest.raises(FileNotFoundError):
            storage.open_read(url)
        assert not storage.exists(url)


def test_read_range_gives_just_that_range(tmp_path: Path) -> None:
    make(tmp_path, "abcdefgh")
    assert storage.read_range(str(tmp_path / "abcdefgh"), 2, 3) == b"cde"


class BrokenStore(MemoryFileSystem):
    """Its client's errors are no OSErrors, and quote the whole URL."""

    protocol = "broken"

    def cat_file(self, path: str, *_: Any, **__: Any) -> bytes:
        raise RuntimeError("SlowDown: broken://user:secret@host/key?token=abc")

    pipe_file = rm_file = exists = find = ls = glob = open = cat_file


@pytest.mark.parametrize("action", ["read_bytes", "open_read", "exists", "remove", "list_files", "publish", "create"])
def test_each_failure_of_a_store_is_a_storage_error_without_credentials(action: str) -> None:
    fsspec.register_implementation("broken", BrokenStore, clobber=True)
    arguments = [b"data"] if action in ("publish", "create") else []
    with pytest.raises(StorageError, match="broken://host/key: RuntimeError: SlowDown") as raised:
        getattr(storage, action)("broken://user:secret@host/key?token=abc", *arguments)
    assert "secret" not in str(raised.value) and "abc" not in str(raised.value)


# Listing


def test_a_prefix_that_is_not_there_lists_nothing(tmp_path: Path) -> None:
    assert storage.list_files(str(tmp_path / "no")) == []
    assert storage.list_files("memory://storage-test/no") == []


def test_listings_name_size_and_mark_and_change_with_the_content(tmp_path: Path) -> None:
    make(tmp_path, "b.tar", "a/c.tar")
    first, second = storage.list_files(str(tmp_path))
    assert [(first.url, first.size_bytes), (second.url, second.size_bytes)] == [
        (str(tmp_path / "a" / "c.tar"), 7), (str(tmp_path / "b.tar"), 5),
    ]  # fmt: skip
    os.utime(tmp_path / "b.tar", (1, 1))
    assert storage.list_files(str(tmp_path))[1].etag != second.etag
    assert storage.list_files(str(tmp_path))[0] == first


def test_links_to_shards_are_shards_with_the_size_and_mark_of_what_they_point_to(tmp_path: Path) -> None:
    """As in the cache of a data hub, where every file is a link."""
    make(tmp_path, "blobs/0123456789abcdef")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.tar").symlink_to("../blobs/0123456789abcdef")
    os.utime(tmp_path / "blobs" / "0123456789abcdef", (5, 5))
    for pattern in (tmp_path / "data", tmp_path / "data" / "*.tar", tmp_path / "data" / "x.tar"):
        (info,) = expand([str(pattern)])
        assert (info.url, info.size_bytes, info.etag) == (str(tmp_path / "data" / "x.tar"), 22, "5.0")


def test_folders_that_are_links_are_entered(tmp_path: Path) -> None:
    make(tmp_path, "elsewhere/train/x.tar")
    (tmp_path / "data").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train").symlink_to(tmp_path / "elsewhere" / "train")
    assert urls([str(tmp_path / "data")]) == [str(tmp_path / "data" / "train" / "x.tar")]
    assert urls([str(tmp_path / "set")]) == [str(tmp_path / "set" / "train" / "x.tar")]
    assert urls([str(tmp_path / "set" / "*" / "*.tar")]) == [str(tmp_path / "set" / "train" / "x.tar")]


def test_a_link_to_nothing_is_listed_so_that_reading_it_says_what_is_missing(tmp_path: Path) -> None:
    make(tmp_path, "good.tar")
    (tmp_path / "lost.tar").symlink_to(tmp_path / "not downloaded")
    assert urls([str(tmp_path / "*.tar")]) == [str(tmp_path / "good.tar"), str(tmp_path / "lost.tar")]
    with pytest.raises(FileNotFoundError):
        storage.open_read(str(tmp_path / "lost.tar"))


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_an_empty_folder(tmp_path: Path) -> None:
    make(tmp_path, "data/a.tar")
    (tmp_path / "data" / "round").symlink_to(tmp_path / "data" / "round")  # fails for root too, as a stale mount does
    for listing in (
        storage.list_files,
        lambda url: expand([url]),
        lambda url: expand([f"{url}/*.tar"]),
    ):
        with pytest.raises(StorageError, match="cannot list"):
            listing(str(tmp_path / "data"))


def test_stat_says_what_a_listing_says_and_none_of_what_is_no_object(tmp_path: Path) -> None:
    for base in (str(tmp_path), "memory://storage-test/stat"):
        storage.publish(f"{base}/folder/x.tar", b"abc")
        assert storage.stat(f"{base}/folder/x.tar") == storage.list_files(base)[0]
        assert storage.stat(f"{base}/folder") is None and storage.stat(f"{base}/no") is None
    os.utime(tmp_path / "folder" / "x.tar", (5, 5))
    assert storage.stat(str(tmp_path / "folder" / "x.tar")) == ObjectInfo(f"{tmp_path}/folder/x.tar", 3, "5.0")
    storage.remove("memory://storage-test/stat/folder/x.tar")


class TwoFaced(MemoryFileSystem):
    """A store whose own names are other than its URLs, as `az://` and `s3a://` are to theirs."""

    protocol = ("abfs", "az")


@pytest.mark.parametrize("base", ["az://container/set", "abfs://container/set", "memory://listing-test/set"])
def test_urls_are_spelled_as_they_were_asked_for(base: str) -> None:
    fsspec.register_implementation("az", TwoFaced, clobber=True)
    fsspec.register_implementation("abfs", TwoFaced, clobber=True)
    TwoFaced._strip_protocol = classmethod(  # type: ignore[method-assign]
        lambda cls, path: MemoryFileSystem._strip_protocol(path.partition("://")[2] if "://" in path else path)
    )
    expected = [f"{base}/x-{n}.tar" for n in range(3)]
    try:
        for url in expected:
            storage.publish(url, b"x")
        assert [i.url for i in storage.list_files(base)] == expected
        assert urls([f"{base}/*.tar"]) == urls([base]) == urls([f"{base}/x-{{0..2}}.tar"]) == expected
    finally:
        MemoryFileSystem.store.clear()


# Patterns


def test_patterns_are_braces_globs_folders_and_names_each_shard_once_in_order(tmp_path: Path) -> None:
    make(tmp_path, *(f"s/x-{n:03d}.tar" for n in range(12)), "s/y.tar.gz", "s/z.tgz", "s/notes.txt", "t/a.tar")
    all_x = [f"{tmp_path}/s/x-{n:03d}.tar" for n in range(12)]
    assert urls([f"{tmp_path}/s/x-{{000..011}}.tar"]) == all_x
    assert urls([f"{tmp_path}/s/x-*.tar"]) == urls([f"{tmp_path}/s/x-0??.tar"]) == all_x
    assert urls([f"{tmp_path}/s/x-00[3-5].tar"]) == all_x[3:6]
    assert urls([f"{tmp_path}/{{t,s}}/*.tar"]) == [*all_x, f"{tmp_path}/t/a.tar"]
    assert urls([f"{tmp_path}/s"]) == [*all_x, f"{tmp_path}/s/y.tar.gz", f"{tmp_path}/s/z.tgz"]
    assert urls([f"{tmp_path}/**/*.tar"]) == [*all_x, f"{tmp_path}/t/a.tar"]
    assert urls([f"file://{tmp_path}/t/a.tar", f"{tmp_path}/t/../t/a.tar", f"{tmp_path}/t"]) == [f"{tmp_path}/t/a.tar"]
    assert urls([f"{tmp_path}/s/notes.txt"]) == [f"{tmp_path}/s/notes.txt"]  # named: so it is meant


def test_a_folder_gives_its_shards_however_their_suffix_is_written(tmp_path: Path) -> None:
    make(tmp_path, "s/a.tar", "s/b.TAR", "s/c.Tar.GZ", "s/d.TGZ", "s/e.tart")
    assert urls([f"{tmp_path}/s"]) == [f"{tmp_path}/s/{name}" for name in ("a.tar", "b.TAR", "c.Tar.GZ", "d.TGZ")]


def test_patterns_that_are_wrong_are_shown_without_credentials() -> None:
    for pattern in ("https://me:SEC@h/{a,b.tar?sig=SEC", "memory://me:SEC@h/nothing-*.tar"):
        with pytest.raises(NoShardsMatched) as raised:
            expand([pattern])
        assert "SEC" not in str(raised.value) and "://h/" in str(raised.value)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("s/nope-*.tar", r"nope-\*\.tar.*matches nothing; the folder .*/s holds no such file"),
        ("t/*.tar", r"t/\*\.tar.*the folder .*/t does not exist"),
        ("s/x-{000..002}.tar", r"x-002\.tar does not exist"),
        ("{s,t}/*.tar", r"t/\*\.tar.*matches nothing"),  # not just fewer shards
        ("s/x-{000..001.tar", "unbalanced braces"),
        ("empty", "holds no shard.*\\.tar"),
        ("s/missing.tar", r"missing\.tar does not exist; the folder .*/s holds no such file"),
    ],
)
def test_a_pattern_that_matches_nothing_is_named_with_the_remedy(tmp_path: Path, pattern: str, said: str) -> None:
    make(tmp_path, "s/x-000.tar", "s/x-001.tar", "empty/notes.txt")
    with pytest.raises(NoShardsMatched, match=said) as raised:
        expand([f"{tmp_path}/s/*.tar", f"{tmp_path}/{pattern}"])
    assert isinstance(raised.value, PipelineError) and raised.value.exit_code == 2


def test_a_hundred_thousand_named_shards_cost_one_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(MemoryFileSystem):
        protocol = "counting"
        listings = 0

        def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
            Counting.listings += 1
            return [{"name": f"/b/x-{n:06d}.tar", "size": 1, "type": "file", "created": 1} for n in range(100_000)]

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.removeprefix("counting://").strip("/")

    fsspec.register_implementation("counting", Counting, clobber=True)
    assert len(expand(["counting://b/x-{000000..099999}.tar"])) == 100_000
    assert Counting.listings == 1


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.server
def test_shards_behind_signed_web_addresses_are_found_and_read(tmp_path: Path, web: str) -> None:
    make(tmp_path, "x-0.tar", "x-1.tar")
    first, second = expand([f"{web}/x-{{0..1}}.tar?sig=a[b]/c"])  # its question mark is no wildcard
    assert (first.url, first.size_bytes) == (f"{web}/x-0.tar?sig=a[b]/c", 7)
    assert first.etag
    with storage.open_read(second.url) as stream:
        assert stream.read() == b"x-1.tar"
    with pytest.raises(NoShardsMatched, match=f"shard {web}/x-2.tar does not exist") as raised:
        expand([f"{web}/x-2.tar?sig=secret"])
    assert "secret" not in str(raised.value)


@pytest.mark.server
def test_a_web_server_that_refuses_is_not_taken_for_one_without_the_object(
    web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_requests, "PATIENCE_S", 0.5)
    make(tmp_path, "x-0.tar")
    found = storage.stat(f"{web}/x-0.tar")
    assert found is not None and found.size_bytes == 7
    assert storage.stat(f"{web}/x-1.tar") is None
    with pytest.raises(StorageError, match=r"cannot look for .*x-0"):
        storage.stat(web.rpartition(":")[0] + ":1/x-0.tar")  # nobody listens there


def test_the_mortal_store_dies_before_the_change_that_it_was_told() -> None:
    MortalStore.fresh().alive(kill_before=1)
    storage.publish("mortal://a", b"1")
    with pytest.raises(Killed):
        storage.publish("mortal://b", b"2")
    assert MortalStore.objects() == {"/a": b"1"}


def test_when_objects_were_written_is_told_by_name(tmp_path: Path) -> None:
    storage.publish(str(tmp_path / "in" / "a"), b"1")
    storage.publish(str(tmp_path / "in" / "below" / "b"), b"1")
    os.utime(tmp_path / "in" / "a", (5.0, 1000.5))
    assert storage.written_at(str(tmp_path / "in")) == {"a": 1000.5}
    assert storage.written_at(str(tmp_path / "nowhere")) == {}


@pytest.mark.parametrize(
    ("entry", "seconds"),
    [({"LastModified": datetime(2026, 1, 2, tzinfo=UTC)}, 1767312000.0), ({"mtime": 7.5, "created": 9.0}, 7.5),
     ({"updated": "2026-01-02T00:00:00Z"}, 1767312000.0), ({"ETag": "x"}, None)],
)  # fmt: skip
def test_stores_say_in_several_ways_when_an_object_was_written(entry: dict[str, Any], seconds: float | None) -> None:
    assert time_of(entry) == seconds
