"""What to set, and why, from measured figures alone. Pure: the same figures, the same advice."""

from __future__ import annotations

import math
from collections.abc import Iterator

from jobs.bench_figures import ENCODE, RAY, Figures
from jobs.wording import rate, size

NEAR = 0.97  # of the best rate: as good, within what such a measurement can tell
BUSY_SHARE = 0.25  # of the cores, wanted by others: too much to measure beside
WORTH = 1.03  # times as fast: less than that is no reason to change anything
BUSY = 0.9  # an encoder that has work for so much of the time is the limit
SPARE = 1.2  # more of what feeds another than it needs on the average
ENOUGH = 0.85  # of the ideal: nothing to complain about


def advice(figures: Figures) -> list[str]:
    """One sentence or two each, the most worth first."""
    return [
        *_company(figures),
        *_limit(figures),
        *_cores_for_gpus(figures),
        *_actors(figures),
        *_batch_size(figures),
        *_reading(figures),
    ]


def _company(figures: Figures) -> Iterator[str]:
    """What others take of the cores makes rates by the clock smaller, and CPU seconds hardly."""
    if figures.load > BUSY_SHARE * figures.setting.cores:
        yield (
            f"Other work was on this machine (load {figures.load:.1f} on {figures.setting.cores} cores): the rates are "
            "of what it left, the ideal is of all cores. Measure again when it is quiet."
        )


def _limit(figures: Figures) -> Iterator[str]:
    """Which side waits for the other."""
    times, setting = figures.times, figures.setting
    busy = times.encoder_busy
    if setting.on_gpu and busy >= BUSY:
        yield f"The GPUs are the limit: they have work {busy:.0%} of the time, and the cores keep up."
    elif setting.on_gpu:
        waited = times.read_s + times.pixels_s
        what = "bytes (reading)" if times.read_s > 0.5 * waited else "pixels (decoding)"
        yield f"The GPUs are starved: they have work {busy:.0%} of the time, and wait for {what}."
    elif figures.share(RAY) >= ENOUGH:
        yield f"The cores are the limit, and well used: {_heaviest(figures)}."
    elif setting.is_free:
        yield f"The pipeline reaches {figures.share(RAY):.0%} of what the cores could do; {_heaviest(figures)}."
    else:
        yield (
            f"The run reaches {figures.share(RAY):.0%} of what the cores could do; its encoders have work {busy:.0%} "
            f"of the time; {_heaviest(figures)}."
        )


def _heaviest(figures: Figures) -> str:
    costs = {
        "reading": figures.cpu.read_s,
        "decoding": figures.cpu.decode_s,
        "encoding": figures.cpu.encode_s,
        "writing": figures.cpu.write_s,
    }
    name = max(costs, key=lambda stage: costs[stage])
    return f"{name} takes {costs[name] / figures.cpu.total_s:.0%} of the CPU time"


def _cores_for_gpus(figures: Figures) -> Iterator[str]:
    setting = figures.setting
    if not setting.on_gpu:
        return
    per_actor = figures.rates[ENCODE].median / setting.num_actors
    wanted, there = per_actor * figures.core_s, setting.cores / setting.num_actors
    line = (
        f"An actor encodes {rate(per_actor)} images/s, a core reads, decodes and writes {rate(1 / figures.core_s)}: "
        f"{wanted:.1f} cores keep an actor busy, this machine has {there:.1f}."
    )
    if wanted * SPARE <= there:
        threads = math.ceil(wanted * SPARE)
        enough = setting.decodes_in_tasks or setting.decode_threads >= threads
        yield f"{line} " + (
            "Its decode threads are enough."
            if enough
            else f"Set ray.decode_threads={threads} (now {setting.decode_threads})."
        )
    else:
        more = math.ceil((wanted * SPARE - there) * setting.num_actors)
        yield (
            f"{line} About {more:,} more on other machines of a cluster would keep all of them busy: they decode in "
            "tasks (ray.decode: auto takes them)."
        )


def _actors(figures: Figures) -> Iterator[str]:
    """Of a machine whose cores do everything."""
    setting = figures.setting
    if setting.on_gpu:
        return
    used = setting.num_actors * setting.threads
    if used > setting.cores:
        yield (
            f"{setting.num_actors} actors with {setting.threads} torch threads each are more than {setting.cores} "
            f"cores: set ray.num_actors={max(1, setting.cores // setting.threads)}."
        )
    elif figures.rates[ENCODE].median < figures.ideal and used < setting.cores:
        wanted = min(setting.cores // setting.threads, math.ceil(figures.ideal * figures.wall.encode_s))
        if wanted > setting.num_actors:
            yield (
                f"{setting.num_actors} actors encode {rate(figures.rates[ENCODE].median)} images/s while cores are "
                f"left: set ray.num_actors={wanted}."
            )


def _batch_size(figures: Figures) -> Iterator[str]:
    now, tried = figures.setting.batch_size, {one.batch_size: one.images_per_s for one in figures.sweep}
    rates = {batch: images_per_s for batch, images_per_s in tried.items() if images_per_s is not None}
    if now not in rates or len(rates) < 2:
        return
    good = min(batch for batch, images_per_s in rates.items() if images_per_s >= NEAR * max(rates.values()))
    faster, gain = rates[good] / rates[now], _gain(figures, rates[good] / rates[now])
    if gain < WORTH:
        limit = (
            ""
            if faster < WORTH
            else f" ({good} encodes {faster:.2f} times as fast, which changes little for the whole)"
        )
        yield f"batch_size={now} is right{limit}."
        return
    yield (
        f"batch_size={good} encodes {faster:.2f} times as fast, the whole {gain:.2f} times "
        f"({_memory(figures, good)}). It belongs to an output's numerics: one that was begun keeps its own."
    )


def _gain(figures: Figures, faster: float) -> float:
    """Of the ideal, by an encoder that is so much faster."""
    if figures.setting.on_gpu:
        return min(figures.cores_rate, faster * figures.rates[ENCODE].median) / figures.ideal
    return figures.core_s / (figures.core_s - figures.cpu.encode_s * (1 - 1 / faster))


def _memory(figures: Figures, batch_size: int) -> str:
    """Pixels of an actor: of each open shard one batch at the encoder and two decoded ahead."""
    held = 3 * figures.setting.shards_in_flight * figures.setting.batch_bytes
    return f"{size(held * batch_size / figures.setting.batch_size)} of pixels in an actor, now {size(held)}"


def _reading(figures: Figures) -> Iterator[str]:
    """A stream of a shard gives so many images a second, however fast the cores are."""
    setting = figures.setting
    streams = setting.num_actors * setting.shards_in_flight
    if streams / figures.source_read_s < SPARE * figures.ideal:
        wanted = math.ceil(SPARE * figures.ideal * figures.source_read_s / setting.num_actors)
        yield (
            f"Reading is slow: a shard's stream gives {rate(1 / figures.source_read_s)} images/s, {streams} of them "
            f"{rate(streams / figures.source_read_s)}. Set ray.shards_in_flight={wanted}."
        )
