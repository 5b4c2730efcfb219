"""What `dvae stats` says, line by line."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from jobs.wording import counted, duration, rate, size
from pipeline.drift import MOST_BITS, NOISE_TIMES
from pipeline.failures import plain_text

if TYPE_CHECKING:
    from jobs.stats import ShardDrift, Stats

SHARDS_SHOWN = 20
FILES_SHOWN = 20
IMAGES_A_CODE = 4  # with fewer, the entropy of a place comes out too low


def stats_lines(stats: Stats) -> Iterator[str]:
    for name, value in _named(stats):
        yield f"{name:<12}{value}"
    yield from _shard_lines(stats)


def _named(stats: Stats) -> Iterator[tuple[str, str]]:
    height, width = stats.grid
    yield "run", stats.output + (" (a driver is at work: these are the parts so far)" * stats.running)
    yield "tokenizer", f"{stats.tokenizer_id} · {height}x{width} tokens of {stats.codebook_size:,} codes"
    lost = f"; {counted(stats.num_quarantined, 'shard')} quarantined" if stats.num_quarantined else ""
    yield "images", f"{stats.num_images:,} in {counted(stats.num_parts, 'part')}, {stats.num_failed:,} failed{lost}"
    if stats.num_images:
        yield (
            "size",
            f"{size(stats.part_bytes)}, {stats.part_bytes / stats.num_images:,.0f} bytes a row",
        )
        yield from _code_lines(stats)
    if stats.shard_seconds:
        per_s = stats.num_images / stats.shard_seconds
        yield "made", f"{rate(per_s)} images/s for each shard in flight, {duration(stats.shard_seconds)} of work in all"
    tokens_per_s = stats.num_tokens / max(1e-9, stats.counting_s)
    yield "counted", f"{stats.num_tokens:,} tokens in {duration(stats.counting_s)}, {tokens_per_s / 1e6:,.1f} million/s"
    for reason, count in stats.errors_by_reason.items():
        example = stats.error_examples[reason][0]
        yield "error", f"{count:,} × {reason}, as {example['key'] or example['shard']}: {example['message']}"
    yield from _missing_lines(stats)


def _code_lines(stats: Stats) -> Iterator[tuple[str, str]]:
    used, even = stats.used_codes, math.log2(stats.codebook_size)
    share = f"{used / stats.codebook_size:.1%}"
    yield "codes", f"{used:,} of {stats.codebook_size:,} used ({share}), {stats.codebook_size - used:,} dead"
    most = ", ".join(f"{code} ({uses / stats.num_tokens:.2%})" for code, uses in stats.most_used()[:5])
    yield "most used", most
    yield (
        "entropy",
        (f"{stats.entropy_bits:.2f} bits a token of {even:.2f}: as many as {stats.perplexity:,.0f} codes used alike"),
    )
    if stats.position_entropy_bits is None:
        yield "positions", "not counted: the grid times the codebook is too large, or the images are too many"
        return
    bits_HW = np.asarray(stats.position_entropy_bits)
    row, column = np.unravel_index(bits_HW.argmin(), bits_HW.shape)
    least = f"least {bits_HW.min():.2f} at row {row}, column {column}"
    constant = f"; {num:,} never change" if (num := int((bits_HW == 0).sum())) else ""
    few = "; too few images to tell" if stats.num_images < IMAGES_A_CODE * stats.codebook_size else ""
    yield "positions", f"{bits_HW.mean():.2f} bits on average, {least}, most {bits_HW.max():.2f}{constant}{few}"


def _missing_lines(stats: Stats) -> Iterator[tuple[str, str]]:
    if stats.missing_parts:
        count, first = len(stats.missing_parts), stats.missing_parts[0]
        yield "missing", f"{counted(count, 'part')} that the ledger has, and that are gone or torn, as {first}"
    if stats.missing_errors:
        count, first = len(stats.missing_errors), stats.missing_errors[0]
        yield "missing", f"{counted(count, 'errors file')} of which the ledger knows, as {first}"
    for url, problem in list(stats.unreadable.items())[:FILES_SHOWN]:
        yield "unreadable", problem if url in problem else f"{url}: {problem}"
    if (hidden := stats.num_unreadable - FILES_SHOWN) > 0:
        yield "", f"and {hidden:,} more: --json lists {len(stats.unreadable):,}"
    if stats.num_lost:
        yield "", f"dvae verify {stats.output} says what to do about them"


def _shard_lines(stats: Stats) -> Iterator[str]:
    if not stats.num_standing_out:
        yield f"{'shards':<12}{none_stands_out(stats)}"
        return
    yield f"{'shards':<12}{stats.num_standing_out:,} of {stats.num_parts:,} stand out in their use of the codes:"
    yield f"{'':<12}{'bits away':>10}{'limit':>10}{'chance':>10}{'images':>12}  shard"
    for shard in stats.shards[: min(SHARDS_SHOWN, stats.num_standing_out)]:
        yield f"{'':<12}{_shard_line(shard)}"
    if (hidden := stats.num_standing_out - SHARDS_SHOWN) > 0:
        yield f"{'':<12}and {hidden:,} more: --json lists them"
    yield f"{'':<12}another model or normalisation, or other images: dvae show, dvae verify --sample"


def can_be_told(stats: Stats) -> bool:
    """Whether enough is there to say that no shard stands out."""
    return len(stats.shards) > 2 and stats.num_untold <= stats.num_parts // 2


def none_stands_out(stats: Stats) -> str:
    """Said where no shard stands out, or none can be told to."""
    if len(stats.shards) < 2:
        return "nothing to hold against each other yet"
    furthest = stats.shards[0]
    bits, chance = f"{furthest.divergence_bits:.4f}", f"{furthest.noise_bits:.4f}"
    if len(stats.shards) == 2:
        return f"two are {bits} bits apart, by chance alone it would be {chance}; which of them is odd cannot be told"
    untold = f"{_why_untold(stats)} in {stats.num_untold:,} of {counted(stats.num_parts, 'shard')}"
    if not can_be_told(stats):
        return untold
    nearest = (
        f"none stands out: the nearest to its limit of {furthest.threshold_bits:.4f} bits is {bits} away from the "
        f"others; by chance alone it would be {chance}"
    )
    return f"{nearest}; {untold}" if stats.num_untold else nearest


def _why_untold(stats: Stats) -> str:
    """By the middle one of those whose limits tell nothing, or of all."""
    high = [shard for shard in stats.shards if shard.threshold_bits > MOST_BITS] or stats.shards
    middle = high[len(high) // 2]
    if NOISE_TIMES * middle.noise_bits > middle.threshold_bits / 2:
        return "too few images to tell"
    return "images too unlike those of other shards to tell another model by them"


def _shard_line(shard: ShardDrift) -> str:
    bits = f"{shard.divergence_bits:>10.4f}{shard.threshold_bits:>10.4f}{shard.noise_bits:>10.4f}"
    return f"{bits}{shard.num_images:>12,}  {plain_text(shard.shard) or shard.part}"
