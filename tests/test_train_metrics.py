"""The figures of a training line: means of numbers, the same however the line was interrupted."""

from __future__ import annotations

import json
import math

from jobs.train_metrics import Window

STEPS = [
    {"loss": 0.1, "skipped": 0.0},
    {"loss": math.nan, "skipped": 1.0},
    {"loss": math.inf, "skipped": 1.0},
    {"loss": 0.7, "skipped": 0.0},
]


def test_a_skipped_step_counts_as_skipped_and_has_no_part_in_the_loss() -> None:
    window = Window()
    for figures in STEPS:
        window.add(figures)
    assert window.close() == {"loss": (0.1 + 0.7) / 2, "skipped": 0.5}
    window.add(STEPS[1])
    assert window.close() == {"loss": None, "skipped": 1.0}


def test_a_line_goes_on_from_json_that_any_reader_takes() -> None:
    whole, begun = Window(), Window()
    for figures in STEPS:
        whole.add(figures)
    for figures in STEPS[:2]:
        begun.add(figures)
    resumed = Window(json.loads(json.dumps(begun.rows(), allow_nan=False)))
    for figures in STEPS[2:]:
        resumed.add(figures)
    assert resumed.close() == whole.close()
