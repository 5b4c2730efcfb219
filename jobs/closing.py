"""What a tokenising run says at its end, and whether it is well: the budgets and the closing lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.markup import escape

from jobs.tokenize_config import TokenizeConfig
from pipeline import storage
from pipeline.manifest import Totals
from pipeline.records import ShardResult

NAMES_SHOWN = 3


@dataclass(frozen=True)
class Closing:
    """The end of one run. `reasons`: why shards are quarantined, and how many; `removed`: of those that are listed no
    longer."""

    config: TokenizeConfig
    output_url: str
    num_shards: int
    totals: Totals
    reasons: Mapping[str | None, int]
    removed: Sequence[ShardResult]
    num_left: int = 0  # shards without a result, which this driver left alone

    @property
    def lost(self) -> str | None:
        """Why the run is not complete; None when it is."""
        totals = self.totals
        if totals.num_quarantined <= self.config.max_failed_shards:
            return None
        named = ", ".join(f"{count} {reason}" for reason, count in Counter(self.reasons).most_common())
        allowed = f"max_failed_shards allows {self.config.max_failed_shards}"
        return f"{totals.num_quarantined} shards are quarantined ({named}), {allowed}"

    @property
    def failed(self) -> str | None:
        """Why the run is over its budget of images; None when it isn't."""
        totals = self.totals
        if totals.failed_share <= self.config.max_failed_samples:
            return None
        allowed = f"max_failed_samples allows {self.config.max_failed_samples:.2%}"
        return f"{totals.num_failed:,} images failed, {totals.failed_share:.2%} of all, {allowed}"

    def tell(self, say: Callable[[str], object], command: str) -> int:
        """The closing lines; the exit code. `command` is the line to run again."""
        code = 1 if self.lost or self.failed or self.num_left else 0
        totals, lost, failed, url = self.totals, self.lost, self.failed, escape(self.output_url)
        say(
            f"{totals.num_done:,} of {self.num_shards:,} shards · {totals.num_rows:,} images tokenised · "
            f"{totals.num_failed:,} failed · {url}"
        )
        if self.removed:
            say(escape(removed_line(self.removed)))
        if failed:
            say(f"[red]over budget[/]: {escape(failed)}; accept that with max_failed_samples={totals.failed_share:.4f}")
        if lost:
            say(f"[red]incomplete[/]: {escape(lost)}; to try those again:\n  {escape(command)}")
        if self.num_left:
            say(f"[red]incomplete[/]: {self.num_left:,} shards are not tokenised yet: go on with dvae tokenize")
        if lost or failed:
            say(f"what failed and why: dvae status {url}")
        return code


def removed_line(removed: Sequence[ShardResult]) -> str:
    return (
        f"no longer in the input: {named(removed)}; what they gave is kept and still in the table "
        f"({sum(row.num_rows for row in removed):,} images); dvae tokenize --prune drops it"
    )


def named(rows: Sequence[ShardResult]) -> str:
    """How many shards, and the first few by name."""
    first = ", ".join(storage.base_name(row.shard) for row in sorted(rows, key=lambda row: row.shard)[:NAMES_SHOWN])
    more = f" and {len(rows) - NAMES_SHOWN:,} more" if len(rows) > NAMES_SHOWN else ""
    return f"{len(rows):,} {'shard' if len(rows) == 1 else 'shards'} ({first}{more})"
