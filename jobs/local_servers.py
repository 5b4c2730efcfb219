"""Servers of this machine, for the demo and for tests: an S3 server and a Ray head with a Jobs server. Loopback only,
on free ports, stopped by whoever started them."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline.errors import PipelineError

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 30.0
_S3_PORTS = ("s3.port", "s3.port.grpc", "s3.port.iceberg", "s3.port.lance", "master.port", "master.port.grpc",
             "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc", "admin.port",
             "admin.port.grpc")  # fmt: skip
_RAY_PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")


class ServerError(PipelineError):
    """A server of ours does not start."""


def free_ports(count: int) -> list[int]:
    """All different; free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports: list[int] = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class _Server:
    """One process with a log of its own. It may be killed and started again: same ports, same data."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self._name, self._command, self._log = name, list(command), log
        self.environment = dict(environment)  # with which its clients find it
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers. Raises ServerError, naming its log."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    self._command, env={**os.environ, **self.environment}, stdout=log, stderr=log,
                    start_new_session=True,  # a Ctrl-C is for the demo, which then stops its servers in order
                )  # fmt: skip
        except FileNotFoundError as error:
            raise ServerError(f"{self._name} is not installed: pip install 'dvae-ray[cluster-demo]'") from error
        self._wait_until(self.is_ready)

    def is_ready(self) -> bool:
        raise NotImplementedError

    def kill(self) -> None:
        """As a power cut does."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(how)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _wait_until(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ready():
            if self._process is None or self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
                raise ServerError(f"{self._name} does not start: {''.join(last)} (its log: {self._log})")
            time.sleep(0.1)


class S3Server(_Server):
    """SeaweedFS in one process, with one bucket; `folder` holds its data."""

    def __init__(self, folder: Path, bucket: str) -> None:
        ports = dict(zip(_S3_PORTS, free_ports(len(_S3_PORTS)), strict=True))
        self._endpoint = f"http://127.0.0.1:{ports['s3.port']}"
        folder.mkdir(parents=True, exist_ok=True)
        command = [str(Path(sys.executable).with_name("weed")), "mini", f"-dir={folder}", "-ip=127.0.0.1",
                   "-ip.bind=127.0.0.1", f"-bucket={bucket}", "-webdav=false", "-admin.ui=false",
                   *(f"-{name}={port}" for name, port in ports.items())]  # fmt: skip
        environment = {
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "not-a-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self._endpoint,
            "AWS_ALLOW_HTTP": "true",  # Polars asks for it
        }
        super().__init__("SeaweedFS", command, folder / "log", environment)

    def is_ready(self) -> bool:
        written = self._log.read_text(errors="replace")
        return _answers(f"{self._endpoint}/healthz") and "are running and ready" in written  # the bucket is there then


class RayHead(_Server):
    """A Ray cluster of one machine, with a dashboard and a Jobs server that ask for a token."""

    def __init__(self, folder: Path, num_cpus: int) -> None:
        ports = dict(zip(_RAY_PORTS, free_ports(len(_RAY_PORTS)), strict=True))  # other Rays have the usual ones
        self.dashboard = f"http://127.0.0.1:{ports['dashboard-port']}"
        self.address = f"127.0.0.1:{ports['port']}"  # of the cluster itself, for drivers that join it
        self._token = secrets.token_hex(16)
        # Of its own: Ray tells its jobs where their cluster is by a file there, and other Rays of the machine write it
        # too. Not below `folder`: a socket's path has at most 107 characters.
        self.sessions = Path(tempfile.mkdtemp(prefix="dvae-ray-", dir="/tmp"))
        scripts = Path(sys.executable).parent
        command = [str(scripts / "ray"), "start", "--head", "--block", f"--num-cpus={num_cpus}",
                   "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--object-store-memory=200000000",
                   "--disable-usage-stats", f"--temp-dir={self.sessions}",
                   *(f"--{name}={port}" for name, port in ports.items())]  # fmt: skip
        environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            "RAY_API_SERVER_ADDRESS": self.dashboard,
            "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}",  # jobs begin with `dvae`
        }
        super().__init__("Ray", command, folder / "log", environment)

    def is_ready(self) -> bool:
        return _answers(f"{self.dashboard}/api/version", {"Authorization": f"Bearer {self._token}"})

    def stop(self) -> None:
        super().stop()
        shutil.rmtree(self.sessions, ignore_errors=True)  # Ray's own logs


def _answers(url: str, headers: Mapping[str, str] | None = None) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=dict(headers or {})), timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False
