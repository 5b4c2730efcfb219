"""How long a job will still take: by what is left of it, and by its pace of late."""

from __future__ import annotations

import itertools

import pytest

from jobs.time_left import FINENESS, TimeLeft


class Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_nothing_is_told_before_anything_is_done_and_a_stall_shows(clock: Clock) -> None:
    left = TimeLeft(100, clock)
    clock.time = 5.0
    assert left.left_s is None
    left.note(10)
    assert left.left_s == 45.0
    clock.time = 50.0
    assert left.left_s == 450.0
    left.note(90)
    assert left.left_s == 0.0


def test_it_goes_by_amounts_where_units_differ_in_size(clock: Clock) -> None:
    """A thousand small ones, then a thousand that are ten times as large, at the same pace of bytes."""
    left = TimeLeft(11_000, clock)
    for _ in range(1000):
        clock.time += 1.0
        left.note(1)
    assert left.left_s == pytest.approx(10_000, rel=0.01)


def test_the_start_of_the_cluster_is_not_taken_for_its_pace(clock: Clock) -> None:
    left = TimeLeft(1000, clock)
    clock.time = 600.0
    for _ in range(20):
        clock.time += 1.0
        left.note(1, 1.0)
    assert left.left_s == pytest.approx(980, rel=0.01)


def test_it_follows_a_cluster_that_is_half_as_large_from_now_on(clock: Clock) -> None:
    left = TimeLeft(1000, clock)
    for _ in range(200):
        clock.time += 1.0
        left.note(1)
    assert left.left_s == pytest.approx(800, rel=0.01)
    for _ in range(60):
        clock.time += 2.0
        left.note(1)
    assert left.left_s == pytest.approx(1480, rel=0.05)


@pytest.mark.parametrize("num_actors", [1, 4, 100])
def test_shards_that_end_together_are_one_step_and_not_a_great_pace(clock: Clock, num_actors: int) -> None:
    """A burst of all actors every ten seconds."""
    left = TimeLeft(100 * num_actors, clock)
    for burst in range(1, 20):
        clock.time = 10.0 * burst
        for _ in range(num_actors):
            clock.time += 1e-3
            left.note(1, 10.0)
        assert left.left_s == pytest.approx(10.0 * (100 - burst), rel=0.05)


def test_few_marks_are_kept_of_however_many_shards(clock: Clock) -> None:
    left = TimeLeft(1_000_000, clock)
    for _ in itertools.repeat(None, 100_000):
        clock.time += 0.01
        left.note(1)
    assert len(left._marks) < 2 / FINENESS
    assert left.left_s == pytest.approx(9000, rel=0.01)
