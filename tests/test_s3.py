"""From object storage to object storage, on a real S3 server."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import duckdb
import fsspec
import pytest

from jobs.local_servers import S3Server
from make_data import write_checkpoint, write_shards
from pipeline import storage
from pipeline.errors import NoShardsMatched, StorageError
from pipeline.shard_patterns import expand

pytestmark = pytest.mark.server
COUNTS = [5, 11]


def upload(folder: Path, url: str) -> None:
    for path in folder.iterdir():
        storage.publish(storage.join(url, path.name), path.read_bytes())


def dvae(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.ray
def test_tokenises_from_and_to_a_bucket_and_duckdb_reads_it_there(s3: str, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", COUNTS)
    upload(tmp_path / "shards", f"{s3}/in")
    upload(write_checkpoint(tmp_path / "checkpoint"), f"{s3}/checkpoint")
    (tmp_path / "t.yaml").write_text(f"checkpoint: {s3}/checkpoint\nshards: {s3}/in/made-*.tar\noutput: {s3}/out\n")

    done = dvae("tokenize", str(tmp_path / "t.yaml"), "batch_size=8")
    assert done.returncode == 0, done.stderr
    assert f"2 of 2 shards · {sum(COUNTS)} images tokenised · 0 failed" in done.stdout

    duckdb.register_filesystem(fsspec.filesystem("s3"))
    query = f"SELECT key, shard, len(tokens) FROM '{s3}/out/tokens/*.parquet' ORDER BY key"
    rows = duckdb.sql(query).fetchall()
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


def test_a_server_killed_and_started_again_has_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tests may kill the server that a run writes to."""
    server = S3Server(tmp_path, "killed-bucket")
    server.start()
    try:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()  # it remembers another server
        for n in range(5):
            storage.publish(f"s3://killed-bucket/{n}", b"%d" % n * 1000)
        server.kill()
        server.start()
        deadline = time.monotonic() + 30
        while True:
            try:
                found = [storage.read_bytes(i.url) for i in storage.list_files("s3://killed-bucket")]
                break
            except StorageError:  # it says "internal error" for a moment
                assert time.monotonic() < deadline
        assert found == [b"%d" % n * 1000 for n in range(5)]
    finally:
        server.stop()
        fsspec.filesystem("s3").clear_instance_cache()
