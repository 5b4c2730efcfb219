"""Where a worker's time goes, by a clock that stands still until it is told."""

from __future__ import annotations

from contextlib import ExitStack, suppress

import pytest

from pipeline.stage_times import StageClock, StageTimes


class Watch:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def watch() -> Watch:
    return Watch()


def test_times_add_up_field_by_field() -> None:
    assert StageTimes(1, 2, 3, 4, 5, 6) + StageTimes(10, 20, 30, 40, 50, 60) == StageTimes(11, 22, 33, 44, 55, 66)
    assert sum([StageTimes(write_s=1)] * 3, StageTimes()) == StageTimes(write_s=3)


def test_each_stage_counts_for_itself_and_work_side_by_side_counts_once_in_the_unions(watch: Watch) -> None:
    clock = StageClock(watch)
    first, second, encoding = ExitStack(), ExitStack(), ExitStack()
    first.enter_context(clock.shard())
    watch.time += 1  # one shard open
    second.enter_context(clock.shard())
    encoding.enter_context(clock.encode())
    watch.time += 2
    with clock.encode():  # a second caller
        watch.time += 4
    encoding.close()
    first.close()
    with clock.write():
        watch.time += 8
    second.close()
    watch.time += 16  # nothing is open
    clock.waited(5, reading_s=3)
    assert clock.take() == StageTimes(read_s=3, pixels_s=2, encode_s=6 + 4, write_s=8, model_busy_s=6, open_s=15)
    assert clock.take() == StageTimes()


def test_what_is_taken_while_calls_are_under_way_adds_up_to_the_whole(watch: Watch) -> None:
    clock, taken = StageClock(watch), []
    with clock.shard(), clock.encode():
        for _ in range(3):
            watch.time += 2
            taken.append(clock.take())
    assert [times.model_busy_s for times in taken] == [times.open_s for times in taken] == [2, 2, 2]
    assert clock.take() == StageTimes(encode_s=6)


def test_a_stage_that_fails_is_counted_and_over(watch: Watch) -> None:
    clock = StageClock(watch)
    with suppress(OSError), clock.shard(), clock.encode():
        watch.time += 3
        raise OSError
    watch.time += 5
    assert clock.take() == StageTimes(encode_s=3, model_busy_s=3, open_s=3)


def test_reading_beyond_the_wait_was_done_while_nobody_waited(watch: Watch) -> None:
    clock = StageClock(watch)
    clock.waited(2, reading_s=7)
    assert clock.take() == StageTimes(read_s=2)


def test_the_share_in_which_the_encoder_is_busy() -> None:
    assert StageTimes(model_busy_s=3, open_s=4).encoder_busy == 0.75
    assert StageTimes().encoder_busy == 0
