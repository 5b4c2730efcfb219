"""Random SIGKILLs for runs of `dvae tokenize`: the driver, its actors, the S3 server. Seeded, counted, Linux only."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

_MARK = "DVAE_CHAOS"  # Ray's processes inherit the driver's environment, so a run's own can be told from all others
ACTOR = "ray::TokenizeActor"


class Server(Protocol):
    """The S3 server, which comes back on the same ports with the same data."""

    def kill(self) -> None: ...

    def start(self) -> None: ...


@dataclass
class Chaos:
    """Kills at random while a command runs, `num_kills` times in all. `weights`: how often each victim is chosen."""

    server: Server
    num_kills: int
    seed: int
    weights: dict[str, int]
    pause_s: tuple[float, float]
    log: Path
    killed: Counter[str] = field(default_factory=Counter)
    exit_codes: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._run_id = ""

    def run_until_done(self, command: Sequence[str]) -> None:
        """Again and again, until it ends with exit code 0. Kills no more when the number is reached."""
        code = 1
        while code != 0:
            self._run_id = uuid.uuid4().hex
            with self.log.open("ab") as log:
                driver = subprocess.Popen(
                    command,
                    env={**os.environ, _MARK: self._run_id},
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            try:
                code = self._torment(driver)
            finally:
                self._bury(driver)
            self.exit_codes[code] += 1
            # 2: every actor was killed three times in a row before it had its tokenizer, so that nothing was begun.
            assert code in (0, 1, 2, -signal.SIGKILL), self.log.read_text(errors="replace")[-3000:]

    def _torment(self, driver: subprocess.Popen[bytes]) -> int:
        while True:
            with suppress(subprocess.TimeoutExpired):
                return driver.wait(self._random.uniform(*self.pause_s))
            actors = [pid for pid in self._processes() if _command_line(pid).startswith(ACTOR)]
            if actors and self.killed.total() < self.num_kills:  # before there are any, there is nothing to lose
                self._kill(self._random.choices(list(self.weights), list(self.weights.values()))[0], driver, actors)

    def _kill(self, victim: str, driver: subprocess.Popen[bytes], actors: Sequence[int]) -> None:
        if victim == "driver":
            driver.kill()
        elif victim == "actor":
            try:
                os.kill(self._random.choice(actors), signal.SIGKILL)
            except ProcessLookupError:
                return  # it was gone already: that is no kill
        else:
            self.server.kill()
            time.sleep(self._random.uniform(0, 2))
            self.server.start()
        self.killed[victim] += 1

    def _processes(self) -> list[int]:
        """Of this run, whoever their parent is now. (Ray's workers write their titles over their environment: they
        are known by their parent, the raylet.)"""
        mark = f"{_MARK}={self._run_id}".encode()
        everybody = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        marked = {pid for pid in everybody if mark in _environment(pid)}
        return [pid for pid in everybody if pid in marked or _parent(pid) in marked]

    def _bury(self, driver: subprocess.Popen[bytes]) -> None:
        """What a killed driver's Ray leaves running would only take the next run's time."""
        driver.kill()
        driver.wait()
        for pid in self._processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # gone, or somebody else's
        return b""


def _environment(pid: int) -> list[bytes]:
    return _read(pid, "environ").split(b"\0")


def _command_line(pid: int) -> str:
    return _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace")


def _parent(pid: int) -> int:
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return int(fields[1]) if len(fields) > 1 else 0


def dvae(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "jobs.cli", *arguments]
