"""A driver of many actors and shards, in simulated time: what a shard costs, and how long it says that it will take."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import pipeline
from bench_cluster_scale import laws, simulate

HOUSE = str(Path(pipeline.__file__).parent.parent)
OURS = (f"{HOUSE}/jobs/", f"{HOUSE}/pipeline/")
NUM_SHARDS = 2000
BYTES_A_SECOND = 1.2e10  # of all actors together, so that what goes by the clock is the same for few and for many


class Instructions:
    """Those that the interpreter carries out in our own files, on this thread: the same on every machine."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Instructions:
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return self._step

    def _step(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.count += event == "opcode"
        return self._step


def measured(num_actors: int) -> tuple[dict[str, Any], dict[int, int]]:
    """The figures of a run, and how many instructions it had taken at every five hundredth shard."""
    at: dict[int, int] = {}

    def each(num_done: int) -> None:
        if num_done % 500 == 0:
            at[num_done] = instructions.count

    with Instructions() as instructions:
        figures = simulate(num_actors, NUM_SHARDS, "uneven", BYTES_A_SECOND / num_actors, each)
    return figures, at


def test_a_shard_costs_the_driver_the_same_however_many_actors_and_shards_there_are() -> None:
    """And the time that is left is told truly, once a tenth is done."""
    few, at_few = measured(4)
    _, at_many = measured(100)
    early, late = at_few[1000] - at_few[500], at_few[2000] - at_few[1500]
    assert late < 1.1 * early
    assert at_many[1500] - at_many[500] < 1.3 * (at_few[1500] - at_few[500])
    errors = few["time_left_errors"]
    assert abs(errors["10%"]["by_progress"]) < 0.05 and abs(errors["50%"]["by_progress"]) < 0.03


def test_the_law_of_a_cost_is_its_exponent() -> None:
    runs = [
        {"actors": actors, "shards": shards, "driver_cpu_us_a_shard": 3.0 * actors**0.5}
        for actors in (10, 100, 1000)
        for shards in (10**4, 10**5)
    ]
    assert laws(runs) == {"cost_by_actors": pytest.approx(0.5), "cost_by_shards": pytest.approx(0.0)}
