"""`dvae submit` and `dvae jobs`, up to where a cluster is needed: test_submit_cluster.py has one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from jobs import cluster_jobs, job_server, submit
from jobs.cluster_jobs import run_list, run_logs, run_stop
from jobs.config import ConfigError
from jobs.job_server import JobServer, SubmitError
from jobs.submit import run_submit, submission_id
from web_server import serve

BASE = submission_id("tokenize", "s3://c")


def job(name: str | None, status: JobStatus = JobStatus.RUNNING, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "entrypoint": "dvae tokenize t.yaml",
        "start_time": 1_700_000_000_000,
        "end_time": None,
        "message": "",
    }
    values |= {"submission_id": name, "status": status, "driver_exit_code": None, "metadata": {"output": "s3://c"}}
    return SimpleNamespace(**{**values, **changes})


class Client:
    """A Jobs server in a few lines: `sent` is what was submitted to it."""

    def __init__(self, *jobs: Any, taken: bool = False) -> None:
        self.jobs, self.taken, self.sent, self.asked = list(jobs), taken, [], []

    def list_jobs(self) -> list[Any]:
        return self.jobs

    def get_job_info(self, name: str) -> Any:
        for each in self.jobs:
            if each.submission_id == name:
                return each
        raise RuntimeError(f"Request failed with status code 404: Job {name} does not exist.")

    def submit_job(self, **job: Any) -> None:
        assert Path(job["runtime_env"]["working_dir"]).read_bytes()[:2] == b"PK"
        if self.taken or job["submission_id"] in {each.submission_id for each in self.jobs}:
            raise RuntimeError(
                "Request failed with status code 400: Traceback (most recent call last):\n  File …\n"
                f"ValueError: Job with submission_id {job['submission_id']} already exists. Please use a different …"
            )
        self.sent.append(job)

    def stop_job(self, name: str) -> bool:
        self.asked.append(name)
        self.get_job_info(name).status = JobStatus.STOPPED
        return True

    def get_job_logs(self, name: str) -> str:
        return "begun\n"


Cluster = Callable[..., Client]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Connects all commands to such a server; the current folder has a `t.yaml`."""
    (tmp_path / "t.yaml").write_text("checkpoint: s3://a\nshards: s3://b\noutput: s3://c\n")
    monkeypatch.chdir(tmp_path)

    def connected(*jobs: Any, **options: Any) -> Client:
        client = Client(*jobs, **options)
        monkeypatch.setattr(JobServer, "connect", lambda address: JobServer(client, address))
        return client

    return connected


def send(*overrides: str, kind: str = "tokenize", config: str = "t.yaml", names: tuple[str, ...] = ()) -> int:
    return run_submit(kind, config, overrides, address="http://127.0.0.1:1", names=names, wait=False)


