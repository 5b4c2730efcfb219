"""What a driver remembers of its shards: sums. Their rows go to the ledger, and none is kept once it is written."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.errors import Damaged, StorageError
from pipeline.ledger import Ledger
from pipeline.manifest import Totals
from pipeline.plan import Plan
from pipeline.records import ShardResult, ShardState

log = logging.getLogger(__name__)
LEDGER_EVERY_S = 10.0
LEDGER_EVERY_ROWS = 1000
MAX_UNWRITTEN = 10 * LEDGER_EVERY_ROWS  # so many rows wait for a slow store, then the run does


class Recording:
    """The sums over a plan's shards, and its new rows on their way into the ledger. They are written by a thread, so
    that no actor waits for the store; a kill before that costs one footer read a shard at the next plan, no work."""

    def __init__(self, ledger: Ledger, plan: Plan) -> None:
        self._ledger = ledger
        self.totals = Totals.of(plan.done)
        self.reasons = Counter(row.reason for row in plan.done if row.state is ShardState.QUARANTINED)
        self.num_new = 0
        self._rows = list(plan.adopted)  # not yet in the ledger
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._writing: Future[None] | None = None
        self._num_writing = 0
        self._written_at = time.monotonic()

    @property
    def num_shards(self) -> int:
        """With a result, of this run or an earlier one."""
        return self.totals.num_done + self.totals.num_quarantined

    @property
    def num_unwritten(self) -> int:
        """Rows that are not yet in the ledger."""
        return len(self._rows)

    def note(self, row: ShardResult) -> None:
        """Raises what the writing of earlier rows raised, which are kept and written again at the end."""
        self._rows.append(row)
        self.totals, self.num_new = self.totals.plus(row), self.num_new + 1
        if row.state is ShardState.QUARANTINED:
            self.reasons[row.reason] += 1
        if self._writing is not None and (self._writing.done() or len(self._rows) >= MAX_UNWRITTEN):
            self._settle()
        if self._writing is None and self._is_due():
            self._num_writing = len(self._rows)
            self._writing = self._writer.submit(self._ledger.append, tuple(self._rows))

    def _is_due(self) -> bool:
        return len(self._rows) >= LEDGER_EVERY_ROWS or time.monotonic() - self._written_at > LEDGER_EVERY_S

    def _settle(self) -> None:
        """Until the segment that is being written is there."""
        if (writing := self._writing) is not None:
            self._writing = None
            writing.result()
            del self._rows[: self._num_writing]
            self._written_at = time.monotonic()

    def close(self) -> None:
        """All that was noted is in the ledger, or this raises. A write that failed is made good here, and forgotten."""
        try:
            self._settle()
        except StorageError as error:
            log.warning("%s; writing these rows once more", error)
        finally:
            self._writer.shutdown()
            self._ledger.append(self._rows)
            self._rows = []

    def rows(self, removed: Sequence[ShardResult]) -> list[ShardResult]:
        """Of all shards of the plan, from the ledger, once each of them has one. Raises Damaged where it does not say
        what was written there."""
        gone = {row.shard for row in removed}
        known = self._ledger.read().values()
        rows = [row for row in known if row.state is not ShardState.REMOVED and row.shard not in gone]
        if (found := Totals.of(rows)) != self.totals:
            raise Damaged(
                f"the ledger says {found}, this run counted {self.totals}: dvae verify --rebuild-ledger makes it anew"
            )
        return rows
