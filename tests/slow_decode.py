"""What a worker process of Ray does at its start, in tests of nodes that decode: from then on each image takes
SLOW_DECODE_S longer, asleep, as if a core were at it that this machine does not have; and each is written down in the
file SLOW_DECODE_LOG as `<time> <node> <pid>`. Where SLOW_DECODE_GATE names a file, the first node decodes GATE_AFTER
images and then waits until that file is there, so that a test need not be faster than it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from jobs.cluster import this_node
from pipeline import batches

GATE_AFTER = 30


def install() -> None:
    decode, log = batches.decode_image, Path(os.environ["SLOW_DECODE_LOG"])
    seconds, gate = float(os.environ["SLOW_DECODE_S"]), os.environ.get("SLOW_DECODE_GATE")

    def is_held_back() -> bool:
        if gate is None or Path(gate).exists():
            return False
        nodes = [line.split()[1] for line in log.read_text().splitlines()] if log.exists() else []
        return len(nodes) >= GATE_AFTER and nodes[0] == this_node()

    def slow(data: bytes, spec: Any) -> Any:
        time.sleep(seconds)
        while is_held_back():
            time.sleep(0.05)
        with log.open("a") as file:
            file.write(f"{time.time()} {this_node()} {os.getpid()}\n")
        return decode(data, spec)

    batches.decode_image = slow
