"""A plan of many shards: its requests grow with listings, and a million of them fit in a minute and in 2 GB."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ADOPTED, REMOVED = 200, 1000
BENCH = Path(__file__).parent / "bench_plan.py"


def measured(num_shards: int, num_done: int) -> dict[str, Any]:
    options = {"shards": num_shards, "done": num_done, "adopted": ADOPTED, "removed": REMOVED}
    command = [sys.executable, str(BENCH), *(f"--{name}={value}" for name, value in options.items())]
    return dict(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=900).stdout))


def check_requests(figures: dict[str, Any], num_shards: int, num_done: int) -> None:
    steps = figures["steps"]
    requests = Counter(steps["expand"]["requests"]) + Counter(steps["make_plan"]["requests"])
    pages = [num_shards, num_done + REMOVED, (num_done + REMOVED) // 100, 1]  # input, tokens/, errors/, ledger/
    num_segments = -(-(num_done - ADOPTED + REMOVED) // 20_000)
    assert requests["list"] == sum(-(-count // 1000) for count in pages)
    assert requests["get"] == num_segments + ADOPTED and requests["head"] == ADOPTED
    assert set(requests) == {"list", "get", "head"}
    said = f"{num_shards:,} shards: {num_done:,} done ({ADOPTED} of them without a ledger row), "
    assert figures["plan"].startswith(f"{said}{num_shards - num_done:,} new; {REMOVED:,} removed")


def test_requests_grow_with_pages_of_listings_and_not_with_shards() -> None:
    check_requests(measured(20_000, 10_000), 20_000, 10_000)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_plan_of_a_million_shards_takes_under_a_minute_and_two_gigabytes() -> None:
    figures = measured(1_000_000, 500_000)
    check_requests(figures, 1_000_000, 500_000)
    # Seconds of the processor: those of the clock would measure what else runs on the machine.
    assert figures["plan_cpu_seconds"] < 60
    assert figures["plan_peak_mb"] < 2000
    assert figures["steps"]["write_manifest"]["peak_mb"] < 2000
