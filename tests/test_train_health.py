"""The warnings of a run: each says figure, cause and setting, and none comes while a schedule explains the figure."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from jobs.train_health import Finding, History, findings, standing
from model.config import Ramp, ScheduleConfig

STEPS, K = 10_000, 1024
SCHEDULES = ScheduleConfig(
    temperature=Ramp(1.0, 1 / 16, 5_000),
    kl_weight=Ramp(0.0, 0.0, 1),
    lr=Ramp(1.0, 0.05, STEPS),
    usage_weight=Ramp(0.0, 0.0, 1),
)
HEALTHY = {
    "kind": "eval", "psnr_soft": 25.2, "psnr_hard": 25.0, "information": 5.5, "perplexity": 600.0, "used_share": 0.9,
    "dead_codes": 102.0, "posterior_entropy": 0.4, "num_positions": 65_536,
}  # fmt: skip


def evaluation(step: int, **changes: float) -> dict[str, Any]:
    return {**HEALTHY, "step": step, **changes}


def training(step: int, skipped: int = 0, **figures: float) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 1.0, "skipped_steps": skipped, **figures}


def said(*lines: dict[str, Any], schedules: ScheduleConfig = SCHEDULES, steps: int = STEPS) -> dict[str, str]:
    return {each.name: each.text for each in findings(History(lines, schedules, steps, K))}


def test_a_healthy_run_is_silent_and_so_is_one_without_an_evaluation() -> None:
    assert said(training(100), evaluation(1_000), training(5_900), evaluation(6_000), evaluation(STEPS)) == {}
    assert said(training(100)) == {}


def test_first_steps_raise_no_alarm_however_they_look() -> None:
    """The temperature is high, hardly a code is used, nothing is learnt yet."""
    bad = evaluation(100, psnr_soft=14.0, psnr_hard=9.0, information=0.0, perplexity=1.1, used_share=0.002)
    assert said(bad) == {}
    assert said(bad, evaluation(400, psnr_soft=18.0, psnr_hard=12.0, used_share=0.001, information=0.0)) == {}


def test_a_gap_is_a_fault_only_once_the_temperature_is_down() -> None:
    gap = {"psnr_soft": 24.3, "psnr_hard": 21.2}
    assert said(evaluation(4_000, **gap)) == {}
    text = said(evaluation(5_000, **gap))["gap"]
    assert "3.1 dB below the soft one" in text and "schedule.temperature.steps (5,000 now)" in text


def test_a_temperature_that_stays_high_or_is_cut_short_is_named_as_the_cause_of_the_gap() -> None:
    gap = {"psnr_soft": 24.3, "psnr_hard": 21.2}
    high = replace(SCHEDULES, temperature=Ramp(1.0, 0.5, 5_000))
    assert (
        "schedule.temperature.end (0.5 now; 0.0625 closes the gap)"
        in said(evaluation(6_000, **gap), schedules=high)["gap"]
    )
    slow = replace(SCHEDULES, temperature=Ramp(1.0, 1 / 16, 150_000))
    text = said(evaluation(STEPS, **gap), schedules=slow)["gap"]
    assert "the run ends at a temperature of 0.99" in text and "below steps (10,000)" in text


def test_tokens_that_say_nothing_are_laid_to_the_kl_weight_where_there_is_one() -> None:
    nothing = evaluation(3_000, information=0.05, perplexity=1.2, used_share=0.002)
    heavy = replace(SCHEDULES, kl_weight=Ramp(0.0, 6.6, 1_000))
    text = said(nothing, schedules=heavy)["no-information"]
    assert "0.05 of at most 6.9 nats" in text and "schedule.kl_weight.end" in text and "(6.6 now)" in text
    alone = said(nothing)
    assert list(alone) == ["no-information"], "one fault of the codes is said once"
    assert "optim.lr" in alone["no-information"] and "kl_weight" not in alone["no-information"]


def test_a_collapsed_codebook_is_told_from_an_unused_one() -> None:
    assert (
        "perplexity of 3.0 of 1,024"
        in said(evaluation(3_000, information=0.9, perplexity=3.0, used_share=0.01))["collapsed"]
    )
    few = {"information": 4.0, "perplexity": 200.0, "used_share": 0.3}
    assert said(evaluation(3_000, **few)) == {}, "more come into use while the temperature falls"
    text = said(evaluation(6_000, **few))["unused-codes"]
    assert "only 30% of the 1,024 codes" in text and "717 are dead" in text and "schedule.usage_weight" in text
    weighed = replace(SCHEDULES, usage_weight=Ramp(0.3, 0.03, 5_000))
    assert "raise schedule.usage_weight (0.03 now)" in said(evaluation(6_000, **few), schedules=weighed)["unused-codes"]


def test_few_held_out_images_do_not_make_codes_dead_but_the_training_window_can_tell() -> None:
    small = evaluation(6_000, used_share=0.3, information=4.0, num_positions=2_000)
    assert said(small) == {}
    assert said(training(5_900, used_share=0.95, num_positions=500_000), small) == {}
    assert "only 40%" in said(training(5_900, used_share=0.4, num_positions=500_000), small)["unused-codes"]


def test_dying_codes_are_told_from_the_best_evaluation_so_far() -> None:
    text = said(evaluation(1_000, used_share=0.95), evaluation(2_000, used_share=0.6, information=4.0))["dying-codes"]
    assert "60% are in use, 95% were at step 1,000" in text
    assert said(evaluation(100, used_share=0.95), evaluation(2_000, used_share=0.6)) == {}, (
        "of the first steps nothing follows"
    )


def test_a_fall_of_the_hard_psnr_must_last() -> None:
    fallen = [
        evaluation(step, psnr_hard=db, psnr_soft=db) for step, db in ((1_000, 24.1), (2_000, 22.5), (3_000, 22.3))
    ]
    assert said(*fallen[:2]) == {}
    text = said(*fallen)["falling"]
    assert "from 24.10 dB at step 1,000 to 22.30 dB" in text and "optim.lr" in text
    rising = replace(SCHEDULES, kl_weight=Ramp(0.0, 6.6, 5_000))
    assert "the KL weight rose" in said(*fallen, schedules=rising)["falling"]


def test_skipped_steps_are_counted_since_the_last_evaluation_and_forgotten_when_they_end() -> None:
    lines = [training(900, skipped=5), evaluation(1_000), training(1_900, skipped=12), evaluation(2_000)]
    text = said(*lines)["skipped-steps"]
    assert "7 steps since step 1,000 were skipped, 12 in all" in text and "optim.lr" in text
    assert said(*lines, training(2_900, skipped=12), evaluation(3_000)) == {}


def test_a_learning_rate_of_zero_with_steps_to_go_is_said() -> None:
    idle = replace(SCHEDULES, lr=Ramp(1.0, 0.0, 5_000))
    assert "with 4,000 steps to go" in said(evaluation(6_000), schedules=idle)["idle"]
    assert said(evaluation(9_900), schedules=replace(SCHEDULES, lr=Ramp(1.0, 0.0, STEPS))) == {}, "the end of a cosine"


def test_what_stands_at_the_end_is_what_the_last_change_left() -> None:
    first, then = (
        {"kind": "health", "step": step, "findings": list(found)} for step, found in ((9, [{"name": "gap"}]), (18, []))
    )
    assert standing([]) == standing([evaluation(1)]) == []
    assert standing([first, evaluation(12)]) == [{"name": "gap"}]
    assert standing([first, then]) == []


@pytest.mark.parametrize("step", [1_000, 6_000])
def test_every_finding_names_a_setting(step: int) -> None:
    awful = evaluation(
        step, psnr_soft=30.0, psnr_hard=10.0, information=0.0, perplexity=1.0, used_share=1 / K, dead_codes=K - 1
    )
    lines = [training(step, skipped=9), awful]
    for finding in findings(History(lines, SCHEDULES, STEPS, K)):
        assert isinstance(finding, Finding)
        assert any(section in finding.text for section in ("schedule.", "optim.", "model.", "precision=")), finding
    assert math.isfinite(awful["psnr_soft"])
