"""What failed in a run, and what of it may go well now: from the ledger, the errors files, and single images fetched by
their byte range. Lists no input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from pipeline import storage
from pipeline.errors import StorageError
from pipeline.images import ImageSpec, SampleError, decode_image
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix, part_name
from pipeline.plan import Plan, PlanRecord, ShardTask, make_plan
from pipeline.records import ObjectInfo, SampleFailure, ShardResult, ShardState, Stage
from pipeline.token_table import TableSpec, read_errors

READERS = 16
BEING_RETRIED = "being_retried"


@dataclass(frozen=True)
class Finding:
    """One shard of which something failed. With a `task` it is tokenised again; without one, `outcome` says why not.
    `errors_etag`: of the errors file beside its good part; None where no good part is."""

    row: ShardResult
    failed: str
    outcome: str
    task: ShardTask | None = None
    errors_etag: str | None = None


def plan_retry(
    output: OutputPrefix, ledger: Ledger, table: TableSpec, record: PlanRecord, *, whole_shards: bool
) -> tuple[Plan, list[Finding]]:
    """The plan that tries again what may go well now, and what was found of each shard with failures. `whole_shards`:
    tokenise each of them again, whatever its images failed of. Costs a look at each such shard and its errors file,
    and one request for each image that is tried."""
    plan, rows = _plan_of_ledger(output, ledger, table, record)
    look = _Look(output, ImageSpec.from_json(table.image_spec), whole_shards)
    with_failures = [row for row in plan.done if row.num_failed]
    with ThreadPoolExecutor(READERS) as executor:
        findings = list(executor.map(lambda task: look.at_lost(rows[task.shard.url], task), plan.todo))
        findings += executor.map(look.at_images, with_failures)
    return _without_hopeless(plan, findings), findings


def _plan_of_ledger(
    output: OutputPrefix, ledger: Ledger, table: TableSpec, record: PlanRecord
) -> tuple[Plan, Mapping[str, ShardResult]]:
    """As if the input were what the ledger has, less what the last run no longer listed; and the ledger's rows."""
    gone, rows = set(record.removed), ledger.read()
    known = [row for row in rows.values() if row.state is not ShardState.REMOVED and row.shard not in gone]
    plan = make_plan((ObjectInfo(r.shard, r.size_bytes, r.etag) for r in known), output, ledger, table)
    unwritten = [row for row in plan.removed if row.shard not in gone]  # their driver was killed before it wrote them
    removed = tuple(row for row in plan.removed if row.shard in gone)
    num_left = max(0, record.num_shards - len(plan.todo) - len(plan.done) - len(unwritten))
    return replace(plan, done=(*plan.done, *unwritten), removed=removed, num_left=num_left), rows


def _without_hopeless(plan: Plan, findings: Sequence[Finding]) -> Plan:
    """What is not tried again keeps its row: that of a part that is there, or of a quarantine. A part that is missing
    while its shard is gone as well is left to do."""
    again = {finding.row.shard: finding.task for finding in findings if finding.task is not None}
    quarantined = [f.row for f in findings if f.task is None and f.row.state is ShardState.QUARANTINED]
    num_hopeless = sum(task.shard.url not in again for task in plan.todo) - len(quarantined)
    done = [row for row in plan.done if row.shard not in again]
    return replace(plan, todo=tuple(again.values()), done=(*done, *quarantined), num_left=plan.num_left + num_hopeless)


def put_in_doubt(output: OutputPrefix, ledger: Ledger, findings: Sequence[Finding]) -> None:
    """Before anything is tokenised again: from then on part and errors file of a shard may be of two attempts, so its
    row says until its next one that it is to be done anew. Without this a kill between the two would lose images."""
    rows = [_in_doubt(one.row) for one in findings if one.task is not None and one.errors_etag is not None]
    if rows:
        storage.remove(output.file("manifest.json"))  # first, for it says that all is well
        ledger.append(rows)


def _in_doubt(row: ShardResult) -> ShardResult:
    return ShardResult(
        row.shard, row.size_bytes, row.etag, ShardState.QUARANTINED, reason=BEING_RETRIED,
        message="dvae retry ended before this shard was tokenised again",
    )  # fmt: skip


def is_untouched(output: OutputPrefix, finding: Finding) -> bool:
    """Whether part and errors file are still those that were found, for then their row is right again."""
    name = part_name(finding.row.shard)
    part, errors = storage.stat(output.part(name)), storage.stat(output.errors(name))
    if part is None or errors is None:
        return False
    return (part.size_bytes, errors.etag) == (finding.row.part_bytes, finding.errors_etag)


@dataclass(frozen=True)
class _Look:
    output: OutputPrefix
    spec: ImageSpec
    whole_shards: bool

    def at_lost(self, row: ShardResult, task: ShardTask) -> Finding:
        """A shard without a good part."""
        is_quarantined = row.state is ShardState.QUARANTINED
        failed = f"quarantined: {row.reason}" if is_quarantined else "its part is missing, torn or without its errors"
        try:
            shard = storage.stat(row.shard)
        except StorageError as error:
            return Finding(row, failed, f"cannot be looked at: {error}")
        if shard is None:
            return Finding(row, failed, "is gone from the input")
        return Finding(row, failed, "to be tokenised again", replace(task, shard=shard))

    def at_images(self, row: ShardResult) -> Finding:
        """A shard with a good part, some of whose images failed."""
        failed = f"{row.num_failed:,} images"
        try:
            shard, errors = storage.stat(row.shard), storage.stat(self.output.errors(str(row.part)))
            if shard is None or errors is None:
                return Finding(row, failed, "is gone from the input" if shard is None else "its errors file is gone")
            if (shard.size_bytes, shard.etag) != (row.size_bytes, row.etag):
                return Finding(row, failed, "has changed: dvae tokenize does it anew")
            failures = read_errors(errors.url)
            failed = _counted(failures)
            outcome, is_hopeful = self._try(shard, failures)
        except (StorageError, FileNotFoundError) as error:
            return Finding(row, failed, f"cannot be looked at: {error}")
        task = ShardTask(shard, str(row.part), has_errors_file=True) if is_hopeful else None
        return Finding(row, failed, outcome, task, errors.etag)

    def _try(self, shard: ObjectInfo, failures: Sequence[SampleFailure]) -> tuple[str, bool]:
        if self.whole_shards:
            return "to be tokenised again", True
        # Of metadata the errors file has no place, and of a gzipped tar no offsets.
        single = [f for f in failures if f.stage is Stage.DECODE and f.offset is not None]
        if any(self._decodes(shard, failure) for failure in single):  # the first is enough
            return "an image decodes now: to be tokenised again", True
        said = [f"none of {len(single):,} decodes now"] if single else []
        if num_others := len(failures) - len(single):
            said.append(f"{num_others:,} cannot be tried alone (--whole-shards does)")
        return "; ".join(said), False

    def _decodes(self, shard: ObjectInfo, failure: SampleFailure) -> bool:
        try:
            decode_image(storage.read_range(shard.url, failure.offset or 0, failure.size or 0), self.spec)
        except SampleError:
            return False
        return True


def _counted(failures: Sequence[SampleFailure]) -> str:
    reasons = Counter(failure.reason.value for failure in failures).most_common()
    return f"{len(failures):,} images: " + ", ".join(f"{count:,} {reason}" for reason, count in reasons)
