"""infra/slurm/on_ray.sh, by itself: what the job's shell does with signals and exit codes. Slurm and Ray are programs
of a few lines here; `srun` and `ray symmetric-run` run what they are given."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "infra" / "slurm" / "on_ray.sh"
FAKES = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'echo "scontrol $*" >> calls',
    "ray": 'echo "ray $*" >> calls; while [[ $1 != -- ]]; do shift; done; shift; "$@"',
    "hostname": "echo 10.1.2.3 172.17.0.1",
}
WORKS = 'trap "echo saved >> calls; exit 130" TERM; echo "works at $RAY_ADDRESS" >> calls; while :; do sleep 0.05; done'


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A folder in which programs write to `calls`, with the fakes in `bin`."""
    (tmp_path / "bin").mkdir()
    for name, body in FAKES.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def start(job: Path, *command: str, stderr: int | None = None) -> subprocess.Popen[bytes]:
    path = f"{job / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2"}
    return subprocess.Popen([str(SCRIPT), *command], cwd=job, env=environment, stderr=stderr)


def wait_for_work(job: Path) -> None:
    deadline = time.monotonic() + 60
    while not any(call.startswith("works") for call in calls(job)) and time.monotonic() < deadline:
        time.sleep(0.05)


def calls(job: Path) -> list[str]:
    return (job / "calls").read_text().splitlines() if (job / "calls").exists() else []


def test_a_command_that_ends_well_when_it_is_told_to_stop_is_not_tried_again(job: Path) -> None:
    running = start(job, "bash", "-c", WORKS.replace("exit 130", "exit 0"))
    wait_for_work(job)
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 0
    assert [call for call in calls(job) if call.startswith("scontrol")] == []


@pytest.mark.parametrize("code", [0, 1, 3])
def test_the_exit_code_is_the_commands_and_a_failed_one_is_not_tried_for_ever(job: Path, code: int) -> None:
    assert start(job, "bash", "-c", f"exit {code}").wait(60) == code
    assert [call for call in calls(job) if call.startswith("scontrol")] == []


def test_a_signal_stops_the_command_alone_and_puts_the_job_back_into_the_queue(job: Path) -> None:
    running = start(job, "bash", "-c", WORKS)
    wait_for_work(job)
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 130
    started, *rest = calls(job)
    assert started.startswith("ray symmetric-run --address 10.1.2.3:6379 --min-nodes 2 --disable-usage-stats -- bash")
    assert rest == ["works at 10.1.2.3:6379", "saved", "scontrol requeue 77"]


def test_a_signal_before_the_command_has_begun_is_not_lost(job: Path) -> None:
    """Ray waits for nodes first, up to ten minutes."""
    (job / "bin" / "ray").write_text(
        (job / "bin" / "ray").read_text().replace("while", "until [[ -e nodes ]]; do sleep 0.05; done; while", 1)
    )
    with start(job, "bash", "-c", "echo works >> calls", stderr=subprocess.PIPE) as running:
        deadline = time.monotonic() + 60
        while not calls(job) and time.monotonic() < deadline:
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        assert running.stderr is not None and b"told to stop" in running.stderr.readline()
        (job / "nodes").touch()
        assert running.wait(60) == 130
    assert [call.split()[0] for call in calls(job)] == ["ray", "scontrol"], "the command was never begun"
