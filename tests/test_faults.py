"""Whole runs from and to a real S3 server whose answers fail, are lost, cut, damaged, late or never come: the parts are
byte-identical to those of an undisturbed run, and every image is accounted for."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow.parquet as pq
import pytest

from fault_proxy import Fault, Rule, fault_proxy
from make_data import write_checkpoint, write_shards
from pipeline import storage
from web_server import serve

pytestmark = [pytest.mark.server, pytest.mark.ray]
COUNTS = [9, 5, 12]
WHOLE = f"3 of 3 shards · {sum(COUNTS)} images tokenised · 0 failed"


class World:
    """Shards in a bucket, a checkpoint on the disk, and the parts of a run that nothing disturbed."""

    def __init__(self, s3: str, folder: Path) -> None:
        self.s3, self._folder = s3, folder
        write_shards(folder / "shards", COUNTS)
        for path in (folder / "shards").iterdir():
            storage.publish(f"{s3}/faults/in/{path.name}", path.read_bytes())
        self._checkpoint = write_checkpoint(folder / "checkpoint")
        self.port = urlsplit(os.environ["AWS_ENDPOINT_URL"]).port or 0
        done = self.tokenize("calm", self.port)
        assert done.returncode == 0 and WHOLE in done.stdout, done.stderr
        self.calm = self.parts("calm")
        assert len(self.calm) == len(COUNTS)

    def tokenize(
        self, output: str, port: int, *settings: str, shards: Sequence[str] = (), timeouts_s: float | None = None
    ) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        if timeouts_s is not None:
            environment["FSSPEC_S3"] = json.dumps({"config_kwargs": {"read_timeout": timeouts_s}})
        config = {"checkpoint": str(self._checkpoint), "shards": shards or f"{self.s3}/faults/in/*.tar",
                  "output": f"{self.s3}/faults/{output}", "batch_size": 8, "retry_pause_s": 0.2}  # fmt: skip
        (self._folder / "tokenize.yaml").write_text(json.dumps(config))  # which is YAML too
        command = [sys.executable, "-m", "jobs.cli", "tokenize", str(self._folder / "tokenize.yaml"), *settings]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    def parts(self, output: str) -> dict[str, bytes]:
        infos = storage.list_files(f"{self.s3}/faults/{output}/tokens")
        return {storage.base_name(info.url): storage.read_bytes(info.url) for info in infos}

    def survives(self, name: str, rules: Sequence[Rule], *settings: str, timeouts_s: float | None = None) -> None:
        with fault_proxy(self.port, rules) as proxy:
            done = self.tokenize(name, proxy.port, *settings, timeouts_s=timeouts_s)
        assert done.returncode == 0 and WHOLE in done.stdout, done.stderr
        assert self.parts(name) == self.calm
        names = {storage.base_name(info.url) for info in storage.list_files(f"{self.s3}/faults/{name}")}
        assert "manifest.json" in names and "lease.json" not in names
        for rule in rules:
            assert rule.fired == rule.times, f"{rule} did not fire as often as it should"


@pytest.fixture(scope="module")
def world(s3: str, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(s3, tmp_path_factory.mktemp("faults"))


def test_answers_that_are_refused_lost_or_late_change_nothing(world: World) -> None:
    world.survives("refused", [
        Rule(Fault.RESET_AFTER, "PUT", r"/refused/lease\.json"),  # made, and its maker is not told
        Rule(Fault.RESET_AFTER, "PUT", r"/refused/run\.json"),
        Rule(Fault.RESET_AFTER, "PUT", r"/refused/tokens/made-000000"),
        Rule(Fault.RESET_AFTER, "PUT", r"/refused/ledger/"),
        Rule(Fault.RESET_BEFORE, "PUT", r"/refused/tokens/made-000001"),
        Rule(Fault.RESET_BEFORE, "GET", r"list-type=2"),
        Rule(Fault.RESET_BEFORE, "GET", r"/in/made-000002", times=2),
        Rule(Fault.SLOW_DOWN, "PUT", r"/refused/tokens/made-000002", times=3),
        Rule(Fault.SLOW_DOWN, "GET", r"/in/made-000001", times=3),
        Rule(Fault.SLOW_DOWN, "HEAD", r"/in/made-000000", times=2),
        Rule(Fault.DELAY, "PUT", r"/refused/manifest\.json", seconds=2),
    ])  # fmt: skip


def test_downloads_and_uploads_that_are_cut_or_damaged_change_nothing(world: World) -> None:
    world.survives("cut", [
        Rule(Fault.CUT_DOWNLOAD, "GET", r"/in/made-000000", times=2),
        Rule(Fault.CORRUPT, "GET", r"/in/made-000001", times=1),
        Rule(Fault.CORRUPT, "GET", r"/in/made-000002", times=2, every=2),
        Rule(Fault.CUT_UPLOAD, "PUT", r"/cut/tokens/made-000000", times=2),
        Rule(Fault.CUT_UPLOAD, "PUT", r"/cut/ledger/"),
    ])  # fmt: skip


def test_a_server_that_hangs_is_asked_again(world: World) -> None:
    world.survives("hung", [
        Rule(Fault.HANG, "GET", r"/in/made-000000"),
        Rule(Fault.HANG, "HEAD", r"/in/made-000002"),
        Rule(Fault.HANG, "PUT", r"/hung/tokens/made-000001"),
        Rule(Fault.HANG, "PUT", r"/hung/lease\.json"),
    ], timeouts_s=2)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", Fault)
def test_every_second_request_for_a_shard_and_every_second_write_fails_in_each_way(world: World, fault: Fault) -> None:
    name = f"second-{fault}"
    answers = fault in (Fault.CUT_DOWNLOAD, Fault.CORRUPT)  # what a PUT answers is empty
    uploads = fault is Fault.CUT_UPLOAD  # what a GET sends is empty
    rules = [Rule(fault, "GET", "/in/made-00000", times=2, every=2, seconds=3)] if not uploads else []
    rules += [Rule(fault, "PUT", f"/{name}/", times=4, every=2, seconds=3)] if not answers else []
    world.survives(name, rules, "attempts=5", timeouts_s=2)


@pytest.mark.slow
def test_a_storm_of_slow_downs_is_ridden_out(world: World) -> None:
    """Longer than the patience of s3fs and botocore together."""
    world.survives("storm", [
        Rule(Fault.SLOW_DOWN, "PUT", r"/storm/tokens/made-000001", times=30),
        Rule(Fault.SLOW_DOWN, "GET", r"/in/made-000002", times=30),
    ])  # fmt: skip


def test_no_secret_is_in_anything_that_a_run_leaves_or_says(world: World) -> None:
    secrets = ("pa55w0rd", "s1gnatur3", os.environ["AWS_SECRET_ACCESS_KEY"])
    with serve() as url:
        signed = url.replace("http://", "http://user:pa55w0rd@").rpartition("/")[0]
        shards = [f"{signed}/{name}.tar?token=s1gnatur3&x=1" for name in ("good", "broken")]
        done = world.tokenize("secrets", world.port, "attempts=2", shards=shards)
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "1 shards are quarantined" in said and "/broken.tar" in said, said
    infos = storage.list_files(f"{world.s3}/faults/secrets")
    kinds = {info.url.split("/faults/secrets/")[1].split("/")[0] for info in infos}
    assert {"run.json", "plan.json", "tokens", "errors", "ledger"} <= kinds
    for place, text in {"what it said": said, **{info.url: everything_in(info.url) for info in infos}}.items():
        assert not [secret for secret in secrets if secret in text], place


def everything_in(url: str) -> str:
    """The bytes as they are, and what Parquet has packed."""
    data = storage.read_bytes(url)
    text = url + data.decode("latin-1")
    if url.endswith(".parquet"):
        table = pq.read_table(io.BytesIO(data))
        text += str(table.to_pylist()) + str(table.schema.metadata)
    return text
