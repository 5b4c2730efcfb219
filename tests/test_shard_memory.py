"""Memory is bounded by the batches in flight and the token rows, not by the shard's bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from measure_memory import write_big_shard

ROW_BYTES = 2048  # 1,024 tokens of two bytes


def measured(folder: Path, num_bytes: int) -> dict[str, float]:
    shard = folder / f"{num_bytes >> 20}mb.tar"
    num_images = write_big_shard(shard, num_bytes)
    command = [sys.executable, str(Path(__file__).parent / "measure_memory.py"), str(shard), str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shard.unlink()
    figures: dict[str, float] = json.loads(done.stdout)
    assert figures["rows"] == num_images
    return figures


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_shard_of_a_gigabyte_takes_the_memory_of_a_small_one_and_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, large = (measured(tmp_path, size) for size in (20 << 20, 1 << 30))
    allowed = small["peak_bytes"] + large["rows"] * ROW_BYTES
    row_bytes = (large["peak_bytes"] - small["peak_bytes"]) / (large["rows"] - small["rows"])
    with capsys.disabled():
        print(f"\n20 MB: {small}\n1 GB: {large}\npeak / allowed: {large['peak_bytes'] / allowed:.3f}", end=", ")  # noqa: T201
        print(f"{row_bytes:.0f} bytes a row")  # noqa: T201
    assert large["peak_bytes"] <= 1.3 * allowed


def test_a_shard_of_three_times_the_bytes_takes_no_three_times_the_memory(tmp_path: Path) -> None:
    """The same in small."""
    small, large = (measured(tmp_path, size) for size in (20 << 20, 60 << 20))
    assert large["peak_bytes"] <= 1.15 * (small["peak_bytes"] + large["rows"] * ROW_BYTES)
