"""Dropping what earlier runs left of shards that the input has no longer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from pipeline import storage
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix, part_name
from pipeline.plan import Plan
from pipeline.records import ShardResult, ShardState

REMOVERS = 16
ROWS_A_SEGMENT = 1000
log = logging.getLogger(__name__)


def drop_removed(output: OutputPrefix, ledger: Ledger, plan: Plan) -> Plan:
    """Remove the part, then the errors file, then write a tombstone, for each of `plan.removed`; the plan that is left.
    Killed at any step: until its tombstone is there a shard has its old row, by which the next plan finds it again.
    Only for whoever holds the prefix, and only after a listing of the input that went well."""
    if not plan.removed:
        return plan
    storage.remove(output.file("manifest.json"))  # it names them
    ledger.append(plan.adopted)  # once its part is gone, a shard without a row would be known by nothing
    with ThreadPoolExecutor(REMOVERS) as executor:
        for start in range(0, len(plan.removed), ROWS_A_SEGMENT):
            rows = plan.removed[start : start + ROWS_A_SEGMENT]
            ledger.append(list(executor.map(lambda row: _drop(output, row), rows)))
            _say(rows)
    return replace(plan, adopted=(), removed=())


def _drop(output: OutputPrefix, row: ShardResult) -> ShardResult:
    name = part_name(row.shard)
    storage.remove(output.part(name))
    storage.remove(output.errors(name))
    return ShardResult(row.shard, row.size_bytes, row.etag, ShardState.REMOVED)


def _say(rows: Sequence[ShardResult]) -> None:
    for row in rows:
        log.info("%s: dropped, it is no longer in the input (%d rows)", row.shard, row.num_rows)
