"""Writes a small run as this version writes it: `python tests/make_golden_run.py`, once for each schema version.

tests/golden/run-v<version>/ is the output (of shards that are nowhere: gs://golden), run-v<version>-rows.json what is
in it. Never write those of an older version anew: what lies on people's stores is what they stand for.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import fsspec

from make_data import MortalStore, image_bytes, tar_bytes, write_checkpoint
from make_run import run_config, tokenize_here
from pipeline import storage
from pipeline.token_run import TokenRun
from pipeline.token_table import SCHEMA_VERSION

GOLDEN = Path(__file__).parent / "golden"
COLUMNS = {
    "caption": {"from": "txt"},
    "score": {"from": "json.score", "type": "float32"},
    "exact": {"from": "json.score", "type": "float64"},
    "count": {"from": "json.count", "type": "int64"},
    "n": {"from": "json.n", "type": "int32"},
    "good": {"from": "json.good", "type": "bool"},
}
SHARDS = {"a": (0, "++++"), "b": (10, "-++-"), "c": (20, "")}  # the first image's number; + for an image, - for none


class GoldenStore(MortalStore):
    """gs:// in memory, so that the run holds no path of this machine."""

    protocol = "gs"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("gs://", "memory://"))


def shard_bytes(first: int, good: str) -> bytes:
    members = []
    for n, letter in enumerate(good, first):
        metadata = json.dumps({"score": n + 0.1, "count": 2**33 + n, "good": n % 2 == 0, "n": n}).encode()
        members.append((f"img{n:05d}.jpg", image_bytes(n) if letter == "+" else b"no image"))
        members.append((f"img{n:05d}.json", metadata))
        if n % 3:
            members.append((f"img{n:05d}.txt", f"picture {n}: ü <b>".encode()))
    return tar_bytes(members)


def main() -> None:
    fsspec.register_implementation("gs", GoldenStore, clobber=True)
    for name, (first, good) in SHARDS.items():
        storage.publish(f"gs://golden/in/{name}.tar", shard_bytes(first, good))
    output, folder = f"gs://golden/run-v{SCHEMA_VERSION}", GOLDEN / f"run-v{SCHEMA_VERSION}"
    checkpoint = write_checkpoint(Path(tempfile.mkdtemp()))
    assert (
        tokenize_here(run_config(checkpoint, "gs://golden/in", output, metadata=COLUMNS, max_failed_samples=0.5)) == 0
    )
    for info in storage.list_files(output):
        if not info.url.endswith("plan.json"):  # which names the checkpoint's folder
            storage.publish(str(folder) + info.url.removeprefix(output), storage.read_bytes(info.url))
    run = TokenRun.open(str(folder))
    rows = [json.dumps(row, ensure_ascii=False) for part in run.parts for row in run.read_part(part).to_pylist()]
    Path(f"{folder}-rows.json").write_text("[\n" + ",\n".join(rows) + "\n]\n")


if __name__ == "__main__":
    main()
