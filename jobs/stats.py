"""`dvae stats`: how a run uses its codes, which shards are unlike the others, and what failed. Reads storage only;
imports Ray where it is asked to count on a cluster, and never torch."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console

from jobs.progress import JobProgress
from jobs.stats_text import stats_lines
from jobs.writable import require_folder_place
from pipeline import storage
from pipeline.drift import Drift, drift_of, entropy_bits
from pipeline.failures import Failures, plain_text, read_failures
from pipeline.lease import is_held
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix, listed, part_name
from pipeline.plan import collector_paused
from pipeline.records import ShardResult, ShardState
from pipeline.token_run import Part, TokenRun
from pipeline.token_stats import TokenCounts, count_parts, number_of_groups

MOST_SHARDS = 1000  # that are named in JSON
MOST_USED = 10


@dataclass(frozen=True)
class ShardDrift:
    """Bits: how far a shard's use of the codes is from that of the others, what chance would give, and the limit (1:
    nothing can be told)."""

    shard: str | None  # None in a part that holds several
    part: str
    num_images: int
    divergence_bits: float
    noise_bits: float
    threshold_bits: float

    @property
    def stands_out(self) -> bool:
        return self.divergence_bits > self.threshold_bits


@dataclass(frozen=True)
class Stats:
    """Counts are of the parts that were committed when the counting began. Entropies are of order 0, in bits."""

    output: str
    tokenizer_id: str
    grid: tuple[int, int]
    codebook_size: int
    running: bool  # a driver is at work
    num_parts: int
    num_images: int
    part_bytes: int
    num_failed: int  # images; as many as the errors files have, or the ledger where that is more
    num_quarantined: int  # shards, likewise
    shard_seconds: float  # of work, by all done shards together
    code_uses: list[int]
    entropy_bits: float
    position_entropy_bits: list[list[float]] | None  # by row and column of the grid; None for too large a codebook
    num_groups: int  # of codes, by which shards are held against each other
    clumping: float  # so many tokens of an image say as much as one chosen freely
    num_standing_out: int
    num_untold: int  # shards whose limit is so high that it tells nothing
    shards: list[ShardDrift]  # the furthest above its limit first, or nearest below it; MOST_SHARDS at most
    errors_by_reason: dict[str, int]
    error_examples: dict[str, list[dict[str, Any]]]
    num_unreadable: int  # files
    unreadable: dict[str, str]  # those files, and why; failures.MOST_NAMED at most
    missing_parts: list[str]  # that the ledger has, and that are gone or torn
    missing_errors: list[str]  # names of errors files that there must be by the ledger
    counting_s: float

    @property
    def num_lost(self) -> int:
        """Files that could not be read, or are not there."""
        return self.num_unreadable + len(self.missing_parts) + len(self.missing_errors)

    @property
    def used_codes(self) -> int:
        return sum(uses > 0 for uses in self.code_uses)

    @property
    def perplexity(self) -> float:
        return float(2**self.entropy_bits)

    @property
    def num_tokens(self) -> int:
        return self.num_images * math.prod(self.grid)

    def most_used(self) -> list[tuple[int, int]]:
        """(code, uses)."""
        order = np.argsort(-np.asarray(self.code_uses), kind="stable")[:MOST_USED]
        return [(int(code), self.code_uses[code]) for code in order if self.code_uses[code]]

    def to_json(self) -> dict[str, Any]:
        used = self.used_codes
        derived = {"used_codes": used, "dead_codes": self.codebook_size - used, "perplexity": round(self.perplexity, 3)}
        return {**derived, **asdict(self)}


def run_stats(output_url: str, *, as_json: bool, plots: str | None = None, ray_address: str | None = None) -> int:
    """0, or 1 when files are missing or could not be read. Raises NoRun, RunMismatch, StorageError, ClusterError."""
    if plots is not None:
        require_folder_place(plots)
    stats = read_stats(TokenRun.open(output_url), ray_address=ray_address)
    console = Console(soft_wrap=True, highlight=False)
    if as_json:
        sys.stdout.write(json.dumps(stats.to_json()) + "\n")  # Rich would take ten seconds to colour 262,144 counts
    else:
        for line in stats_lines(stats):
            console.print(line, markup=False)
    if plots is not None:
        from jobs.stats_plots import write_plots

        write_plots(stats, plots)
    return 1 if stats.num_lost else 0


def read_stats(run: TokenRun, *, ray_address: str | None = None) -> Stats:
    """One pass over all token rows, then one over the errors files."""
    begun_at = time.monotonic()
    failures = Failures()
    counts = _counted(run, ray_address, failures)
    counting_s = time.monotonic() - begun_at
    drift = drift_of(counts.groups_PG, counts.halves_P, run.table.num_tokens)
    running, errors_files = is_held(run.output), listed(run.output.errors_folder())
    _read_errors([info.url for _, info in sorted(errors_files.items())], failures)
    recorded = _recorded(run.output)
    return Stats(
        output=storage.public_url(run.output.url),
        tokenizer_id=run.table.tokenizer_id,
        grid=run.table.grid,
        codebook_size=run.table.codebook_size,
        running=running,
        num_parts=len(run.parts),
        num_images=int(counts.num_rows_P.sum()),
        part_bytes=sum(part.size_bytes for part in run.parts),
        num_failed=max(failures.num_images, recorded.num_failed),
        num_quarantined=max(failures.num_shards, recorded.num_quarantined),
        shard_seconds=recorded.shard_seconds,
        code_uses=counts.uses_K.tolist(),
        entropy_bits=round(float(entropy_bits(counts.uses_K[None])[0]), 6),
        position_entropy_bits=_position_bits(counts, run.table.grid),
        num_groups=counts.groups_PG.shape[1],
        clumping=round(drift.clumping, 3),
        num_standing_out=len(drift.standing_out()),
        num_untold=drift.num_untold(),
        shards=list(_shards(run.parts, counts, drift)),
        errors_by_reason=dict(failures.most_frequent()),
        error_examples=failures.examples,
        num_unreadable=failures.num_unreadable,
        unreadable=failures.unreadable,
        missing_parts=list(run.missing),
        missing_errors=[] if running else sorted(recorded.errors_files - errors_files.keys()),
        counting_s=round(counting_s, 3),
    )


def _counted(run: TokenRun, ray_address: str | None, failures: Failures) -> TokenCounts:
    """Tells `failures` which parts could not be read to their end, and why."""
    if ray_address is not None:
        from jobs.stats_ray import count_on_ray

        count: Callable[[TokenRun, TokenCounts], Iterator[tuple[int, str]]] = count_on_ray(ray_address)
    else:
        count = count_here
    counts = TokenCounts(run.table, len(run.parts), number_of_groups(run.table, len(run.parts), run.num_rows))
    num_rows = 0
    with JobProgress("parts", len(run.parts)) as progress:
        for number, problem in count(run, counts):
            num_rows += int(counts.num_rows_P[number])
            progress.advance(1, f"{num_rows:,} images")
            if problem:
                failures.leave_out(storage.public_url(run.parts[number].url), plain_text(problem) or "")
    return counts


def count_here(run: TokenRun, counts: TokenCounts) -> Iterator[tuple[int, str]]:
    return count_parts(run, run.parts, counts)


def _read_errors(urls: Sequence[str], failures: Failures) -> None:
    with JobProgress("errors files", len(urls)) as progress:
        for num_read in read_failures(urls, failures):
            progress.advance(num_read, f"{sum(failures.counts.values()):,} rows")


@dataclass(frozen=True)
class _Recorded:
    """What the ledger says, and the names of the errors files that there must be if it is right."""

    num_failed: int
    num_quarantined: int
    shard_seconds: float
    errors_files: frozenset[str]


def _recorded(output: OutputPrefix) -> _Recorded:
    with collector_paused():
        rows: list[ShardResult] = list(Ledger(output).read().values())
    done = [row for row in rows if row.state is ShardState.DONE]
    lost = [row for row in rows if row.state is ShardState.QUARANTINED]
    failed = [row for row in done if row.num_failed]
    return _Recorded(
        num_failed=sum(row.num_failed for row in failed),
        num_quarantined=len(lost),
        shard_seconds=round(sum(row.seconds for row in done), 1),
        errors_files=frozenset(row.part or part_name(row.shard) for row in [*failed, *lost]),
    )


def _position_bits(counts: TokenCounts, grid: tuple[int, int]) -> list[list[float]] | None:
    bits_N = counts.position_entropy_bits()
    return None if bits_N is None else [[round(bits, 4) for bits in row] for row in bits_N.reshape(grid).tolist()]


def _shards(parts: Sequence[Part], counts: TokenCounts, drift: Drift) -> Iterator[ShardDrift]:
    for number in drift.furthest()[:MOST_SHARDS]:
        bits = (drift.divergence_S[number], drift.noise_S[number], drift.threshold_S[number])
        part, (divergence, noise, threshold) = parts[number], (round(float(each), 6) for each in bits)
        yield ShardDrift(part.shard, part.name, int(counts.num_rows_P[number]), divergence, noise, threshold)
