"""What is wrong with a training run, in words: the figure, the likely cause, and the setting to change.

Pure functions of metrics.jsonl's lines and of the run's settings. They are asked at every evaluation, and are made
to stay silent while the schedules explain a figure: a gap to argmax is no fault before the temperature is down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.config import ScheduleConfig
from model.schedules import ramp_at

Line = Mapping[str, Any]  # of metrics.jsonl

EARLY_SHARE = 0.1  # of the temperature's ramp, or of a shorter run: before that nothing is said of codes,
EARLY_STEPS = 100  # nor before this
GAP_DB = 0.5  # soft above hard
FALL_DB = 1.0  # of the hard PSNR, below its best, twice in a row
USED_SHARE = 0.5  # of the codes, once the temperature is down
FALL_OF_USE = 0.7  # of the best so far
COLLAPSED_SHARE = 0.005  # of the codes: a perplexity below that, or below 2
INFORMATION_SHARE = 0.03  # of ln K nats
IDLE_RATE = 1e-3  # of optim.lr
REST_SHARE = 0.05  # of the steps: what a learning rate near 0 may leave at the end
POSITIONS_PER_CODE = 4  # fewer cannot tell which codes are dead
DALLE_TEMPERATURE = 1 / 16


@dataclass(frozen=True)
class Finding:
    """`name` stays the same while the fault lasts; `text` has the figures of the moment."""

    name: str
    text: str


@dataclass(frozen=True)
class History:
    """A run up to its newest evaluation."""

    lines: Sequence[Line]
    schedules: ScheduleConfig
    steps: int
    codebook_size: int

    @property
    def evals(self) -> list[Line]:
        return [line for line in self.lines if line["kind"] == "eval"]

    @property
    def trains(self) -> list[Line]:
        return [line for line in self.lines if line["kind"] == "train"]

    @property
    def now(self) -> Line:
        return self.evals[-1]

    @property
    def step(self) -> int:
        return int(self.now["step"])

    @property
    def before(self) -> list[Line]:
        """Earlier evaluations, less those of the first steps."""
        return [line for line in self.evals[:-1] if self.has_begun(line["step"])]

    def has_begun(self, step: int) -> bool:
        ramp = EARLY_SHARE * min(self.steps, self.schedules.temperature.steps)
        return step >= min(self.steps, max(EARLY_STEPS, ramp))

    @property
    def is_settled(self) -> bool:
        """The temperature is where it ends, or the run does."""
        return self.step >= min(self.steps, self.schedules.temperature.steps)


def findings(history: History) -> tuple[Finding, ...]:
    """All that is to be said at the newest evaluation, the gravest first."""
    if not history.evals:
        return ()
    found = (rule(history) for rule in RULES)
    return tuple(finding for finding in found if finding is not None)


def standing(lines: Sequence[Line]) -> list[dict[str, str]]:
    """The findings that hold at the end of metrics.jsonl, as it has them: each change of them is a line of its own."""
    newest = next((line for line in reversed(lines) if line["kind"] == "health"), None)
    return [] if newest is None else list(newest["findings"])


def _skipped(run: History) -> Finding | None:
    since = run.evals[-2]["step"] if len(run.evals) > 1 else 0
    lines = run.trains
    total = int(lines[-1]["skipped_steps"]) if lines else 0
    known = max((int(line["skipped_steps"]) for line in lines if line["step"] <= since), default=0)
    if total <= known:
        return None
    return Finding(
        "skipped-steps",
        f"{total - known:,} steps since step {since:,} were skipped, {total:,} in all, for their loss or gradient was "
        "not finite: lower optim.lr or optim.grad_clip, or set precision=fp32",
    )


def _codes(run: History) -> Finding | None:
    """One of: nothing in the tokens, nearly one code for all, codes dying, many never used."""
    if not run.has_begun(run.step):
        return None
    return _no_information(run) or _collapsed(run) or _unused(run) or _dying(run)


def _no_information(run: History) -> Finding | None:
    found, most = float(run.now["information"]), math.log(run.codebook_size)
    if found >= INFORMATION_SHARE * most:
        return None
    weight = ramp_at(run.schedules.kl_weight, run.step)
    remedy = (
        f"the KL weight outweighs the pixels ({weight:.3g} now), so lower schedule.kl_weight.end or let it rise over "
        "more steps; or, where it is next to nothing, the run is too short or optim.lr wrong"
        if weight
        else "the encoder learnt nothing, so lower optim.lr, or give schedule.lr a warmup, or the run more steps"
    )
    return Finding(
        "no-information",
        f"the tokens say next to nothing of their image, {found:.2f} of at most {most:.1f} nats a position: {remedy}",
    )


def _collapsed(run: History) -> Finding | None:
    perplexity = float(run.now["perplexity"])
    if perplexity >= max(2.0, COLLAPSED_SHARE * run.codebook_size):
        return None
    return Finding(
        "collapsed",
        f"the codebook has collapsed: a perplexity of {perplexity:.1f} of {run.codebook_size:,} codes; "
        f"{_more_use(run)}",
    )


def _unused(run: History) -> Finding | None:
    used = _used_share(run)
    if not run.is_settled or used is None or used >= USED_SHARE:
        return None
    dead = round((1 - used) * run.codebook_size)
    return Finding(
        "unused-codes",
        f"only {used:.0%} of the {run.codebook_size:,} codes are in use, {dead:,} are dead: {_more_use(run)}, or take "
        "a smaller model.codebook_size",
    )


def _dying(run: History) -> Finding | None:
    best = max(run.before, key=lambda line: float(line["used_share"]), default=None)
    now = float(run.now["used_share"])
    if best is None or now >= FALL_OF_USE * best["used_share"]:
        return None
    return Finding(
        "dying-codes",
        f"codes are dying: {now:.0%} are in use, {best['used_share']:.0%} were at step {best['step']:,}; "
        f"{_more_use(run)}",
    )


def _used_share(run: History) -> float | None:
    """The larger of the held-out images' and the training window's: few images cannot show all codes. None: even
    together they are too few to tell."""
    window = run.trains[-1] if run.trains else {}
    shares = [
        float(line["used_share"])
        for line in (run.now, window)
        if line.get("num_positions", 0) >= POSITIONS_PER_CODE * run.codebook_size
    ]
    return max(shares, default=None)


def _more_use(run: History) -> str:
    """What brings codes back."""
    now, most = ramp_at(run.schedules.usage_weight, run.step), math.log(run.codebook_size)
    if ramp_at(run.schedules.kl_weight, run.step) and run.now["information"] < 0.2 * most:
        return "the KL weight squeezes them: lower schedule.kl_weight.end"
    if now:
        return f"raise schedule.usage_weight ({now:g} now), or lower optim.lr"
    return "set schedule.usage_weight (start 0.3, end 0.03 keeps codes in use), or lower optim.lr"


def _gap(run: History) -> Finding | None:
    gap_db, ramp = float(run.now["psnr_soft"]) - float(run.now["psnr_hard"]), run.schedules.temperature
    if not run.is_settled or gap_db <= GAP_DB:
        return None
    if run.step < ramp.steps:
        remedy = (
            f"the run ends at a temperature of {ramp_at(ramp, run.step):.3g}, before its end of {ramp.end:g}: lower "
            f"schedule.temperature.steps ({ramp.steps:,}) below steps ({run.steps:,}), or raise steps"
        )
    elif ramp.end > 1.01 * DALLE_TEMPERATURE:
        remedy = (
            f"anneal longer, or lower schedule.temperature.end ({ramp.end:g} now; {DALLE_TEMPERATURE:g} closes the gap)"
        )
    else:
        remedy = f"anneal longer: raise schedule.temperature.steps ({ramp.steps:,} now), and steps with it"
    return Finding(
        "gap",
        f"the hard reconstruction is {gap_db:.1f} dB below the soft one, the decoder relies on mixtures of codes: "
        f"{remedy}",
    )


def _falling(run: History) -> Finding | None:
    before = run.before
    if len(before) < 2:
        return None
    best = max(before, key=lambda line: float(line["psnr_hard"]))
    bar = float(best["psnr_hard"]) - FALL_DB
    now = float(run.now["psnr_hard"])
    if now > bar or float(before[-1]["psnr_hard"]) > bar:
        return None
    then, weight = ramp_at(run.schedules.kl_weight, best["step"]), ramp_at(run.schedules.kl_weight, run.step)
    remedy = (
        f"the KL weight rose from {then:.3g} to {weight:.3g} since: lower schedule.kl_weight.end"
        if weight > 1.05 * then
        else "lower optim.lr or optim.grad_clip"
    )
    return Finding(
        "falling",
        f"the hard PSNR fell from {best['psnr_hard']:.2f} dB at step {best['step']:,} to {now:.2f} dB: {remedy}",
    )


def _idle(run: History) -> Finding | None:
    ramp, left = run.schedules.lr, run.steps - run.step
    rate = ramp_at(ramp, run.step) / max(ramp.start, ramp.end, 1e-12)
    if rate >= IDLE_RATE or left <= REST_SHARE * run.steps or run.step <= ramp.warmup:
        return None
    return Finding(
        "idle",
        f"the learning rate is {rate:.2%} of its highest with {left:,} steps to go, so nothing more is learnt: raise "
        f"schedule.lr.end ({ramp.end:g} now), or schedule.lr.steps ({ramp.steps:,} now)",
    )


RULES: tuple[Callable[[History], Finding | None], ...] = (_skipped, _codes, _falling, _gap, _idle)
