"""Reads a share of a run's tokens and kills itself: `OUTPUT LOG RANK WORLD_SIZE BATCHES`. Appends a line of JSON for
each batch to LOG (its keys, and the state after it), goes on where LOG ends, and stops at the end of two epochs."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from pipeline.token_order import Share
from pipeline.token_reader import ReaderOptions, TokenReader
from pipeline.token_run import TokenRun

EPOCHS = 2
OPTIONS = ReaderOptions(batch_size=13, columns=("key",), seed=5, shuffle_rows=100)


def main(output: str, log: str, rank: str, world_size: str, batches: str) -> None:
    reader = TokenReader(TokenRun.open(output), OPTIONS, Share(int(rank), int(world_size)))
    lines = Path(log).read_text().splitlines() if Path(log).exists() else []
    if lines:
        reader.load_state_dict(json.loads(lines[-1])["state"])
    left = int(batches)
    while reader.epoch < EPOCHS:
        epoch = reader.epoch
        for batch in reader:
            with Path(log).open("a") as file:
                line = {"epoch": epoch, "keys": batch.columns["key"], "state": reader.state_dict()}
                file.write(json.dumps(line) + "\n")
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
