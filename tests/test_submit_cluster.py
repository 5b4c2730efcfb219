"""`dvae submit` and `dvae jobs` on a real Ray Jobs server with an S3 server: jobs that are followed, stopped half way and
submitted again, a head that is killed, and secrets that are found nowhere."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from jobs.local_servers import RayHead
from jobs.submit import submission_id
from make_data import write_checkpoint, write_shards
from make_training import settings, write_training_data
from pipeline import storage
from web_server import serve

pytestmark = [pytest.mark.ray, pytest.mark.server]
NUM_SHARDS, IMAGES = 12, 30
USER, PASSWORD, SIGNATURE = "planted-user", "planted-password", "planted-signature"
DONE = re.compile(r"rows, 0 failed|shards \d+ of \d+")


@pytest.fixture
def head(s3: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    """Jobs find the bucket by the head's own environment, as they would by its machine's."""
    head = RayHead(tmp_path_factory.mktemp("ray"), num_cpus=4)
    head.start()
    yield head
    head.stop()


def upload(folder: Path, url: str) -> None:
    for path in filter(Path.is_file, folder.rglob("*")):
        storage.publish(storage.join(url, path.relative_to(folder).as_posix()), path.read_bytes())


@contextmanager
def dvae(head: RayHead, folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A client of that cluster; gone, whatever happens, when the block ends."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | head.environment
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *arguments], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def run(head: RayHead, folder: Path, *arguments: str, code: int = 0) -> str:
    """What it said, when it ended with this code."""
    with dvae(head, folder, *arguments) as process:
        said = process.communicate(timeout=200)[0]
        assert process.returncode == code, said
        return said


def read_until(process: subprocess.Popen[str], is_it: Callable[[str], object]) -> str:
    """What it says up to the first line that `is_it`."""
    said = ""
    assert process.stdout is not None
    for line in process.stdout:
        said += line
        if is_it(line):
            return said
    raise AssertionError(f"ended too early: {said}")


def write_yaml(path: Path, values: dict[str, object]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(values))


def tokenize_job(s3: str, tmp_path: Path, name: str, *more_shards: str) -> tuple[Path, str]:
    """(folder to submit `t.yaml` from, output): some seconds of work."""
    write_shards(tmp_path / "shards", [IMAGES] * NUM_SHARDS)
    upload(tmp_path / "shards", f"{s3}/{name}/in")
    upload(write_checkpoint(tmp_path / "checkpoint", size=128, width=128), f"{s3}/{name}/checkpoint")
    write_yaml(tmp_path / "job" / "t.yaml", {
        "checkpoint": f"{s3}/{name}/checkpoint", "shards": [f"{s3}/{name}/in/*.tar", *more_shards], "batch_size": 8,
        "output": f"{s3}/{name}/out", "ray": {"num_actors": 1, "shards_in_flight": 2}, "retry_pause_s": 0.1,
    })  # fmt: skip
    return tmp_path / "job", f"{s3}/{name}/out"


def parts(output: str) -> dict[str, str]:
    return {info.url: info.etag for info in storage.list_files(f"{output}/tokens")}


@pytest.mark.timeout(400)
def test_a_tokenising_job_is_stopped_half_way_and_submitted_again_and_ends_complete_with_no_secret_anywhere(
    s3: str, head: RayHead, tmp_path: Path
) -> None:
    with serve() as web:
        secret_url = web.replace("http://", f"http://{USER}:{PASSWORD}@") + f"?sig={SIGNATURE}"
        folder, output = tokenize_job(s3, tmp_path, "journey", secret_url)
        name = submission_id("tokenize", output)
        with dvae(head, folder, "submit", "tokenize", "t.yaml") as first:
            said = read_until(first, lambda line: ": 30 rows" in line)
            assert f"submitted {name} with " in said and "dvae tokenize t.yaml\n" in said
            first.send_signal(signal.SIGINT)
            said += first.communicate(timeout=30)[0]
            assert first.returncode == 130 and f"detached; {name} goes on" in said
        with dvae(head, folder, "submit", "tokenize", "t.yaml") as second:
            assert "is running already" in read_until(second, lambda line: ": 30 rows" in line)
            stopped = run(head, folder, "jobs", "stop", name)
            assert "stopped: " in stopped and "go on with" in stopped and f"{name}: STOPPED" in stopped
            said = second.communicate(timeout=30)[0]
            assert second.returncode == 130 and f"{name} was stopped" in said
        done = parts(output)
        assert 0 < len(done) < NUM_SHARDS + 1 and not storage.exists(f"{output}/lease.json")

        said = run(head, folder, "submit", "tokenize", "t.yaml")
        assert f"submitted {name}-2 " in said and f"{NUM_SHARDS + 1} of {NUM_SHARDS + 1} shards" in said
        assert done.items() <= parts(output).items(), "a finished part was written again"
        refused = run(head, folder, "submit", "tokenize", "t.yaml", "batch_size=4", code=2)
        assert f"submitted {name}-3 " in refused and "numerics.batch_size" in refused
    assert "complete" in run(head, folder, "verify", output)
    rows = json.loads(run(head, folder, "jobs", "list", "--json"))
    assert [(row["job"], row["state"], row["exit_code"]) for row in rows] == [
        (name, "STOPPED", None), (f"{name}-2", "SUCCEEDED", 0), (f"{name}-3", "FAILED", 2),
    ]  # fmt: skip
    assert {row["output"] for row in rows} == {output}
    assert "12 of 13" not in run(head, folder, "jobs", "logs", f"{name}-2", "--follow")
    unknown = {**head.environment, "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}
    head.environment, mine = unknown, head.environment
    assert "token" in run(head, folder, "jobs", "list", code=2)
    head.environment = mine
    nowhere(head, output, tmp_path)


def nowhere(head: RayHead, output: str, tmp_path: Path) -> None:
    """No planted secret in what the head tells and keeps of its jobs, nor in what they wrote."""
    token = head.environment["RAY_AUTH_TOKEN"]
    secrets = (token, USER, PASSWORD, SIGNATURE, os.environ["AWS_SECRET_ACCESS_KEY"])
    asked = ("jobs/", "v0/actors?detail=1", "v0/tasks?detail=1", "v0/runtime_envs?detail=1", "v0/workers?detail=1",
             "v0/jobs?detail=1", "v0/nodes?detail=1", "cluster_status", "v0/cluster_metadata", "serve/applications/")  # fmt: skip
    places = {path: ask(head, f"/api/{path}", token) for path in asked}
    places |= {path: ask(head, path, token) for path in ("/nodes?view=details", "/logical/actors", "/events")}
    session = json.loads(places["v0/cluster_metadata"])["data"]["sessionName"]
    logs = [path for path in Path("/tmp/ray", session, "logs").rglob("*") if path.is_file()]
    places |= {str(path): path.read_bytes() for path in logs}
    places |= {info.url: storage.read_bytes(info.url) for info in storage.list_files(output)}
    assert any("job-driver-" in place for place in places) and f"{output}/run.json" in places
    assert f"{output}/plan.json" in places and f"{output}/manifest.json" in places
    found = {(place, secret) for place, data in places.items() for secret in secrets if secret.encode() in data}
    assert found == set()


def ask(head: RayHead, path: str, token: str) -> bytes:
    request = urllib.request.Request(head.dashboard + path, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        data: bytes = answer.read()
        return data
