"""How fast a run went over its time: from when the store says each part was written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

MOST_BINS = 60
PARTS_A_BIN = 3  # on average: with fewer it is the parts that show, not the pace
LEAST_PARTS, LEAST_S = 12, 5.0  # with less, it is when the last parts were written that shows
UNITS = ((172_800.0, 86_400.0, "days"), (5_400.0, 3_600.0, "hours"), (90.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))


@dataclass(frozen=True)
class Pace:
    """Images a second in equal stretches between the first part and the last. `length` is of all, in `unit`."""

    images_per_s: tuple[float, ...]
    length: float
    unit: str
    first_at: datetime
    last_at: datetime


def pace(num_rows: Mapping[str, int], written_at: Mapping[str, float]) -> Pace | None:
    """By the names of parts; what the first part holds was made before it was there, so it does not count. None where
    times say nothing: there are few parts, or all were written at about one moment."""
    times = sorted((written_at[name], rows) for name, rows in num_rows.items() if name in written_at)
    first_s, last_s = (times[0][0], times[-1][0]) if times else (0.0, 0.0)
    if len(times) < LEAST_PARTS or last_s - first_s < LEAST_S:
        return None
    after = [(time, rows) for time, rows in times if time > first_s]
    num_bins = min(MOST_BINS, max(1, len(after) // PARTS_A_BIN))
    before_end = [last_s - time for time, _ in after]  # so that a part at the edge of two stretches ends the earlier
    rows, _ = np.histogram(before_end, num_bins, range=(0.0, last_s - first_s), weights=[rows for _, rows in after])
    per_s = rows[::-1] / ((last_s - first_s) / num_bins)
    scale, unit = next((scale, unit) for least, scale, unit in UNITS if last_s - first_s >= least)
    ends = (datetime.fromtimestamp(at, UTC) for at in (first_s, last_s))
    return Pace(tuple(per_s.tolist()), (last_s - first_s) / scale, unit, *ends)
