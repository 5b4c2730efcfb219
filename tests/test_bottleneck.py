"""The line that says which side of a run is starved."""

from __future__ import annotations

import pytest

from jobs.bottleneck import in_full, in_short
from pipeline.stage_times import StageTimes


@pytest.mark.parametrize(
    ("times", "short", "full"),
    [
        (
            StageTimes(pixels_s=90, encode_s=100, model_busy_s=96, open_s=100),
            "encoder busy 96%",
            "encoder busy 96%: the encoder sets the pace",
        ),
        (
            StageTimes(read_s=5, pixels_s=90, encode_s=41, write_s=7, model_busy_s=41, open_s=100),
            "encoder busy 41%, waits for pixels",
            "encoder busy 41%: it waits for pixels; more decoding CPUs (ray.decode_threads; ray.decode=tasks for those "
            "of other machines) would help",
        ),
        (
            StageTimes(read_s=50, pixels_s=9, encode_s=41, model_busy_s=41, open_s=100),
            "encoder busy 41%, waits for bytes from the store",
            "encoder busy 41%: it waits for bytes from the store; more shards at once (ray.shards_in_flight) would "
            "help",
        ),
        (
            StageTimes(read_s=5, pixels_s=9, write_s=80, model_busy_s=30, open_s=100),
            "encoder busy 30%, waits for parts to be written",
            "encoder busy 30%: it waits for parts to be written; more shards at once (ray.shards_in_flight) would help",
        ),
        (StageTimes(pixels_s=1, model_busy_s=0.1, open_s=2), "", ""),
        (StageTimes(), "", ""),
    ],
)
def test_the_starved_side_is_named_with_what_would_help(times: StageTimes, short: str, full: str) -> None:
    assert in_short(times) == short
    assert in_full(times, on_gpu=True, in_tasks=False) == full


def test_what_helps_against_a_lack_of_pixels_depends_on_where_they_are_made() -> None:
    times = StageTimes(pixels_s=90, model_busy_s=41, open_s=100)
    assert "CPUs that encode also decode" in in_full(times, on_gpu=False, in_tasks=False)
    for on_gpu in (False, True):
        assert "more CPUs for decode tasks" in in_full(times, on_gpu=on_gpu, in_tasks=True)
