"""What a tree of processes takes: CPU seconds by kind, and memory (PSS: a page that several share counts once).

A sampler looks every INTERVAL_S. A process that ends between two looks loses at most that much; where its parent
waited for it, as DataLoader does, nothing is lost. Memory is looked at less often: the kernel walks all page tables
for it, 2 to 20 ms a process while the process waits, which would be a tenth of the machine on Ray's many processes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

INTERVAL_S = 0.25
MEMORY_EVERY = 8  # looks
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
# Ray's own processes; what is neither these nor the root does the work.
DAEMONS = ("raylet", "gcs_server", "dashboard", "log_monitor.py", "monitor.py", "runtime_env", "agent")


@dataclass(frozen=True)
class Look:
    """One moment: CPU seconds of each living process so far (own, and of its ended children); memory of them all, or 0
    where it was not looked at."""

    at: float
    cpu_s: dict[int, tuple[float, float]]
    memory_bytes: int


@dataclass
class Meter:
    """Watches the tree under `root` while inside a `with` block."""

    root: int
    looks: list[Look] = field(default_factory=list)
    kinds: dict[int, str] = field(default_factory=dict)  # of every process ever seen
    parents: dict[int, int] = field(default_factory=dict)

    def __enter__(self) -> Meter:
        self._stop = threading.Event()
        self._look()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self._look(with_memory=len(self.looks) % MEMORY_EVERY == 0)

    def _look(self, *, with_memory: bool = True) -> None:
        cpu_s, memory = {}, 0
        for pid, parent in tree(self.root):
            with suppress(OSError):  # it ended meanwhile
                if pid not in self.kinds:
                    self.kinds[pid], self.parents[pid] = _kind(pid, self.root), parent
                cpu_s[pid] = _cpu_s(pid)
                memory += _pss_bytes(pid) if with_memory else 0
        self.looks.append(Look(monotonic(), cpu_s, memory))

    @property
    def peak_bytes(self) -> int:
        return max(look.memory_bytes for look in self.looks)

    def cpu_s(self, kind: str | None = None, begin: float = 0.0) -> float:
        """CPU seconds of the processes of that kind, or of all, from the last look before `begin` on."""
        first = next((n for n, look in enumerate(self.looks) if look.at >= begin), len(self.looks))
        looks = self.looks[max(0, first - 1) :]
        return sum(self._spent_s(pid, looks) for pid, each in self.kinds.items() if kind in (None, each))

    def _spent_s(self, pid: int, looks: list[Look]) -> float:
        """Of one process: its own seconds as last seen, and those of its ended children that were not seen. (Of a child
        that ends, its parent gets all seconds, those before `looks` too.)"""
        own_s, ended_s = _grown(pid, looks)
        children = [child for child, parent in self.parents.items() if parent == pid]
        ended = [c for c in children if c not in looks[-1].cpu_s and any(c in look.cpu_s for look in looks)]
        return own_s + max(0.0, ended_s - sum(self._last_s(child) for child in ended))

    def _last_s(self, pid: int) -> float:
        return next(sum(look.cpu_s[pid]) for look in reversed(self.looks) if pid in look.cpu_s)


def _grown(pid: int, looks: list[Look]) -> tuple[float, float]:
    own_before, ended_before = looks[0].cpu_s.get(pid, (0.0, 0.0))
    last = next((look.cpu_s[pid] for look in reversed(looks) if pid in look.cpu_s), (own_before, ended_before))
    return last[0] - own_before, last[1] - ended_before


def tree(root: int) -> Iterator[tuple[int, int]]:
    """(pid, parent) of `root` and all below it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with suppress(OSError):
                children.setdefault(int(_stat(int(path.name))[1]), []).append(int(path.name))
    waiting = [(root, 0)]
    while waiting:
        pid, parent = waiting.pop()
        yield pid, parent
        waiting += [(child, pid) for child in children.get(pid, ())]


def _stat(pid: int) -> list[str]:
    """The fields from the third on: the second, a name in brackets, may have blanks."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _cpu_s(pid: int) -> tuple[float, float]:
    own_and_ended = [int(value) * TICK_S for value in _stat(pid)[11:15]]
    return own_and_ended[0] + own_and_ended[1], own_and_ended[2] + own_and_ended[3]


def _pss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _kind(pid: int, root: int) -> str:
    if pid == root:
        return "root"
    command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
    is_worker = command.startswith("ray::") or "default_worker.py" in command
    return "daemon" if not is_worker and any(name in command for name in DAEMONS) else "worker"
