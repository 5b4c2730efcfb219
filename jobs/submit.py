"""`dvae submit`: send a job to a Ray cluster and follow its logs. The cluster runs the line a person would type."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient
from rich.console import Console
from rich.markup import escape

from jobs.config import ConfigError, Section, load_config
from jobs.tokenize_config import TokenizeConfig
from jobs.train_config import TrainConfig
from pipeline import storage
from pipeline.errors import PipelineError

log = logging.getLogger(__name__)
KINDS: dict[str, type[Section]] = {"train": TrainConfig, "tokenize": TokenizeConfig}
EXCLUDED = [".git", ".venv", "**/__pycache__", "*.egg-info", "demo-output", "**/*.tar", "**/*.parquet"]

NO_AGENT = "No available agent"  # a head answers some seconds before it can run jobs
AGENT_WAIT_S = 60.0
RECONNECT_S = 2.0


class SubmitError(PipelineError):
    """The job could not be sent."""


def run_submit(kind: str, config: str, overrides: Sequence[str], *, address: str | None, follow: bool) -> int:
    """Send `dvae KIND CONFIG [key=value …]` with the files of the current folder; the job's exit code, or 0 without
    `follow`. The configuration is checked here first. Raises ConfigError, SubmitError."""
    if kind not in KINDS:
        raise ConfigError(f"{kind!r} cannot be submitted: name one of {', '.join(KINDS)}")
    settings = load_config(KINDS[kind], config, overrides)
    output = str(getattr(settings, "output"))  # noqa: B009 - each kind has one
    _refuse_relative(output)
    client = _connect(address)
    name = submission_id(kind, output)
    entrypoint = shlex.join(["python", "-m", "jobs.cli", kind, _below_here(config), *overrides])
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if _is_running(client, name):
        console.print(f"{name} is running already; following it")
    else:
        _submit(client, name, entrypoint)
        console.print(f"submitted {name}: {escape(entrypoint)}")
    return _follow(client, name, console) if follow else 0


def submission_id(kind: str, output: str) -> str:
    """The same for the same output, so that a second submit finds the first."""
    return f"dvae-{kind}-{hashlib.sha256(output.encode()).hexdigest()[:8]}"


def _connect(address: str | None) -> JobSubmissionClient:
    found = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not found:
        raise SubmitError("no cluster named: give --address http://HEAD:8265, or set RAY_API_SERVER_ADDRESS")
    try:
        return JobSubmissionClient(found)
    except AuthenticationError as error:
        raise SubmitError(
            f"{found} wants a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as on the head"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SubmitError(f"no Ray Jobs server at {found}: {str(error).splitlines()[0]}") from error


def _refuse_relative(output: str) -> None:
    if storage.is_local(output) and "://" not in output and not Path(output).is_absolute():
        raise SubmitError(
            f"output {output} is a relative path: on the cluster it would lie in the job's temporary folder; "
            "give a URL, or an absolute path on storage that all nodes share"
        )


@contextmanager
def _asking() -> Iterator[None]:
    """The client's errors (RuntimeError for an answer, OSError for none) as one line."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise SubmitError(
            f"the Jobs server failed: {_first_line(error)}; the same command finds the job again"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _below_here(config: str) -> str:
    """The path that the file has on the cluster, where the current folder is the working directory."""
    if "://" in config:
        return config
    try:
        return Path(config).resolve().relative_to(Path.cwd()).as_posix()
    except ValueError as error:
        raise SubmitError(f"{config} lies outside {Path.cwd()}, whose files are sent") from error


def _is_running(client: JobSubmissionClient, name: str) -> bool:
    with _asking():
        return any(job.submission_id == name and not job.status.is_terminal() for job in client.list_jobs())


def _submit(client: JobSubmissionClient, name: str, entrypoint: str) -> None:
    with _asking():
        if any(job.submission_id == name for job in client.list_jobs()):
            client.delete_job(name)  # an earlier one that has ended; what it did lies in its output
    runtime_env = {"working_dir": ".", "excludes": EXCLUDED}
    deadline = time.monotonic() + AGENT_WAIT_S
    while True:
        try:
            client.submit_job(entrypoint=entrypoint, submission_id=name, runtime_env=runtime_env)
            return
        except (RuntimeError, ValueError) as error:
            if NO_AGENT not in str(error) or time.monotonic() > deadline:
                raise SubmitError(f"the cluster refused {name}: {error}") from error
            time.sleep(1)


def _follow(client: JobSubmissionClient, name: str, console: Console) -> int:
    shown = 0
    try:
        while True:
            shown = asyncio.run(_print_logs(client, name, shown))
            with _asking():
                info = client.get_job_info(name)
            if info.status.is_terminal():
                return _exit_code(info, console)
            time.sleep(RECONNECT_S)  # the connection was closed before the job ended
    except KeyboardInterrupt:
        console.print(f"detached; {name} goes on. The same command follows it again.")
        return 130


async def _print_logs(client: JobSubmissionClient, name: str, shown: int) -> int:
    """Print the log but for its first `shown` characters, until the connection ends, however it ends; how many
    characters have been shown then. Each connection sends the log from its beginning."""
    seen = 0
    try:
        async for lines in client.tail_job_logs(name):
            sys.stdout.write(lines[max(0, shown - seen) :])
            sys.stdout.flush()
            seen += len(lines)
    except (RuntimeError, OSError, aiohttp.ClientError) as error:
        log.info("the log connection broke: %s", _first_line(error))
    return max(shown, seen)


def _exit_code(info: Any, console: Console) -> int:
    if info.status == JobStatus.SUCCEEDED:
        return 0
    console.print(f"{info.submission_id}: {info.status.value}: {escape(str(info.message))}")
    return int(info.driver_exit_code or 1)
