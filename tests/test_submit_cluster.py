"""`dvae submit` and `dvae jobs` on a real Ray Jobs server with an S3 server: jobs that are followed, stopped half way
and submitted again, a head that is killed, and secrets that are found nowhere."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from jobs.local_servers import RayHead
from jobs.submit import submission_id
from jobs.train_output import TrainOutput
from jobs.verify import run_verify
from make_data import write_checkpoint, write_shards
from make_training import settings, write_training_data
from pipeline import storage
from web_server import serve

pytestmark = [pytest.mark.ray, pytest.mark.server]
NUM_SHARDS, IMAGES = 12, 30
USER, PASSWORD, SIGNATURE = "planted-user", "planted-password", "planted-signature"


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
def dvae(head: RayHead, folder: Path, *arguments: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A client of that cluster; gone, whatever happens, when the block ends."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {**head.environment, **variables}
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
        return end_of(process, code)


def end_of(process: subprocess.Popen[str], code: int = 0) -> str:
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
    """(folder to submit `t.yaml` from, output)."""
    write_shards(tmp_path / "shards", [IMAGES] * NUM_SHARDS)
    upload(tmp_path / "shards", f"{s3}/{name}/in")
    upload(write_checkpoint(tmp_path / "checkpoint"), f"{s3}/{name}/checkpoint")
    write_yaml(tmp_path / "job" / "t.yaml", {
        "checkpoint": f"{s3}/{name}/checkpoint", "shards": [f"{s3}/{name}/in/*.tar", *more_shards], "batch_size": 8,
        "output": f"{s3}/{name}/out", "ray": {"num_actors": 1, "shards_in_flight": 3}, "retry_pause_s": 0.1,
    })  # fmt: skip
    return tmp_path / "job", f"{s3}/{name}/out"


def parts(output: str) -> dict[str, str]:
    return {info.url: info.etag for info in storage.list_files(f"{output}/tokens")}


@pytest.mark.timeout(400)
def test_a_tokenising_job_is_stopped_half_way_and_submitted_again_and_ends_complete_with_no_secret_anywhere(
    s3: str, head: RayHead, tmp_path: Path
) -> None:
    gate = threading.Event()  # two of the shards cannot end before it is open
    with serve(gate=gate) as web:
        secret_url = web.replace("http://", f"http://{USER}:{PASSWORD}@") + f"?sig={SIGNATURE}"
        folder, output = tokenize_job(s3, tmp_path, "journey", secret_url, secret_url.replace("x.tar", "y.tar"))
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
            assert "with\n  dvae submit tokenize t.yaml\n" in stopped
            said = second.communicate(timeout=30)[0]
            assert second.returncode == 130 and f"{name} was stopped" in said
        gate.set()
        done = parts(output)
        assert 0 < len(done) <= NUM_SHARDS and not storage.exists(f"{output}/lease.json")

        said = run(head, folder, "submit", "tokenize", "t.yaml")
        all_done = f"{NUM_SHARDS + 2} of {NUM_SHARDS + 2} shards"
        assert f"submitted {name}-2 " in said and all_done in said
        assert done.items() <= parts(output).items(), "a finished part was written again"
        refused = run(head, folder, "submit", "tokenize", "t.yaml", "batch_size=4", code=2)
        assert f"submitted {name}-3 " in refused and "numerics.batch_size" in refused
    assert run_verify(output, as_json=False, quick=False) == 0
    with (  # at once: what takes them long is Ray's import
        dvae(head, folder, "jobs", "list", "--json") as listed,
        dvae(head, folder, "jobs", "logs", f"{name}-2", "--follow") as followed,
        dvae(head, folder, "jobs", "list", RAY_AUTH_TOKEN="0123456789abcdef0123456789abcdef") as stranger,
    ):
        rows = json.loads(end_of(listed))
        assert all_done in end_of(followed)
        assert "token" in end_of(stranger, code=2)
    assert [(row["job"], row["state"], row["exit_code"]) for row in rows] == [
        (name, "STOPPED", None), (f"{name}-2", "SUCCEEDED", 0), (f"{name}-3", "FAILED", 2),
    ]  # fmt: skip
    assert {row["output"] for row in rows} == {output}
    nowhere(head, output, "manifest.json", "tokens")


def nowhere(head: RayHead, output: str, *names: str) -> None:
    """No planted secret in what the head tells and keeps of its jobs, nor in what they wrote (`names` of it are
    there)."""
    token = head.environment["RAY_AUTH_TOKEN"]
    secrets = (token, USER, PASSWORD, SIGNATURE, os.environ["AWS_SECRET_ACCESS_KEY"])
    tables = (f"v0/{name}?detail=1" for name in ("actors", "tasks", "runtime_envs", "workers", "jobs", "nodes"))
    asked = ("jobs/", "cluster_status", *tables)
    places = {path: ask(head, f"/api/{path}", token) for path in asked}
    places |= {
        path: ask(head, path, token)
        for path in ("/nodes?view=details", "/nodes?view=summary", "/logical/actors", "/events")
    }
    logs = [path for path in (head.sessions / "session_latest" / "logs").rglob("*") if path.is_file()]
    assert any(path.name.startswith(f"job-driver-{submission_id('tokenize', output)}") for path in logs)
    places |= {str(path): path.read_bytes() for path in logs}
    places |= {info.url: readable(info.url) for info in storage.list_files(output)}
    assert all(b"dvae tokenize t.yaml" in places[path] for path in ("jobs/", "v0/jobs?detail=1"))
    for name in ("run.json", "plan.json", *names):
        assert any(place.startswith(f"{output}/{name}") for place in places), name
    assert {place.removeprefix(f"{output}/").partition("/")[0] for place in places if b".tar" in places[place]} >= {
        "ledger",
        *names,
    }, "their texts are read"
    found = {(place, secret) for place, data in places.items() for secret in secrets if secret.encode() in data}
    assert found == set()


def readable(url: str) -> bytes:
    """Parquet's texts and footer are compressed."""
    data = storage.read_bytes(url)
    if not url.endswith(".parquet"):
        return data
    table = pq.read_table(io.BytesIO(data))
    return f"{table.schema.metadata} {table.to_pylist()}".encode()


