"""Values that change with the step, as pure functions of the step: nothing is nudged in a loop."""

from __future__ import annotations

import math
from dataclasses import dataclass

from model.config import Ramp, ScheduleConfig


@dataclass(frozen=True)
class StepValues:
    """What the schedules say at one step. `lr` is the factor on the optimiser's learning rate."""

    temperature: float
    kl_weight: float
    usage_weight: float
    lr: float


def ramp_at(ramp: Ramp, step: int) -> float:
    """Half a cosine from `start` to `end`, exact at both ends, times the linear warm-up."""
    remaining = 0.5 * (1.0 + math.cos(math.pi * min(step, ramp.steps) / ramp.steps))
    value = ramp.start * remaining + ramp.end * (1.0 - remaining)
    return value * min(1.0, (step + 1) / (ramp.warmup + 1))


def values_at(schedules: ScheduleConfig, step: int) -> StepValues:
    return StepValues(
        temperature=ramp_at(schedules.temperature, step),
        kl_weight=ramp_at(schedules.kl_weight, step),
        usage_weight=ramp_at(schedules.usage_weight, step),
        lr=ramp_at(schedules.lr, step),
    )
