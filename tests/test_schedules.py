"""Schedules are functions of the step: right at their ends, monotone between them, the same in any order."""

from __future__ import annotations

import math

import pytest

from model.config import Ramp, ScheduleConfig
from model.schedules import ramp_at, values_at


@pytest.mark.parametrize("ramp", [Ramp(1.0, 1 / 16, 150_000), Ramp(0.0, 6.6, 5_000), Ramp(0.3, 0.1, 1)])
def test_a_ramp_is_exact_at_both_ends_and_stays_at_the_second(ramp):
    assert ramp_at(ramp, 0) == ramp.start
    assert [ramp_at(ramp, step) for step in (ramp.steps, ramp.steps + 1, 10 * ramp.steps)] == [ramp.end] * 3


def test_a_ramp_is_half_a_cosine():
    ramp = Ramp(1.0, 0.0, 100)
    assert ramp_at(ramp, 50) == pytest.approx(0.5)
    assert ramp_at(ramp, 25) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))
    values = [ramp_at(ramp, step) for step in range(101)]
    assert values == sorted(values, reverse=True)


def test_a_warm_up_scales_the_first_steps_and_no_others():
    ramp = Ramp(1.0, 1.0, 100, warmup=4)
    assert [ramp_at(ramp, step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_the_papers_values_at_its_own_milestones():
    schedules = ScheduleConfig()
    start, end = values_at(schedules, 0), values_at(schedules, 3_000_000)
    assert (start.temperature, start.kl_weight, start.lr) == (1.0, 0.0, 1.0)
    assert (end.temperature, end.kl_weight, end.lr) == (1 / 16, 6.6, 0.0125)
    assert start.usage_weight == end.usage_weight == 0.0
    assert values_at(schedules, 5_000).kl_weight == 6.6
    assert values_at(schedules, 75_000).temperature == pytest.approx((1 + 1 / 16) / 2)
