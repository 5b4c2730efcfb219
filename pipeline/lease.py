"""One driver at a time: lease.json in the output prefix, made by a create-only PUT and renewed.

Two drivers of the same run would do no harm (parts are deterministic and whole), of two models they would mix: so a
driver that has lost its lease, stopped for longer than it lasts, must learn that and end (`check`).
A lease whose process is gone (same machine) or that was not renewed for EXPIRY_S is taken over; one from elsewhere is
looked at twice, for clocks differ.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline import storage
from pipeline.errors import RunHeld, StorageError
from pipeline.output import OutputPrefix

EXPIRY_S = 120.0
RENEW_S = 30.0
SECOND_LOOK_S = RENEW_S + 5.0  # by then a live holder has renewed
log = logging.getLogger(__name__)


class Lease:
    """Context manager that holds `output` while it is open. Raises RunHeld on entry when somebody else does. `lost`:
    who has it now, once another driver has taken it."""

    def __init__(self, output: OutputPrefix) -> None:
        self._url = output.file("lease.json")
        self._writer = uuid.uuid4().hex
        self.lost: str | None = None
        self._renewed = _Moment()
        self._renewing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        self._renewed = _Moment()
        try:
            if not storage.create(self._url, self._content()):
                self._take_over()
            self._thread.start()
        except KeyboardInterrupt:  # told to stop, perhaps when it was there already
            self._give_back()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._give_back()

    def _give_back(self) -> None:
        try:
            if self._is_mine(_read(self._url)):
                storage.remove(self._url)
        except (StorageError, OSError) as problem:  # not over the block's own end: the lease expires by itself
            log.warning("lease not given back: %s", problem)

    def check(self) -> None:
        """Raises RunHeld when another driver has this run. Asks the store only when the lease may have ended without
        our knowing, this process having been stopped; raises StorageError when that cannot be known."""
        if self.lost is None and self._renewed.age_s() > EXPIRY_S:
            self._renew()
        if self.lost is not None:
            raise RunHeld(self.lost)

    def _is_mine(self, there: bytes | None) -> bool:
        return _parse(there).get("writer") == self._writer

    def _take_over(self) -> None:
        """Put this process where a dead one was. Of two that do it at once, the second finds another in its place."""
        there = _read(self._url)
        if there is not None:
            self._require_dead(there)
        taken = there is not None and storage.swap(self._url, self._content(), there)
        if not taken and not storage.create(self._url, self._content()):  # where it was given back a moment ago
            raise RunHeld(f"{storage.public_url(self._url)}: another driver took this run at the same moment")

    def _require_dead(self, there: bytes) -> None:
        """One from elsewhere that looks expired is given the time to renew: our clocks may differ."""
        holder = _parse(there)
        dead = _is_dead(holder)
        if dead and holder and not _is_here(holder):
            log.info("%s was left by %s: waiting %.0f s to be sure", self._shown, _named(holder), SECOND_LOOK_S)
            time.sleep(SECOND_LOOK_S)
            dead = _read(self._url) in (there, None)
        if not dead:
            age_s = max(0.0, time.time() - holder["renewed"])
            raise RunHeld(
                f"{self._shown}: another driver ({_named(holder)}) holds this run, renewed {age_s:.0f} s ago; "
                f"wait for it, or stop it (its lease ends {EXPIRY_S:.0f} s after that)"
            )

    def _keep(self) -> None:
        while not self._stop.wait(RENEW_S):
            try:
                self._renew()
            except (StorageError, OSError) as error:  # the run itself will meet the same store and say so
                log.warning("lease not renewed: %s", error)
            if self.lost is not None:
                log.warning("%s", self.lost)
                return

    def _renew(self) -> None:
        """Or note that another has it."""
        with self._renewing:
            began, there = _Moment(), _read(self._url)
            if there is not None and self._is_mine(there) and storage.swap(self._url, self._content(), there):
                self._renewed = began
            else:
                self.lost = self._who_has_it()

    def _who_has_it(self) -> str:
        holder = _parse(_read(self._url))
        other = f"another driver ({_named(holder)})" if holder else "another driver, which is gone again,"
        return (
            f"{self._shown}: this driver was stopped for longer than its lease lasts, and {other} took the run over; "
            "what was done is safe: run again when that one is done"
        )

    @property
    def _shown(self) -> str:
        return storage.public_url(self._url)

    def _content(self) -> bytes:
        process = {"pid": os.getpid(), "started": _started(os.getpid())}
        return json.dumps({"writer": self._writer, **_here(), **process, "renewed": time.time()}).encode()


class _Moment:
    """Now. The one clock stands still while a machine sleeps, the other may be put back."""

    def __init__(self) -> None:
        self._wall, self._monotonic = time.time(), time.monotonic()

    def age_s(self) -> float:
        return max(time.time() - self._wall, time.monotonic() - self._monotonic)


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
        holder = dict(json.loads(lease or b"{}"))
        return {**holder, "renewed": float(holder["renewed"]), "pid": int(holder["pid"])}
    except (ValueError, TypeError, KeyError, OverflowError):
        return {}


def _named(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder.get('host')}"


def _is_dead(holder: dict[str, Any]) -> bool:
    if not holder or not abs(time.time() - holder["renewed"]) <= EXPIRY_S:  # NaN is no time either
        return True
    return _is_here(holder) and _started(holder["pid"]) != holder.get("started")


def _is_here(holder: dict[str, Any]) -> bool:
    """Whether its process number means the same to us: a host's name alone may be that of many containers."""
    here = _here()
    return None not in here.values() and all(holder.get(name) == value for name, value in here.items())


def _here() -> dict[str, str | None]:
    return {"host": socket.gethostname(), "boot": _boot(), "pid_namespace": _pid_namespace()}


def _boot() -> str | None:
    """An id of this boot of this kernel; None where there is no Linux."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _pid_namespace() -> str | None:
    """Where process numbers mean what they mean here; None where there is no Linux."""
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """The start time of a process in clock ticks (a process id alone is used again); None when it is gone, or dead and
    not yet asked for its exit code."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        return None if stat[0] in "ZX" else stat[19]
    except (OSError, IndexError):
        return None
