"""From `dvae tokenize` to the first image encoded: seconds, and where they go. Prints a table and JSON.

    python tests/bench_startup.py [--rounds 3]

The command as a user types it, in a process of its own, on a local machine whose files are in the page cache, with a
tiny model. Notes are made by startup_marks/sitecustomize.py in every Python process of the run; the code is unchanged.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from make_data import write_checkpoint, write_shards

TESTS = Path(__file__).parent
# what is shown, in the order in which it happens: the note that ends each step
DRIVER = (
    ("Python, and the command line's imports", "import jobs.cli end"),
    ("imports of tokenising", "load_config begin"),
    ("configuration", "load_config end"),
    ("run.json, plan", "Session._tokenize begin"),
    ("imports of Ray", "_connect begin"),
    ("ray.init", "_connect end"),
    ("pool made", "ActorPool.__enter__ begin"),
)
ACTOR = (
    ("worker process given, actor's class imported", "TokenizeActor.__init__ begin"),
    ("actor made", "TokenizeActor.load begin"),
    ("import of torch", "import torch end"),
    ("checkpoint loaded", "TokenizeActor.load end"),
    ("first shard given", "TokenizeActor.tokenize begin"),
    ("read, decoded, first batch given", "DVAETokenizer.encode begin"),
    ("first batch encoded", "DVAETokenizer.encode end"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = write_checkpoint(folder / "checkpoint")
        write_shards(folder / "shards", [64] * 4)
        run(folder, checkpoint, "warm")
        rounds = [run(folder, checkpoint, str(number)) for number in range(arguments.rounds)]
    report = {name: [round(each[name], 3) for each in rounds] for name in rounds[0]}
    for name, seconds in report.items():
        sys.stderr.write(f"{statistics.median(seconds):7.2f} s  ({min(seconds):.2f}-{max(seconds):.2f})  {name}\n")
    json.dump(report, sys.stdout, indent=2)
    sys.stdout.write("\n")


def run(folder: Path, checkpoint: Path, name: str) -> dict[str, float]:
    """Seconds of each step of one run; the sum of all is the time to the first image."""
    config, marks = folder / f"{name}.yaml", folder / f"{name}.marks"
    settings = {"checkpoint": checkpoint, "shards": folder / "shards", "output": folder / f"out-{name}"}
    config.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    begun = time.time()
    done = tokenize(config, marks)
    if done.returncode:
        raise SystemExit(done.stderr)
    return steps(begun, time.time(), notes(marks.read_text()))


def tokenize(config: Path, marks: Path) -> subprocess.CompletedProcess[str]:
    """As bin/dvae does, with notes in the file `marks`."""
    path = os.pathsep.join([str(TESTS / "startup_marks"), str(TESTS.parent)])
    return subprocess.run(
        [sys.executable, "-c", "from jobs.cli import main; main()", "tokenize", str(config)],
        env={**os.environ, "PYTHONPATH": path, "STARTUP_MARKS": str(marks)}, capture_output=True, text=True,
    )  # fmt: skip


def notes(text: str) -> dict[str, tuple[float, int]]:
    """Note -> when and in which process it was first made; of actors, those of the one that first encoded a batch."""
    lines = [(float(at), int(pid), note) for at, pid, note in (line.split(" ", 2) for line in text.splitlines())]
    driver = next(pid for _, pid, note in sorted(lines) if note.startswith("load_config"))
    actor = next(pid for _, pid, note in sorted(lines) if note == "DVAETokenizer.encode end")
    found: dict[str, tuple[float, int]] = {}
    for at, pid, note in sorted(lines):
        wanted = driver if note in {last for _, last in DRIVER} else actor
        if pid == wanted:
            found.setdefault(note, (at, pid))
    return found


def steps(begun: float, ended: float, found: dict[str, tuple[float, int]]) -> dict[str, float]:
    seconds, before = {}, begun
    for name, last in (*DRIVER, *ACTOR):
        at = max(before, found[last][0])  # what another process did earlier, beside this, took no time of its own
        seconds[name], before = at - before, at
    return {**seconds, "= to the first image encoded": before - begun, "the rest of the run": ended - before}


if __name__ == "__main__":
    main()
