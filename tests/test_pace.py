"""When a shard is late, and when its actor is taken to hang."""

from __future__ import annotations

import math

import pytest

from jobs.pace import DEADLINE_FACTOR, FIRST_DEADLINE_S, LATE_FACTOR, LEAST_DEADLINE_S, LEAST_LATE_S, REMEMBERED, Pace

MB = 1 << 20


def seen(*shards: tuple[int, float]) -> Pace:
    """Bytes and seconds of each."""
    pace = Pace(None)
    for size_bytes, seconds in shards:
        pace.note(size_bytes, seconds)
    return pace


def test_as_long_as_nothing_was_seen_the_deadline_is_generous_and_nothing_is_late() -> None:
    assert Pace(None).deadline_s(10**12, 0) == FIRST_DEADLINE_S
    assert Pace(None).late_s(1) == math.inf


def test_a_deadline_of_the_configuration_stays_as_it_is() -> None:
    pace = Pace(7.5)
    assert pace.deadline_s(MB, 0) == 7.5
    pace.note(MB, 1000.0)
    assert pace.deadline_s(MB, 0) == pace.deadline_s(900 * MB, 2) == 7.5


def test_the_deadline_is_ten_times_the_slowest_seen_for_as_many_bytes() -> None:
    pace = seen((MB, 50.0), (MB, 200.0), (2 * MB, 100.0))
    assert pace.deadline_s(MB, 0) == DEADLINE_FACTOR * 200
    assert pace.deadline_s(2 * MB, 0) == DEADLINE_FACTOR * 400


def test_a_deadline_is_never_shorter_than_a_bad_minute_of_a_store() -> None:
    assert seen((MB, 0.01)).deadline_s(MB, 0) == LEAST_DEADLINE_S


def test_a_shard_larger_than_all_that_was_seen_has_the_first_deadline_at_least() -> None:
    """A run that begins with an empty shard knows nothing of the others."""
    assert seen((10_240, 0.001)).deadline_s(MB, 0) == FIRST_DEADLINE_S
    assert seen((MB, 100.0)).deadline_s(10 * MB, 0) == DEADLINE_FACTOR * 1000


def test_each_further_attempt_has_twice_as_long() -> None:
    pace = seen((MB, 100.0))
    assert [pace.deadline_s(MB, attempt) for attempt in range(3)] == [1000, 2000, 4000]


def test_what_small_shards_take_is_not_for_their_bytes() -> None:
    pace = seen(*[(100 * MB, 20.0)] * 5, (1000, 1.0))
    assert pace.deadline_s(100 * MB, 0) == LEAST_DEADLINE_S > DEADLINE_FACTOR * 20
    assert seen((100 * MB, 60.0), (100 * MB, 60.0), (1000, 1.0)).deadline_s(100 * MB, 0) == DEADLINE_FACTOR * 60
    assert pace.late_s(1000) == pace.late_s(100 * MB)


def test_late_is_four_times_the_median_and_never_just_a_moment() -> None:
    pace = seen((MB, 10.0), (MB, 20.0), (MB, 1000.0))
    assert pace.late_s(MB) == LATE_FACTOR * 20
    assert pace.late_s(3 * MB) == LATE_FACTOR * 60
    assert seen((MB, 0.1)).late_s(MB) == LEAST_LATE_S


def test_empty_shards_do_not_divide_by_zero() -> None:
    assert seen((0, 0.0)).deadline_s(0, 0) == LEAST_DEADLINE_S


def test_the_memory_of_it_is_bounded_and_what_was_long_ago_is_forgotten() -> None:
    pace = seen((MB, 500.0), *[(MB, 60.0)] * REMEMBERED)
    assert pace.deadline_s(MB, 0) == pytest.approx(DEADLINE_FACTOR * 60)