def ask(head: RayHead, path: str, token: str) -> bytes:
    request = urllib.request.Request(head.dashboard + path, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            data: bytes = answer.read()
            return data
    except urllib.error.HTTPError as refusal:  # not each of them is there in each way of starting Ray
        print(path, refusal)  # noqa: T201 - shown where the test fails
        return refusal.read()


@pytest.mark.slow
@pytest.mark.training
@pytest.mark.timeout(500)
def test_a_training_job_is_stopped_half_way_and_submitted_again_and_ends_as_one_that_nothing_disturbed(
    s3: str, head: RayHead, tmp_path: Path
) -> None:
    """Its steps are more than it can do, until it is known where it was stopped."""
    write_training_data(tmp_path)
    upload(tmp_path / "train", f"{s3}/train")
    upload(tmp_path / "val", f"{s3}/val")
    write_yaml(tmp_path / "job" / "t.yaml", settings(
        Path("unused"), output=f"{s3}/stopped", eval={"every_steps": 0}, checkpoint={"every_steps": 500},
        data={"train_shards": f"{s3}/train/*.tar", "val_shards": f"{s3}/val/*.tar"}, log={"every_steps": 100},
        ray={"num_workers": 2, "cpus_per_worker": 1},
    ))  # fmt: skip
    name = submission_id("train", f"{s3}/stopped")
    with dvae(head, tmp_path / "job", "submit", "train", "t.yaml", "steps=1000000") as client:
        wait_for(lambda: any(storage.list_files(f"{s3}/stopped/checkpoints")))
        said = run(head, tmp_path / "job", "jobs", "stop", name)
        assert "a checkpoint is saved first" in said and "go on with" in said and "STOPPED" in said
        assert client.wait(timeout=30) == 130
    stopped_at = TrainOutput(f"{s3}/stopped").newest_step()
    assert stopped_at % 500, "the checkpoint is that of the goodbye"
    steps = f"steps={stopped_at + 25}"
    assert "done: " in run(head, tmp_path / "job", "submit", "train", "t.yaml", steps)
    run(head, tmp_path / "job", "submit", "train", "t.yaml", steps, f"output={s3}/calm")
    assert files_of(f"{s3}/stopped", stopped_at + 25) == files_of(f"{s3}/calm", stopped_at + 25)


def files_of(output: str, step: int) -> list[bytes]:
    """All that training leaves of its tensors."""
    folder = f"{output}/checkpoints/step-{step:08d}"
    names = (f"{folder}/model.safetensors", f"{folder}/training.safetensors", f"{output}/model/model.safetensors")
    return [storage.read_bytes(name) for name in names]


def wait_for(happened: Callable[[], bool], timeout_s: float = 120.0) -> None:
    until = time.monotonic() + timeout_s
    while not happened():
        if time.monotonic() > until:
            raise TimeoutError("it never happened")
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_head_that_is_killed_and_started_again_goes_on_with_the_same_submit(
    s3: str, head: RayHead, tmp_path: Path
) -> None:
    gate = threading.Event()
    with serve(gate=gate) as web:
        folder, output = tokenize_job(s3, tmp_path, "killed", web)
        name = submission_id("tokenize", output)
        with dvae(head, folder, "submit", "tokenize", "t.yaml") as client:
            read_until(client, lambda line: ": 30 rows" in line)
            driver = json.loads(storage.read_bytes(f"{output}/lease.json"))["pid"]
            head.kill()
            os.kill(driver, signal.SIGKILL)  # a machine takes its driver along
            assert "asking again" in read_until(client, lambda line: "asking again" in line)
            head.start()
            said = client.communicate(timeout=90)[0]
            assert client.returncode == 1 and f"knows nothing of {name} any more" in said, said
        done = parts(output)
        assert 0 < len(done) < NUM_SHARDS + 1 and storage.exists(f"{output}/lease.json")
        gate.set()
        said = run(head, folder, "submit", "tokenize", "t.yaml")
        assert f"submitted {name} with" in said and f"{NUM_SHARDS + 1} of {NUM_SHARDS + 1} shards" in said
    assert done.items() <= parts(output).items(), "a finished part was written again"
    assert "complete" in run(head, folder, "verify", output)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_job_whose_shard_cannot_be_read_tells_of_it_without_its_secrets(
    s3: str, head: RayHead, tmp_path: Path
) -> None:
    """Messages of clients quote what they asked for. The line of the job has them by the names of variables."""
    with serve() as web:
        url = web.replace("http://", f"http://{USER}:{PASSWORD}@").replace("x.tar", "broken.tar") + f"?sig={SIGNATURE}"
        folder, output = tokenize_job(s3, tmp_path, "broken")
        head.stop()
        head.environment["PLANTED"] = url
        head.start()
        said = run(head, folder, "submit", "tokenize", "t.yaml", "shards=${oc.env:PLANTED}", "attempts=2", code=1)
    assert "quarantined" in said and "broken.tar" in said
    nowhere(head, output, "errors")
