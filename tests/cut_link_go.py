"""A run on two nodes, each in a network of its own, whose link is cut in the middle: for good, or for a while. Linux,
root and iproute2. `python cut_link_go.py FOLDER SECONDS NAME`, with checkpoint/ and shards/ in FOLDER; 0 seconds: for
good. Prints one line of JSON: the driver's exit code, what it said with the time since the cut, how long it all took.

Two network namespaces are plugged into a switch in a third one. To cut the link is to take a plug out there: both ends
see their own cable as it was, and nothing comes through. The driver and the head are on one side. The disk is common to
both, so that an actor that is cut off may still publish what it is at, as it could to a store.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fakes import RecordingSource
from jobs.checkpoints import read_head
from jobs.config import check
from jobs.tokenize_config import TokenizeConfig
from jobs.tokenize_dataset import run_tokenize

NET = f"10.77.{os.getpid() % 256}"  # Ray looks for other heads in all of this machine's processes, by address
BEGIN_S, GIVE_UP_S = 60.0, 150.0
DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG
BATCH_S = 4.0  # so that there is work left when Ray gives a node up
RAY = str(Path(sys.executable).with_name("ray"))
STORE = "--object-store-memory=83886080"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


class Networks:
    """`left` and `right`, plugged into one switch."""

    def __init__(self, name: str) -> None:
        self._switch, self.left, self.right = f"{name}-s", f"{name}-l", f"{name}-r"

    def __enter__(self) -> Networks:
        for namespace in (self._switch, self.left, self.right):
            ip("netns", "add", namespace)
            ip("-n", namespace, "link", "set", "lo", "up")
        ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", self._switch, "link", "set", "bridge", "up")
        for side, namespace, address in (("left", self.left, 1), ("right", self.right, 2)):
            cable = ["link", "add", side, "type", "veth", "peer", "name", "eth0", "netns", namespace]
            ip("-n", self._switch, *cable)
            ip("-n", namespace, "address", "add", f"{NET}.{address}/24", "dev", "eth0")
            ip("-n", namespace, "link", "set", "eth0", "up")
            ip("-n", self._switch, "link", "set", side, "up")
            ip("-n", self._switch, "link", "set", side, "master", "bridge")
        return self

    def cut(self) -> None:
        ip("-n", self._switch, "link", "set", "right", "nomaster")

    def mend(self) -> None:
        ip("-n", self._switch, "link", "set", "right", "master", "bridge")

    def __exit__(self, *_: object) -> None:
        for namespace in (self.left, self.right, self._switch):
            ip("netns", "delete", namespace)


def inside(namespace: str, command: Sequence[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["ip", "netns", "exec", namespace, *command], stdout=log, stderr=log, start_new_session=True
    )


@contextmanager
def node(namespace: str, number: int, folder: Path, *options: str) -> Iterator[None]:
    common = ["--block", f"--node-ip-address={NET}.{number}", "--num-cpus=1", "--disable-usage-stats", STORE]
    with (folder / f"ray-{namespace}.log").open("wb") as log:
        process = inside(namespace, [RAY, "start", *common, *options], log)
        time.sleep(5)
        assert process.poll() is None, Path(log.name).read_text()
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def drive(folder: Path, name: str, address: str) -> int:
    """The driver itself, on the left."""
    logging.basicConfig(format="%(created)f %(message)s", level=logging.INFO)
    checkpoint = str(folder / "checkpoint")
    values = {
        "checkpoint": checkpoint, "shards": str(folder / "shards"), "output": str(folder / name), "batch_size": 4,
        "attempts": 1, "ray": {"address": address, "num_actors": 2, "shards_in_flight": 1, "decode": "threads"},
    }  # fmt: skip
    source = RecordingSource(read_head(checkpoint), seconds=BATCH_S, log=str(folder / f"{name}.log"))
    return run_tokenize(check(TokenizeConfig, values, "test"), "dvae", source)


def main(folder: Path, cut_s: float, name: str) -> None:
    # A token may lie in this user's home, which some of Ray's processes would find and others not.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    parts, opened = folder / name / "tokens", folder / f"{name}.log"
    address = f"{NET}.1:6379"
    command = [sys.executable, __file__, "--drive", str(folder), name, address]
    head = ["--head", "--port=6379", "--include-dashboard=false"]
    with (
        Networks(f"dvae-{os.getpid()}") as networks,
        (folder / f"{name}.said").open("w+b") as said,
        node(networks.left, 1, folder, *head),
        node(networks.right, 2, folder, f"--address={address}"),
    ):
        driver = inside(networks.left, command, said)
        give_up_at = time.monotonic() + BEGIN_S
        while driver.poll() is None and not (len(pids(opened)) == 2 and len(list(parts.glob("*.parquet"))) > 2):
            assert time.monotonic() < give_up_at, (folder / f"{name}.said").read_text()
            time.sleep(0.1)
        networks.cut()
        cut_at = time.time()
        if cut_s:
            time.sleep(cut_s)
            networks.mend()
        code = driver.wait(GIVE_UP_S)
        took_s = time.time() - cut_at
        said.seek(0)
        lines = [since(line, cut_at) for line in said.read().decode().splitlines()]
    print(json.dumps({"code": code, "seconds_after": round(took_s, 1), "said": lines}), flush=True)  # noqa: T201


def pids(log: Path) -> set[str]:
    return {line.split()[1] for line in log.read_text().splitlines()} if log.exists() else set()


def since(line: str, moment: float) -> str:
    when, _, words = line.partition(" ")
    try:
        return f"{float(when) - moment:+.1f} {words}"
    except ValueError:
        return line


if __name__ == "__main__":
    # Whoever started this may be killed: no network, no Ray and no driver is left behind then.
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if sys.argv[1] == "--drive":
        sys.exit(drive(Path(sys.argv[2]), *sys.argv[3:]))
    main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
