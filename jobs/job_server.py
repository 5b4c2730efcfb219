"""A cluster's Jobs server: to find it, ask it and send it jobs. What goes wrong is one line."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from pipeline.errors import PipelineError
from pipeline.urls import public_url

ADDRESS = "RAY_API_SERVER_ADDRESS"
NO_AGENT = "No available agent"  # a head answers some seconds before it can run jobs
NOT_RAY = "Version check returned 404"
AGENT_WAIT_S = 60.0
TIMEOUT_S = (10.0, 120.0)  # to connect; between two bytes of an answer
for _chatty in ("dashboard_sdk", "job.sdk"):  # they tell of packages and of connections that are closed
    logging.getLogger(f"ray.dashboard.modules.{_chatty}").setLevel(logging.WARNING)
PENDING, STOPPED, SUCCEEDED = JobStatus.PENDING, JobStatus.STOPPED, JobStatus.SUCCEEDED


class SubmitError(PipelineError):
    """The job could not be sent, or the Jobs server does not do what was asked."""


class ServerAway(SubmitError):
    """No answer; it may come back."""


class _Client(JobSubmissionClient):  # type: ignore[misc]  # Ray's has no types
    """Ray's own would wait for ever for a server that is silent, as one behind a dead port-forward is."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, **{"timeout": TIMEOUT_S, **options})

    def _check_connection_and_version_with_url(self, *arguments: Any, **options: Any) -> None:
        """Another server has a page of its own there, or none."""
        try:
            super()._check_connection_and_version_with_url(*arguments, **options)
        except (ValueError, KeyError) as error:
            raise RuntimeError(NOT_RAY) from error


class JobServer:
    """Jobs are Ray's JobDetails. All raise SubmitError; ServerAway where asking again may help."""

    def __init__(self, client: JobSubmissionClient, typed: str | None = None) -> None:
        """`typed`: the address, where it was given and not found."""
        self._client = client
        self._options = f" --address {public_url(typed)}" if typed else ""

    def command(self, line: str) -> str:
        """That line of ours, as it is to be typed for this server."""
        return line + self._options

    @classmethod
    def connect(cls, address: str | None) -> JobServer:
        """The one at `address`, else at $RAY_API_SERVER_ADDRESS or $RAY_ADDRESS."""
        found = address or os.environ.get(ADDRESS) or os.environ.get("RAY_ADDRESS")
        if not found:
            raise SubmitError(f"no cluster named: give --address http://HEAD:8265, or set {ADDRESS}")
        if not found.startswith(("http://", "https://")):
            raise SubmitError(f"{found} is no address of a Jobs server: give the dashboard's, http://HEAD:8265")
        try:
            with _asking(found), _preferred(found):
                return cls(_Client(found), address)
        except ValueError as error:
            raise SubmitError(f"no Ray Jobs server at {found}: {in_one_line(error)}") from error
        except SubmitError as error:
            if NOT_RAY not in str(error):
                raise
            raise SubmitError(
                f"what answers at {found} is no Ray Jobs server: give the dashboard's address, http://HEAD:8265"
            ) from error

    def jobs(self) -> list[Any]:
        """All that were submitted, the oldest first; what other drivers run has no name here."""
        with _asking():
            found = [job for job in self._client.list_jobs() if job.submission_id]
        return sorted(found, key=lambda job: job.start_time or 0)

    def job(self, name: str) -> Any | None:
        """None: the cluster knows no such job."""
        try:
            with _asking():
                return self._client.get_job_info(name)
        except SubmitError as error:
            if "status code 404" in str(error):
                return None
            raise

    def submit(
        self, name: str, entrypoint: str, archive: Path, env_vars: Mapping[str, str], metadata: Mapping[str, str]
    ) -> bool:
        """False: a job of this name came in between. `archive` holds the job's working directory."""
        environment = {"working_dir": str(archive), "env_vars": dict(env_vars)}
        give_up_at = time.monotonic() + AGENT_WAIT_S
        while True:
            try:
                with _asking():
                    self._client.submit_job(
                        entrypoint=entrypoint, submission_id=name, runtime_env=environment, metadata=dict(metadata)
                    )
                return True
            except SubmitError as error:
                if "already exists" in str(error):
                    return False
                if NO_AGENT not in str(error) or time.monotonic() > give_up_at:
                    raise SubmitError(f"the cluster refused {name}: {error}") from error
            time.sleep(1)

    def ask_to_stop(self, name: str) -> bool:
        """SIGTERM, at first. False: it had ended."""
        with _asking():
            return bool(self._client.stop_job(name))

    def log_so_far(self, name: str) -> str:
        with _asking():
            return str(self._client.get_job_logs(name))

    def tail(self, name: str) -> AsyncIterator[str]:
        """The log from its beginning, until the job ends or the connection breaks (RuntimeError, OSError or aiohttp's
        errors)."""
        chunks: AsyncIterator[str] = self._client.tail_job_logs(name)
        return chunks


@contextmanager
def _preferred(address: str) -> Iterator[None]:
    """Ray takes this variable before the address that it is given."""
    before = os.environ.get(ADDRESS)
    os.environ[ADDRESS] = address
    try:
        yield
    finally:
        del os.environ[ADDRESS]
        if before is not None:
            os.environ[ADDRESS] = before


@contextmanager
def _asking(address: str = "") -> Iterator[None]:
    """The client's errors (RuntimeError for an answer, OSError for none) as one line."""
    at = f" at {address}" if address else ""
    try:
        yield
    except AuthenticationError as error:
        raise SubmitError(
            f"the Jobs server{at} wants a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as on the head"
        ) from error
    except OSError as error:
        raise ServerAway(f"no Ray Jobs server answers{at}: {in_one_line(error)}") from error
    except RuntimeError as error:
        kind = ServerAway if "status code 5" in str(error) and NO_AGENT not in str(error) else SubmitError
        raise kind(f"the Jobs server failed{at}: {in_one_line(error)}") from error


def in_one_line(error: BaseException) -> str:
    """Of a traceback, which the server likes to send, its end."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    start, traceback, _ = lines[0].partition("Traceback")
    return start + lines[-1] if traceback else lines[0]
