"""One shard's files against each other and against its ledger row: is every image of it accounted for?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from pipeline import part_check, storage
from pipeline.output import part_name
from pipeline.part_check import ErrorsContent, NotOurs, NotWhole, PartContent
from pipeline.problems import Problem, ProblemKind
from pipeline.records import ObjectInfo, ShardResult, ShardState
from pipeline.token_table import TableSpec

SUFFIX = ".parquet"


@dataclass(frozen=True)
class ShardFiles:
    """What is there of one shard. `name` is that of its part and of its errors file."""

    name: str
    part: ObjectInfo | None
    errors: ObjectInfo | None
    row: ShardResult | None  # of the ledger

    @property
    def state(self) -> ShardState | None:
        return None if self.row is None else self.row.state

    def wrong_part(self, kind: ProblemKind, message: str) -> Problem:
        return Problem(kind, f"tokens/{self.name}", storage.public_text(message))

    def wrong_errors(self, kind: ProblemKind, message: str) -> Problem:
        return Problem(kind, f"errors/{self.name}", storage.public_text(message))


@dataclass(frozen=True)
class ShardCheck:
    """`row` is the ledger row that the files give (with `sha256` where they were read whole); None where there is
    no right one."""

    problems: tuple[Problem, ...] = ()
    row: ShardResult | None = None


def check_shard(files: ShardFiles, table: TableSpec, *, quick: bool) -> ShardCheck:
    """`quick` reads footers only. Raises StorageError."""
    check = _check(files, table, quick)
    if any(problem.kind is ProblemKind.TORN for problem in check.problems):
        return _check(files, table, quick)  # a network gives damaged bytes too, but not the same twice
    return check


def _check(files: ShardFiles, table: TableSpec, quick: bool) -> ShardCheck:
    try:
        if files.part is not None and (stranger := _stranger(files, files.part, table)):
            beside = _check_without_part(files)
            return replace(beside, problems=(files.wrong_part(ProblemKind.FOREIGN, stranger), *beside.problems))
        return _check_without_part(files) if files.part is None else _check_part(files, files.part, table, quick)
    except FileNotFoundError:
        return ShardCheck((files.wrong_part(ProblemKind.MISSING, "it, or its errors, went away meanwhile"),))


def _check_without_part(files: ShardFiles) -> ShardCheck:
    if files.state is ShardState.DONE:
        return ShardCheck((files.wrong_part(ProblemKind.MISSING, "the ledger says done"),))
    if files.errors is not None:
        return _check_errors_alone(files, files.errors)
    if files.state is ShardState.QUARANTINED:
        return ShardCheck((files.wrong_errors(ProblemKind.MISSING, "the ledger says quarantined"),))
    return ShardCheck()


# A part


def _check_part(files: ShardFiles, part: ObjectInfo, table: TableSpec, quick: bool) -> ShardCheck:
    try:
        content = part_check.read_part_footer(part, table) if quick else part_check.read_part(part, table)
    except (NotWhole, NotOurs) as error:
        return ShardCheck((files.wrong_part(ProblemKind.TORN, str(error)),))
    row = _row(files.name, part, content)
    faults = [*_misplaced(files.name, content.footer["shard"]), *content.faults]
    if problem := _part_problem(files, row, faults) or _errors_problem(files, content, quick):
        return ShardCheck((problem,))
    unrecorded = _why_unrecorded(files.row, row)
    return ShardCheck((files.wrong_part(ProblemKind.UNRECORDED, unrecorded),) if unrecorded else (), row)


def _stranger(files: ShardFiles, part: ObjectInfo, table: TableSpec) -> str | None:
    """Why a file is no part of this run. Of one that the ledger doesn't know by its footer, for it may be of any
    size."""
    if files.state is ShardState.DONE:
        return None
    if files.state not in (None, ShardState.QUARANTINED):
        return f"the ledger says that its shard is {files.state}"
    if not files.name.endswith(SUFFIX):
        return "it is no Parquet file"
    try:
        footer = part_check.read_part_footer(part, table).footer
    except NotOurs as error:
        return str(error)
    except NotWhole:  # a torn part of ours, perhaps
        return None
    if footer["tokenizer_id"] != table.tokenizer_id:
        return f"it is of another run: its tokenizer is {footer['tokenizer_id']}"
    return next(_misplaced(files.name, footer["shard"]), None)


def _misplaced(name: str, shard: str) -> Iterator[str]:
    if part_name(shard) != name:
        yield f"it is of {shard}, whose files have another name"


def _row(name: str, part: ObjectInfo, content: PartContent) -> ShardResult:
    footer = content.footer
    return ShardResult(
        footer["shard"], footer["shard_size"], footer["shard_etag"], ShardState.DONE, name, content.num_rows,
        footer["num_failed"], part.size_bytes, content.sha256,
    )  # fmt: skip


def _part_problem(files: ShardFiles, found: ShardResult, faults: list[str]) -> Problem | None:
    if files.row is not None and files.state is ShardState.DONE and (faults or not _is_newer(files.row, found)):
        if other := _other_bytes(files.row, found):
            return files.wrong_part(ProblemKind.TORN, "; ".join([other, *faults]))
        faults = [*faults, *_disagreements(files.row, found)]
    return files.wrong_part(ProblemKind.WRONG, "; ".join(faults)) if faults else None


def _is_newer(row: ShardResult, found: ShardResult) -> bool:
    """The shard was changed and tokenised anew, and its driver killed before it said so."""
    return (row.size_bytes, row.etag) != (found.size_bytes, found.etag)


def _other_bytes(row: ShardResult, found: ShardResult) -> str | None:
    if row.part_bytes != found.part_bytes:
        return f"it has {found.part_bytes} bytes, the ledger says {row.part_bytes}"
    if row.sha256 and found.sha256 and row.sha256 != found.sha256:
        return f"its sha256 is {found.sha256}, the ledger says {row.sha256}"
    return None


def _disagreements(row: ShardResult, found: ShardResult) -> Iterator[str]:
    for name in ("size_bytes", "etag", "num_rows", "num_failed"):
        here, there = getattr(found, name), getattr(row, name)
        if here != there:
            yield f"its {name} is {here!r}, the ledger says {there!r}"


def _why_unrecorded(row: ShardResult | None, found: ShardResult) -> str | None:
    if row is None:
        return "the ledger has no row of it"
    if row.state is ShardState.QUARANTINED:
        return "the ledger says that its shard is quarantined"
    return "it is of other bytes of its shard than the ledger knows" if _is_newer(row, found) else None


# The errors beside a part


def _errors_problem(files: ShardFiles, part: PartContent, quick: bool) -> Problem | None:
    num_failed = part.footer["num_failed"]
    if files.errors is None and num_failed:
        return files.wrong_errors(ProblemKind.MISSING, f"{num_failed} images of the shard failed")
    if files.errors is None:
        return _unaccounted(files, part, ErrorsContent(0))
    if not num_failed:
        return files.wrong_errors(ProblemKind.WRONG, "it is stale: no image of the shard failed")
    try:
        errors = part_check.read_errors_footer(files.errors) if quick else part_check.read_errors(files.errors)
    except (NotWhole, NotOurs) as error:
        return files.wrong_errors(ProblemKind.TORN, str(error))
    if faults := [*errors.faults, *_errors_faults(part, errors)]:
        return files.wrong_errors(ProblemKind.WRONG, "; ".join(faults))
    return _unaccounted(files, part, errors)


def _errors_faults(part: PartContent, errors: ErrorsContent) -> Iterator[str]:
    num_failed, shard = part.footer["num_failed"], part.footer["shard"]
    if errors.num_rows != num_failed:
        yield f"it has {errors.num_rows} rows, the part says that {num_failed} images failed"
    if errors.quarantine is not None:
        yield "it says that the shard was given up, beside a part"
    if errors.shard not in (None, shard):
        yield f"it is of {errors.shard}, the part of {shard}"


def _unaccounted(files: ShardFiles, part: PartContent, errors: ErrorsContent) -> Problem | None:
    """Rows and errors together must be the samples 0, 1, 2 … of the shard, each once."""
    if part.index_N is None:  # only the footer was read
        return None
    none = np.empty(0, np.int32)
    samples, times = np.unique(
        np.r_[part.index_N, none if errors.index_N is None else errors.index_N], return_counts=True
    )
    if (times > 1).any():
        message = f"sample {samples[times > 1][0]} has a row and an error (so have {(times > 1).sum()} in all)"
        return files.wrong_part(ProblemKind.WRONG, message)
    gaps = samples != np.arange(len(samples))
    if not gaps.any():
        return None
    message = f"sample {gaps.argmax()} of the shard has neither a row nor an error"
    return files.wrong_part(ProblemKind.WRONG, message)


# Errors without a part


def _check_errors_alone(files: ShardFiles, file: ObjectInfo) -> ShardCheck:
    """Those of a quarantined shard, or of one whose driver was killed before the part."""
    if files.state not in (None, ShardState.QUARANTINED):
        return ShardCheck(
            (files.wrong_errors(ProblemKind.FOREIGN, f"the ledger says that its shard is {files.state}"),)
        )
    if not files.name.endswith(SUFFIX):
        return ShardCheck((files.wrong_errors(ProblemKind.FOREIGN, "it is no Parquet file"),))
    try:
        part_check.read_errors_footer(file)  # first: a file that the ledger doesn't know may be of any size
        errors = part_check.read_errors(file)
    except (NotWhole, NotOurs) as error:
        strange = files.row is None and isinstance(error, NotOurs)
        return ShardCheck((files.wrong_errors(ProblemKind.FOREIGN if strange else ProblemKind.TORN, str(error)),))
    misplaced = [] if errors.shard is None else list(_misplaced(files.name, errors.shard))
    if faults := [*misplaced, *errors.faults]:
        kind = ProblemKind.FOREIGN if misplaced and files.row is None else ProblemKind.WRONG
        return ShardCheck((files.wrong_errors(kind, "; ".join(faults)),))
    if errors.quarantine is None:
        message = "images of the shard failed, its part is not there: its driver was killed in between"
        return ShardCheck((files.wrong_errors(ProblemKind.INCOMPLETE, message),))
    return _quarantined(files, errors)


def _quarantined(files: ShardFiles, errors: ErrorsContent) -> ShardCheck:
    assert errors.shard is not None and errors.quarantine is not None
    reason, message = errors.quarantine
    problems = [files.wrong_errors(ProblemKind.QUARANTINED, f"{errors.shard}: {reason}: {message}")]
    if files.row is None:
        problems.append(files.wrong_errors(ProblemKind.UNRECORDED, "the ledger has no row of this quarantined shard"))
    row = ShardResult(errors.shard, 0, "", ShardState.QUARANTINED, reason=reason, message=message)
    return ShardCheck(tuple(problems), row)
