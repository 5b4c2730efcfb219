"""The page about a run: what was counted and read of it, put into words, charts and tables."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jobs.report_charts import bar_chart, grid_map
from jobs.report_pace import Pace
from jobs.report_page import Chart, Check, Figure, Report, Snippet, Table, TilePair
from jobs.report_pieces import READING_NOTE, back_into_pictures, code_use_chart, reading_lines
from jobs.stats import ShardDrift, Stats
from jobs.stats_text import can_be_told, none_stands_out
from jobs.status import Status
from jobs.wording import counted, duration, rate, size
from pipeline import storage
from pipeline.failures import plain_text

SHARDS_SHOWN = 20
SHARD_BARS = 100
MAP_SIDE = 32  # squares; a larger grid is shown by means of neighbours


@dataclass(frozen=True)
class RunFacts:
    """All that the page is made of."""

    stats: Stats
    status: Status
    pace: Pace | None
    tiles: tuple[TilePair, ...]
    tile_problems: tuple[str, ...]
    lineage: tuple[tuple[str, str], ...]
    columns: tuple[str, ...]
    checkpoint: str | None
    max_failed_samples: float | None  # a share, as the last driver was told; None where nobody knows


def make_page(facts: RunFacts) -> Report:
    stats = facts.stats
    return Report(
        title=f"Tokens of {storage.base_name(stats.output)}",
        subtitle=_subtitle(facts),
        figures=tuple(_figures(facts)),
        checks=tuple(_checks(facts)),
        tiles_title="Some of its images",
        tiles=facts.tiles,
        tiles_note=_tiles_note(facts),
        charts_title="The run, and its use of the codes",
        charts=tuple(_charts(facts)),
        tables=tuple(_tables(facts)),
        snippets=tuple(_snippets(facts)),
        reading_note=READING_NOTE,
    )


def _subtitle(facts: RunFacts) -> str:
    height, width = facts.stats.grid
    state = {"complete": "Complete", "running": "A driver is at work", "stopped": "Not complete, and nobody at work"}
    return (
        f"{state[facts.status.state]}. {facts.stats.output} holds {height} × {width} tokens of each image, of "
        f"{facts.stats.codebook_size:,} codes, made by tokenizer {facts.stats.tokenizer_id}."
    )


def _figures(facts: RunFacts) -> Iterator[Figure]:
    stats, status = facts.stats, facts.status
    yield Figure(f"{stats.num_images:,}", f"images tokenised, in {counted(stats.num_parts, 'part')}")
    yield Figure(f"{stats.num_failed:,}", "images failed, each with its reason")
    if status.num_shards:
        yield Figure(f"{status.num_done:,} of {status.num_shards:,}", "shards done")
    if not stats.num_images:
        return
    used = stats.used_codes / stats.codebook_size
    yield Figure(f"{used:.1%}", f"of the codes used; {stats.codebook_size - stats.used_codes:,} dead")
    yield Figure(f"{stats.entropy_bits:.2f} bits", f"a token, of {math.log2(stats.codebook_size):.2f}")
    yield Figure(f"{stats.perplexity:,.0f}", "codes used alike would say as much: the perplexity")
    yield Figure(f"{stats.part_bytes / stats.num_images:,.0f} B", "of Parquet a row, keys and captions included")
    yield Figure(size(stats.part_bytes), "in all")
    if stats.shard_seconds:
        per_s = rate(stats.num_images / stats.shard_seconds)
        yield Figure(f"{per_s} /s", f"images for each shard in flight; {duration(stats.shard_seconds)} of work")


def _checks(facts: RunFacts) -> Iterator[Check]:
    stats, status = facts.stats, facts.status
    if status.state != "running":
        planned = f" of {status.num_shards:,}" if status.num_shards else ""
        done = f"{status.num_done:,}{planned} done, {status.num_quarantined:,} quarantined"
        yield Check("Every shard is accounted for", status.state == "complete", done)
    yield _budget_check(stats, facts.max_failed_samples)
    yield Check("No shard was given up", not status.num_quarantined, f"{status.num_quarantined:,} quarantined")
    yield _files_check(stats)
    yield _drift_check(stats)


def _budget_check(stats: Stats, allowed: float | None) -> Check:
    share = stats.num_failed / max(1, stats.num_images + stats.num_failed)
    limit = "what the run allows is not known" if allowed is None else f"max_failed_samples allows {allowed:.2%}"
    passed = None if allowed is None and stats.num_failed else share <= (allowed or 0.0)
    found = f"{stats.num_failed:,} failed, {share:.2%} of all; {limit}"
    return Check("No more images failed than the run allows", passed, found)


def _files_check(stats: Stats) -> Check:
    claim = "Every file is there, and every token can be read"
    if not stats.num_lost:
        return Check(claim, True, "every page of tokens was read; dvae verify reads the rest")
    first = next(iter([*stats.unreadable.values(), *stats.missing_parts, *stats.missing_errors]), "")
    return Check(claim, False, f"{counted(stats.num_lost, 'file')} missing or damaged, as {_text(first)}")


def _drift_check(stats: Stats) -> Check:
    claim = "No shard stands out in its use of the codes"
    if not stats.num_standing_out:
        return Check(claim, True if can_be_told(stats) else None, none_stands_out(stats))
    found = f"{stats.num_standing_out:,} of {stats.num_parts:,} do: another model, or other images"
    return Check(claim, None, found, otherwise="look at")


def _tiles_note(facts: RunFacts) -> str:
    """Empty, so that there is no such section, where there is nothing to say."""
    both = "From all over the run: left what the encoder saw, right what the decoder makes of the tokens alone."
    alone = "From all over the run, as the encoder saw them; --checkpoint shows what their tokens say beside them."
    note = [] if not facts.tiles else [both if any(tile.note for tile in facts.tiles) else alone]
    problems = [_text(problem) for problem in facts.tile_problems[:3]]
    return " ".join([*note, *(f"Not shown: {problem}." for problem in problems)])


def _charts(facts: RunFacts) -> Iterator[Chart]:
    stats = facts.stats
    if facts.pace is not None:
        yield _pace_chart(facts.pace)
    if stats.num_images:
        yield code_use_chart(np.asarray(stats.code_uses), f"in {stats.num_images:,} images")
    if stats.num_images and stats.position_entropy_bits is not None:
        yield _position_chart(stats.position_entropy_bits)
    if stats.shards:
        yield _shard_chart(stats)


def _pace_chart(pace: Pace) -> Chart:
    step = pace.length / len(pace.images_per_s)
    titles = [f"{n * step:.3g} {pace.unit}: {rate(per_s)} images/s" for n, per_s in enumerate(pace.images_per_s)]
    svg = bar_chart(pace.images_per_s, titles, x_label=pace.unit, y_label="images/s", x_to=pace.length)
    return Chart(
        svg,
        f"Images a second from {pace.first_at:%Y-%m-%d %H:%M} to {pace.last_at:%Y-%m-%d %H:%M} UTC, by when the store "
        "says each part was written. (A copy of an output has the times of its copying.)",
    )


def _position_chart(bits: list[list[float]]) -> Chart:
    bits_HW = np.asarray(bits)
    step = -(-max(bits_HW.shape) // MAP_SIDE)
    rows, columns = (range(0, length, step) for length in bits_HW.shape)
    means = [[float(bits_HW[r : r + step, c : c + step].mean()) for c in columns] for r in rows]
    svg = grid_map(means, label="bits a token")
    return Chart(svg, "Entropy of each place in the grid. Pale places say less: few codes, or one far more often.")


def _shard_chart(stats: Stats) -> Chart:
    shown = stats.shards[:SHARD_BARS]
    titles = [f"{_name(shard)}: {shard.divergence_bits:.4f} bits, limit {shard.threshold_bits:.4f}" for shard in shown]
    svg = bar_chart(
        [shard.divergence_bits for shard in shown],
        titles,
        x_label="shards, the furthest above its limit first",
        y_label="bits",
        limits=[shard.threshold_bits for shard in shown],
    )
    every = len(shown) == stats.num_parts
    which = "each shard is" if every else f"each of these {len(shown):,} shards is"
    odd = f"red where it is above: {stats.num_standing_out:,} of {stats.num_parts:,}"
    told = f"A line across a bar is its limit, where it is not far above all; {odd}." if len(stats.shards) > 2 else ""
    return Chart(
        svg,
        f"How far {which} from the others in the use of codes (Jensen-Shannon divergence: 0 alike, 1 no code in "
        f"common). {told}".rstrip(),
    )


def _tables(facts: RunFacts) -> Iterator[Table]:
    yield from _odd_shards(facts.stats)
    yield from _failures(facts.stats)
    yield from _quarantined(facts.status)
    yield Table("Where the tokens come from", (), tuple((name, _text(value)) for name, value in facts.lineage if value))


def _odd_shards(stats: Stats) -> Iterator[Table]:
    odd = [shard for shard in stats.shards if shard.stands_out][:SHARDS_SHOWN]
    if not odd:
        return
    rows = tuple(
        (_name(one), f"{one.num_images:,}", *(f"{bits:.4f}" for bits in (one.divergence_bits, one.threshold_bits)))
        for one in odd
    )
    yield Table(
        "Shards that stand out in their use of the codes",
        ("shard", "images", "bits away", "limit"),
        rows,
        note=f"{stats.num_standing_out:,} of {stats.num_parts:,}: made by another model or with another normalisation, "
        "or of other images. dvae show and dvae verify --sample tell which.",
        numbers=frozenset({1, 2, 3}),
    )


def _failures(stats: Stats) -> Iterator[Table]:
    rows = tuple(
        (
            reason if not n else "",
            f"{count:,}" if not n else "",
            _text(example["key"] or example["shard"]),
            example["message"],
        )
        for reason, count in stats.errors_by_reason.items()
        for n, example in enumerate(stats.error_examples[reason])
    )
    if rows:
        note = "An image counts once, and so does a quarantined shard, however many images it holds; errors/ has each "
        note += "one with its place and message."
        columns = ("reason", "failures", "for example", "what was found")
        yield Table("Failures by reason", columns, rows, note=note, numbers=frozenset({1}))


def _quarantined(status: Status) -> Iterator[Table]:
    rows = tuple(
        tuple(_text(one[name]) for name in ("shard", "reason", "message")) for one in status.quarantined[:SHARDS_SHOWN]
    )
    if rows:
        note = f"{counted(status.num_quarantined, 'shard')} given up; the same command tries them again."
        yield Table("Quarantined shards", ("shard", "reason", "message"), rows, note=note)


def _snippets(facts: RunFacts) -> Iterator[Snippet]:
    columns = ", ".join(["key", *(["caption"] if "caption" in facts.columns else []), "tokens"])
    yield from reading_lines(facts.stats.output, columns)
    if facts.checkpoint:
        yield back_into_pictures(facts.stats.output, facts.checkpoint)


def _name(shard: ShardDrift) -> str:
    return _text(shard.shard or shard.part)


def _text(text: str | None) -> str:
    """Of others, for the page: without credentials, in one line."""
    return plain_text(storage.public_text(text or "")) or ""