def test_the_cluster_runs_the_line_that_a_person_types_with_time_to_stop_in(cluster: Cluster) -> None:
    client = cluster()
    line = "tokenize t.yaml batch_size=4 'shards=[s3://a b.tar, s3://c.tar]'"
    assert send("batch_size=4", "shards=[s3://a b.tar, s3://c.tar]") == 0
    (sent,) = client.sent
    assert sent["entrypoint"] == f"dvae {line}" and sent["submission_id"] == BASE
    assert sent["metadata"] == {"output": "s3://c", "submit": f"dvae submit {line}"}
    assert sent["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "660"}


def test_a_job_that_runs_is_not_sent_again_and_another_line_is_told(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    client = cluster(job(BASE, JobStatus.STOPPED), job(f"{BASE}-2"))
    assert send() == 0 and client.sent == []
    assert f"{BASE}-2 is running already" in capsys.readouterr().err
    assert send("batch_size=4") == 0 and client.sent == []
    said = capsys.readouterr().err
    assert "it runs another line: dvae tokenize t.yaml\n" in said and f"dvae jobs stop {BASE}-2" in said


def test_after_jobs_that_have_ended_the_next_number_is_taken_for_ray_takes_no_name_twice(cluster: Cluster) -> None:
    ended = (BASE, f"{BASE}-9", f"{BASE}-10", f"{BASE}0", None)
    client = cluster(*(job(name, JobStatus.FAILED) for name in ended))
    assert send() == 0
    assert [sent["submission_id"] for sent in client.sent] == [f"{BASE}-11"]


def test_of_two_that_submit_at_once_the_second_follows_the_first(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster(taken=True)
    assert send() == 0
    said = capsys.readouterr().err
    assert f"{BASE} was submitted at this moment by another" in said and f"dvae jobs logs {BASE} --follow" in said


@pytest.mark.parametrize("step", ["collect", "JobPackage.write"])
def test_one_that_submits_while_another_packs_its_files_gets_no_job_of_its_own(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Both would write to one output, and the second would fail on the lease of the first."""
    client = cluster(job(BASE, JobStatus.FAILED))
    owner, name = (submit.JobPackage, "write") if step == "JobPackage.write" else (submit, "collect")
    pack = getattr(owner, name)

    def pack_slowly(*arguments: Any) -> Any:
        client.jobs.append(job(f"{BASE}-2", JobStatus.PENDING))
        return pack(*arguments)

    monkeypatch.setattr(owner, name, pack_slowly)
    assert send() == 0 and client.sent == []


def test_who_does_not_wait_is_told_how_to_follow_and_not_that_somebody_does(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    for jobs in ((), (job(BASE),)):
        cluster(*jobs)
        assert send() == 0
        said = capsys.readouterr().err
        assert f"dvae jobs logs {BASE} --follow" in said and "following" not in said


def test_what_is_wrong_is_said_before_anything_is_sent(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    client = cluster()
    with pytest.raises(ConfigError, match="did you mean batch_size"):
        send("batchsize=3")
    with pytest.raises(ConfigError, match="train, tokenize"):
        send(kind="tokenise")
    with pytest.raises(SubmitError, match="lies outside"):
        (Path.cwd() / "sub").mkdir()
        monkeypatch.chdir("sub")
        send(config="../t.yaml")
    assert client.sent == []


@pytest.mark.parametrize("place", ["output=c", "output=./c", "checkpoint=runs/dvae", "shards=[s3://a, in/*.tar]"])
def test_a_place_in_the_jobs_own_folder_is_refused_before_anything_is_sent(cluster: Cluster, place: str) -> None:
    client = cluster()
    with pytest.raises(SubmitError, match=r"^(output|checkpoint|shards) \S+ is a relative path: .* give a URL, or an"):
        send(place)
    assert client.sent == []


@pytest.mark.parametrize("name", ["train_shards", "val_shards"])
def test_so_is_one_of_a_training(cluster: Cluster, name: str) -> None:
    cluster()
    Path("train.yaml").write_text("output: s3://c\ndata: {train_shards: s3://a, val_shards: /shared/b}\n")
    assert send(kind="train", config="train.yaml") == 0
    with pytest.raises(SubmitError, match=rf"^data\.{name} in/\*\.tar is a relative path"):
        send(f"data.{name}=in/*.tar", kind="train", config="train.yaml")


def test_a_configuration_that_is_a_link_is_sent_as_other_links_are(cluster: Cluster, tmp_path: Path) -> None:
    client = cluster()
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "mine.yaml").symlink_to(tmp_path / "t.yaml")
    os.chdir(tmp_path / "job")
    assert send(config="mine.yaml") == 0
    assert client.sent[0]["entrypoint"] == "dvae tokenize mine.yaml"


@pytest.mark.parametrize(
    "override",
    ["shards=https://me:s3cret@host/x.tar", "shards=https://host/x.tar?sig=s3cret", "output=s3://me:s3cret@bucket/c"],
)
def test_a_secret_on_the_line_is_refused_and_not_repeated_for_the_dashboard_shows_it(
    cluster: Cluster, override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = cluster()
    with pytest.raises(SubmitError, match="looks like a secret") as refused:
        send(override)
    assert "s3cret" not in str(refused.value)
    name, _, value = override.partition("=")
    monkeypatch.setenv("PLACE", value)
    assert send(f"{name}=${{oc.env:PLACE}}") == 0
    assert "s3cret" not in json.dumps(client.sent)


def test_variables_go_by_name_and_secrets_do_not(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    client = cluster()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    assert send(names=("AWS_ENDPOINT_URL",)) == 0
    assert client.sent[0]["runtime_env"]["env_vars"]["AWS_ENDPOINT_URL"] == "http://minio:9000"
    assert client.sent[0]["metadata"]["submit"] == "dvae submit tokenize t.yaml --env=AWS_ENDPOINT_URL"
    for name in ("AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "MLFLOW_TRACKING_PASSWORD", "WANDB_API_KEY", "STORE"):
        monkeypatch.setenv(name, "http://me:s3cret@minio:9000")
        with pytest.raises(SubmitError, match=f"--env {name}: .* looks like a secret") as refused:
            send(names=(name,))
        assert "s3cret" not in str(refused.value)
    for name, value in (
        ("AZURE_STORAGE_CONNECTION_STRING", "x"),
        ("HEADERS", "Bearer s3cret"),
        ("S3", '{"key": "s3cret"}'),
    ):
        monkeypatch.setenv(name, value)
        with pytest.raises(SubmitError, match=f"--env {name}: .* looks like a secret"):
            send(names=(name,))
    with pytest.raises(SubmitError, match="no such variable here"):
        send(names=("NOT_SET",))


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://head:10001", "head"])
def test_an_address_that_is_no_dashboards_is_refused_at_once(address: str) -> None:
    with pytest.raises(SubmitError, match=f"{address} is no address of a Jobs server: .* http://HEAD:8265"):
        JobServer.connect(address)


@pytest.mark.parametrize("page", [{}, {"do_GET": lambda request: request.send_error(404)}])
def test_a_server_that_is_not_rays_is_told_from_one_and_the_port_is_named(page: dict[str, Any]) -> None:
    with serve(**page) as web:
        address = web.removesuffix("/x.tar")
        with pytest.raises(
            SubmitError, match=f"^what answers at {address} is no Ray Jobs server: .* http://HEAD:8265$"
        ):
            JobServer.connect(address)


def test_no_address_names_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SubmitError, match="--address"):
        JobServer.connect(None)


def test_the_address_that_was_given_is_asked_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray by itself would take the variable."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    with pytest.raises(SubmitError, match=r"no Ray Jobs server answers at http://127\.0\.0\.1:2"):
        JobServer.connect("http://127.0.0.1:2")
    assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:1"


def test_a_head_that_cannot_run_jobs_yet_is_asked_again(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    client = cluster()
    monkeypatch.setattr(job_server.time, "sleep", lambda seconds: None)
    refusals = ["Request failed with status code 500: No available agent to submit job, please try again later.."] * 2

    def submit_job(**job: Any) -> None:
        if refusals:
            raise RuntimeError(refusals.pop())
        client.sent.append(job)

    monkeypatch.setattr(client, "submit_job", submit_job)
    assert send() == 0 and len(client.sent) == 1


def test_errors_of_the_jobs_server_are_one_line(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> list[Any]:
        raise RuntimeError(
            "Request failed with status code 500: Traceback (most …):\n  File …\nOSError: disk is full\n"
        )

    monkeypatch.setattr(cluster(), "list_jobs", refuse)
    with pytest.raises(SubmitError, match=r"^the Jobs server failed: .* 500: OSError: disk is full$"):
        send()


def test_a_misspelt_option_is_named_and_taken_for_no_override(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("checkpoint: s3://a\nshards: s3://b\noutput: s3://c\n")
    command = [sys.executable, "-m", "jobs.cli", "submit", "tokenize", "t.yaml", "batch_size=4", "--adress", "http://h"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--adress" in done.stderr and "override" not in done.stderr


def test_jobs_are_listed_as_a_table_and_as_json(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    ended = job("rayjob-x", JobStatus.FAILED, end_time=1_700_000_060_000, entrypoint="dvae train https://a:s3cret@h/c")
    ended.metadata = None
    cluster(job(None), job("later", start_time=1_800_000_000_000), ended)
    assert run_list(None, as_json=False) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["job", "state", "started"]
    assert first.startswith("rayjob-x  FAILED") and "60 s" in first and "https://h/c" in first
    assert second.startswith("later ") and "s3://c" in second
    assert run_list(None, as_json=True) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["job"] for row in listed] == ["rayjob-x", "later"] and listed[0]["seconds"] == 60.0
    cluster()
    assert run_list(None, as_json=False) == 0 and "no job" in capsys.readouterr().out


def test_a_job_that_was_stopped_has_said_goodbye_and_the_line_that_goes_on_is_one_for_here(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = cluster(job(BASE, metadata={"output": "s3://c", "submit": "dvae submit tokenize t.yaml --env=X"}))
    logs = ["before\n" * 1000 + "stopped; go on with\n"]  # it is fetched once
    monkeypatch.setattr(client, "get_job_logs", lambda name: logs.pop())
    assert run_stop(BASE, None) == 0
    said = capsys.readouterr()
    assert client.asked == [BASE] and said.out == "before\n" * 19 + "stopped; go on with\n"
    assert "a training saves a checkpoint first" in said.err
    assert f"{BASE}: STOPPED; it goes on from what is done with\n  dvae submit tokenize t.yaml --env=X\n" in said.err
    assert run_stop(BASE, None) == 0 and client.asked == [BASE]
    assert "ended already: STOPPED" in capsys.readouterr().err


def test_a_job_that_has_not_started_is_stopped_without_the_promise_of_a_checkpoint(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pending = job(BASE, JobStatus.PENDING, message="Job has not started yet.")
    client = cluster(pending)
    monkeypatch.setattr(client, "stop_job", lambda name: True)
    monkeypatch.setattr(cluster_jobs, "SAY_EVERY_S", 0.0)
    monkeypatch.setattr(cluster_jobs.time, "sleep", lambda seconds: vars(pending).update(status=JobStatus.FAILED))
    assert run_stop(BASE, None) == 0
    said = capsys.readouterr().err
    assert "it has not started" in said and "checkpoint" not in said
    assert f"{BASE} waits to start: Job has not started yet. It stops then" in said


def test_ctrl_c_while_a_job_stops_leaves_it_to_itself(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster(job(BASE)), "stop_job", lambda name: True)
    monkeypatch.setattr(cluster_jobs.time, "sleep", interrupt)
    assert run_stop(BASE, None) == 130
    assert "goes on stopping by itself" in capsys.readouterr().err


def test_the_logs_of_a_job_and_a_job_that_is_not_there(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster(job(BASE))
    assert run_logs(BASE, None, to_the_end=False) == 0
    assert capsys.readouterr().out == "begun\n"
    for ask in (lambda name: run_logs(name, None, to_the_end=True), lambda name: run_stop(name, None)):
        with pytest.raises(SubmitError, match=f"knows no job {BASE[:-1]}; did you mean {BASE}"):
            ask(BASE[:-1])
        with pytest.raises(SubmitError, match="dvae jobs list names them"):
            ask("x")


def test_the_submission_id_follows_from_the_output_without_its_secrets() -> None:
    assert submission_id("train", "s3://a/b") == submission_id("train", "s3://a/b/") != submission_id("train", "s3://a")
    assert submission_id("train", "s3://me:pw@a/b") == submission_id("train", "s3://a/b")
    assert len({submission_id(kind, url) for kind in submit.KINDS for url in ("s3://a", "s3://b")}) == 4
    assert os.sep not in submission_id("train", "s3://a/b")
