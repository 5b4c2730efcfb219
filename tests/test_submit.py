"""`dvae submit` on a real Ray Jobs server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus
from rich.console import Console

from jobs import submit as submit_module
from jobs.config import ConfigError
from jobs.local_servers import RayHead
from jobs.submit import SubmitError, run_submit, submission_id
from make_data import write_checkpoint, write_shards


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head with a Jobs server; gives the environment with which clients find it (Ray reads it when imported)."""
    head = RayHead(tmp_path_factory.mktemp("ray"), num_cpus=4)
    head.start()
    environment = {**os.environ, **head.environment}
    environment.pop("RAY_ADDRESS", None)
    yield environment
    head.stop()


def submit(environment: dict[str, str], folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.cli", "submit", "tokenize", "t.yaml", *overrides]
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.ray
@pytest.mark.server
def test_a_submitted_job_runs_on_the_cluster_and_its_logs_and_exit_code_come_back(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    write_shards(tmp_path / "shards", [4])
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "t.yaml").write_text(
        f"checkpoint: {checkpoint}\nshards: {tmp_path}/shards\noutput: {tmp_path}/out\nray: {{num_actors: 1}}\n"
    )
    done = submit(cluster, tmp_path / "job", "batch_size=4")
    assert done.returncode == 0, done.stderr
    assert "1 of 1 shards · 4 images tokenised" in done.stdout
    assert len(list((tmp_path / "out" / "tokens").iterdir())) == 1

    refused = submit(cluster, tmp_path / "job", "batch_size=8")
    assert refused.returncode == 2 and "numerics.batch_size" in refused.stdout

    unknown = submit({**cluster, "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}, tmp_path / "job")
    assert unknown.returncode == 2 and "token" in unknown.stderr


def test_what_is_wrong_is_said_before_anything_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.yaml").write_text("checkpoint: a\nshards: b\noutput: c\nbatchsize: 3\n")
    with pytest.raises(ConfigError, match="did you mean batch_size"):
        run_submit("tokenize", str(tmp_path / "t.yaml"), [], address="http://127.0.0.1:1", follow=True)
    with pytest.raises(ConfigError, match="train, tokenize"):
        run_submit("tokenise", str(tmp_path / "t.yaml"), [], address=None, follow=True)
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "t.yaml").write_text("checkpoint: a\nshards: b\noutput: s3://c\n")
    with pytest.raises(SubmitError, match="--address"):
        run_submit("tokenize", str(tmp_path / "t.yaml"), [], address=None, follow=True)


@pytest.mark.parametrize("output", ["runs/tokens", "./c", "../c"])
def test_an_output_in_the_jobs_own_folder_is_refused_before_anything_is_sent(tmp_path: Path, output: str) -> None:
    (tmp_path / "t.yaml").write_text("checkpoint: a\nshards: b\noutput: s3://c\n")
    with pytest.raises(SubmitError, match="give a URL, or an absolute path on storage that all nodes share"):
        run_submit("tokenize", str(tmp_path / "t.yaml"), [f"output={output}"], address=None, follow=True)


def test_a_misspelt_option_is_named_and_taken_for_no_override(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("checkpoint: a\nshards: b\noutput: s3://c\n")
    done = submit(dict(os.environ), tmp_path, "batch_size=4", "--adress", "http://head")
    assert done.returncode == 2 and "--adress" in done.stderr and "override" not in done.stderr


class FlakyClient:
    """A Jobs server whose log connection breaks before the job ends, in each of the ways that Ray's can."""

    chunks = ("one\n", "two\n", "three\n")  # a log is sent from its beginning at each connection
    breaks = (RuntimeError("WebSocket connection closed unexpectedly"), None, ConnectionResetError("gone"), None)

    def __init__(self) -> None:
        self.connections = 0

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        broken = self.breaks[self.connections]
        self.connections += 1
        for chunk in self.chunks[: self.connections]:
            yield chunk
        if broken is not None:
            raise broken

    def get_job_info(self, name: str) -> Any:
        ended = self.connections == len(self.breaks)
        status = JobStatus.FAILED if ended else JobStatus.RUNNING
        return SimpleNamespace(status=status, submission_id=name, message="", driver_exit_code=3)


def test_a_broken_log_connection_is_taken_up_again_until_the_job_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit_module, "RECONNECT_S", 0.0)
    client = FlakyClient()
    assert submit_module._follow(client, "dvae-x", Console(stderr=True)) == 3
    assert client.connections == 4
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_errors_of_the_jobs_server_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Refusing:
        def list_jobs(self) -> list[Any]:
            raise RuntimeError("Request failed with status code 500: head is away.\nTraceback")

    (tmp_path / "t.yaml").write_text("checkpoint: a\nshards: b\noutput: s3://c\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(submit_module, "JobSubmissionClient", lambda address: Refusing())
    with pytest.raises(SubmitError, match=r"the Jobs server failed: .* 500: head is away\.; [^\n]*$"):
        run_submit("tokenize", "t.yaml", [], address="http://head", follow=True)


def test_the_submission_id_follows_from_the_output() -> None:
    assert submission_id("train", "s3://a/b") == submission_id("train", "s3://a/b")
    assert len({submission_id(kind, url) for kind in ("train", "tokenize") for url in ("s3://a", "s3://b")}) == 4
    assert os.sep not in submission_id("train", "s3://a/b")
