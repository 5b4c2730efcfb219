"""`dvae submit`: send a job to a Ray cluster and follow its log. The cluster runs the line that a person would type."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jobs.command_line import say
from jobs.config import ConfigError, Section, load_config
from jobs.job_log import LogView, follow
from jobs.job_package import JobPackage, collect
from jobs.job_server import JobServer, SubmitError
from jobs.tokenize_config import TokenizeConfig
from jobs.train_config import TrainConfig
from pipeline.urls import is_local, normalize, public_text, public_url

KINDS: dict[str, type[Section]] = {"train": TrainConfig, "tokenize": TokenizeConfig}
STOP_WAIT_S = 660  # between SIGTERM and SIGKILL; Ray's own 3 s are not enough for a training's last checkpoint
_SECRET_NAME = re.compile(
    "secret|token|passw|passphrase|pwd|credential|private|signature|connection_?string|auth|api_?key|(^|_)key",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(r"(key|secret|token|sig|password)\W*[=:]|bearer ", re.IGNORECASE)


def run_submit(
    kind: str, config: str, overrides: Sequence[str], *, address: str | None, names: Sequence[str], wait: bool
) -> int:
    """Send `dvae KIND CONFIG [key=value …]` with the files of the current folder and the environment variables `names`;
    the job's exit code, or 0 without `wait`. The configuration is checked here first. Raises ConfigError, PackageError,
    SubmitError."""
    if kind not in KINDS:
        raise ConfigError(f"{kind!r} cannot be submitted: name one of {', '.join(KINDS)}")
    settings = load_config(KINDS[kind], config, overrides)
    output = str(getattr(settings, "output"))  # noqa: B009 - each kind has one
    _refuse_relative(settings)
    _refuse_secrets([config, *overrides])
    env_vars = _environment(names)
    server = JobServer.connect(address)
    there = _below_here(config)
    package = collect(Path.cwd(), there)
    entrypoint = shlex.join(["dvae", kind, there, *overrides])
    base, jobs = submission_id(kind, output), server.jobs()
    # The number is of the very listing in which none of them runs: of two that submit at once, both take the same one.
    name = _running(server, jobs, base, entrypoint)
    if name is None:
        name = _next_name(jobs, base)
        again = shlex.join(["dvae", "submit", kind, there, *overrides, *(f"--env={each}" for each in names)])
        about = {"output": public_url(normalize(output)), "submit": again}
        _send(server, name, entrypoint, package, env_vars, about)
    if wait:
        return follow(server, name, LogView())
    say(f"to follow it: {server.command(f'dvae jobs logs {name} --follow')}")
    say(f"to stop it: {server.command(f'dvae jobs stop {name}')}")
    return 0


def submission_id(kind: str, output: str) -> str:
    """The same for the same output, so that a second submit finds the first. (Ray takes no name twice: those after it
    have a number too.)"""
    return f"dvae-{kind}-{hashlib.sha256(public_url(normalize(output)).encode()).hexdigest()[:8]}"


def _running(server: JobServer, jobs: Iterable[Any], base: str, entrypoint: str) -> str | None:
    for job in jobs:
        if _number(job.submission_id, base) and not job.status.is_terminal():
            say(f"{job.submission_id} is running already")
            if job.entrypoint != entrypoint:
                stop = server.command(f"dvae jobs stop {job.submission_id}")
                say(f"  it runs another line: {job.entrypoint}\n  to run yours: {stop}")
            return str(job.submission_id)
    return None


def _next_name(jobs: Iterable[Any], base: str) -> str:
    number = max((_number(job.submission_id, base) for job in jobs), default=0) + 1
    return base if number == 1 else f"{base}-{number}"


def _send(
    server: JobServer, name: str, entrypoint: str, package: JobPackage, env_vars: dict[str, str], about: dict[str, str]
) -> None:
    with tempfile.TemporaryDirectory(prefix="dvae-submit-") as folder:
        archive = Path(folder) / "job.zip"
        package.write(archive)
        if server.submit(name, entrypoint, archive, env_vars, about):
            say(f"submitted {name} with {package.describe()}: {entrypoint}")
        else:
            say(f"{name} was submitted at this moment by another")


def _number(name: str, base: str) -> int:
    """Which of those with this base it is, from 1 on; 0 for another's."""
    found = re.fullmatch(rf"{re.escape(base)}(?:-(\d+))?", name)
    return int(found[1] or 1) if found else 0


def _environment(names: Sequence[str]) -> dict[str, str]:
    """Anybody who may look at the cluster sees these."""
    found = {name: os.environ.get(name) for name in names}
    for name, value in found.items():
        if value is None:
            raise SubmitError(f"--env {name}: there is no such variable here")
        if _SECRET_NAME.search(name) or _SECRET_VALUE.search(value) or public_text(value) != value:
            raise SubmitError(
                f"--env {name}: a job's environment is shown in the dashboard and kept in logs, and this looks like a "
                "secret; give it to the cluster's machines instead (a Kubernetes secret, a role of the machine)"
            )
    return {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **{name: str(value) for name, value in found.items()}}


def _refuse_secrets(arguments: Sequence[str]) -> None:
    for argument in arguments:
        if public_text(argument) != argument:
            raise SubmitError(
                f"{public_text(argument)}: it has more, which looks like a secret, and a job's command is shown in the "
                "dashboard and kept in logs; write it into the configuration file, or ${oc.env:NAME} in its place and "
                "give NAME to the cluster's machines too"
            )


def _refuse_relative(settings: Section) -> None:
    for name, url in _places(settings):
        if is_local(url) and "://" not in url and not Path(url).is_absolute():
            raise SubmitError(
                f"{name} {url} is a relative path: on the cluster it would be looked for in the job's temporary "
                "folder; give a URL, or an absolute path on storage that all nodes share"
            )


def _places(settings: Section) -> Iterator[tuple[str, str]]:
    """What a job reads and writes, by the names of the settings."""
    if isinstance(settings, TokenizeConfig):
        yield from (("output", settings.output), ("checkpoint", settings.checkpoint))
        yield from (("shards", url) for url in settings.shards)
    if isinstance(settings, TrainConfig):
        yield "output", settings.output
        yield from (("data.train_shards", url) for url in settings.data.train_shards)
        yield from (("data.val_shards", url) for url in settings.data.val_shards)


def _below_here(config: str) -> str:
    """The path that the file has on the cluster, where the current folder is the working directory. It may be a link to
    a file anywhere: as of other links, the file is sent."""
    if "://" in config:
        return config
    path = Path(config)
    try:
        return (path.parent.resolve() / path.name).relative_to(Path.cwd()).as_posix()
    except ValueError as error:
        raise SubmitError(f"{config} lies outside {Path.cwd()}, whose files are sent") from error
