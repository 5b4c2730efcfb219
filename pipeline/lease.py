"""One driver at a time: lease.json in the output prefix, made by a create-only PUT and renewed.

Two drivers do no harm (parts are deterministic and whole), so the lease guards against waste, not damage.
A lease whose process is gone (same host) or that was not renewed for EXPIRY_S is taken over.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from types import TracebackType
from typing import Any

from pipeline import storage
from pipeline.errors import RunHeld, StorageError
from pipeline.output import OutputPrefix

EXPIRY_S = 120.0
RENEW_S = 30.0
log = logging.getLogger(__name__)


class Lease:
    """Context manager that holds `output` while it is open. Raises RunHeld on entry when somebody else does."""

    def __init__(self, output: OutputPrefix) -> None:
        self._url = output.file("lease.json")
        self._writer = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        if not storage.create(self._url, self._content()):
            self._take_over()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        try:
            if self._is_mine(_read(self._url)):
                storage.remove(self._url)
        except (StorageError, OSError) as problem:  # not over the block's own end: the lease expires by itself
            log.warning("lease not given back: %s", problem)

    def _is_mine(self, there: bytes | None) -> bool:
        return _parse(there).get("writer") == self._writer

    def _take_over(self) -> None:
        """Put this process where a dead one was. Of two that do it at once, the second finds another in its place."""
        there = _read(self._url)
        if there is not None:
            self._require_dead(_parse(there))
            taken = storage.swap(self._url, self._content(), there)
        else:  # given back a moment ago
            taken = storage.create(self._url, self._content())
        if not taken:
            raise RunHeld(f"{storage.public_url(self._url)}: another driver took this run at the same moment")

    def _require_dead(self, holder: dict[str, Any]) -> None:
        if not _is_dead(holder):
            age_s = max(0.0, time.time() - float(holder.get("renewed", 0)))
            raise RunHeld(
                f"{storage.public_url(self._url)}: another driver (process {holder.get('pid')} on "
                f"{holder.get('host')}) holds this run, "
                f"renewed {age_s:.0f} s ago; wait for it, or stop it (its lease ends {EXPIRY_S:.0f} s after that)"
            )

    def _keep(self) -> None:
        while not self._stop.wait(RENEW_S):
            try:
                if not self._renew():  # this process was stopped for longer than the lease lasts
                    log.warning("another driver has taken this run over: two do no harm, but one is enough")
                    return
            except (StorageError, OSError) as error:  # the run itself will meet the same store and say so
                log.warning("lease not renewed: %s", error)

    def _renew(self) -> bool:
        there = _read(self._url)
        return there is not None and self._is_mine(there) and storage.swap(self._url, self._content(), there)

    def _content(self) -> bytes:
        host = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
        return json.dumps({"writer": self._writer, **host, "renewed": time.time()}).encode()


def is_held(output: OutputPrefix) -> bool:
    """Whether a driver is at work there; a lease that a killed one left does not count."""
    there = _read(output.file("lease.json"))
    return there is not None and not _is_dead(_parse(there))


def _read(url: str) -> bytes | None:
    try:
        return storage.read_bytes(url)
    except FileNotFoundError:
        return None


def _parse(lease: bytes | None) -> dict[str, Any]:
    """Nothing of a damaged one, which is dead by that."""
    try:
        return dict(json.loads(lease or b"{}"))
    except (ValueError, TypeError):
        return {}


def _is_dead(holder: dict[str, Any]) -> bool:
    if time.time() - float(holder.get("renewed", 0)) > EXPIRY_S:
        return True
    if holder.get("host") != socket.gethostname():
        return False
    return _started(int(holder.get("pid", 0))) != holder.get("started")


def _started(pid: int) -> str | None:
    """The start time of a process in clock ticks (a process id alone is used again); None when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
