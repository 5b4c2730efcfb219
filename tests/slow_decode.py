"""What a worker process of Ray does at its start, in tests of nodes that decode: from then on each image takes
SLOW_DECODE_S longer, asleep, as if a core were at it that this machine does not have; and each is written down in the
file SLOW_DECODE_LOG as `<time> <node> <pid>`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from jobs.cluster import this_node
from pipeline import batches


def install() -> None:
    decode, log = batches.decode_image, Path(os.environ["SLOW_DECODE_LOG"])
    seconds = float(os.environ["SLOW_DECODE_S"])

    def slow(data: bytes, spec: Any) -> Any:
        time.sleep(seconds)
        with log.open("a") as file:
            file.write(f"{time.time()} {this_node()} {os.getpid()}\n")
        return decode(data, spec)

    batches.decode_image = slow
