"""`dvae verify`: is every image of a run accounted for, and every file? Reads storage only, neither torch nor Ray."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace

from rich.console import Console
from rich.markup import escape

from jobs.progress import JobProgress
from jobs.sample_report import SampleReport, SampleSettings, sample_lines
from pipeline import storage
from pipeline.compacted import FileDone
from pipeline.errors import PipelineError
from pipeline.lease import Lease, is_held
from pipeline.ledger import Ledger
from pipeline.manifest import Totals
from pipeline.output import OutputPrefix, require_run
from pipeline.problems import REMEDIES, Problem, ProblemKind
from pipeline.records import ShardResult, ShardState
from pipeline.verify import Verification, left_behind, run_problems
from pipeline.verify_compacted import CompactedRun
from pipeline.verify_shard import ShardCheck

MAX_SHOWN = 20  # problems of one kind


@dataclass
class Tally:
    """Sums over the shards whose files are whole and right, and all that is wrong with the others."""

    num_done: int = 0
    num_quarantined: int = 0
    num_images: int = 0
    num_failed: int = 0
    part_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    rows: list[ShardResult] = field(default_factory=list)

    def add(self, check: ShardCheck) -> None:
        self.problems += check.problems
        if (row := check.row) is not None:
            self.rows.append(row)
            self.num_done += row.state is ShardState.DONE
            self.num_quarantined += row.state is ShardState.QUARANTINED
            self.num_images += row.num_rows
            self.num_failed += row.num_failed
            self.part_bytes += row.part_bytes

    def text(self) -> str:
        return f"{self.num_images:,} images, {len(self.problems):,} problems"


@dataclass(frozen=True)
class Report:
    """Counts are of shards whose files are whole and right. `num_without_sha256`: parts of which the ledger has none
    to compare with, for they were found after a kill."""

    output: str
    tokenizer_id: str
    complete: bool
    running: bool  # a driver is at work
    quick: bool
    num_done: int
    num_quarantined: int
    num_images: int
    num_failed: int
    part_bytes: int
    num_without_sha256: int
    problems: tuple[Problem, ...]
    sample: SampleReport | None = None

    @property
    def exit_code(self) -> int:
        return 0 if self.complete and (self.sample is None or self.sample.is_right) else 1


def run_verify(
    output_url: str,
    *,
    as_json: bool,
    quick: bool = False,
    rebuild: bool = False,
    sample: SampleSettings | None = None,
) -> int:
    """0 when all is there and right, 1 when anything is not. Raises NoRun, RunHeld, RunMismatch, StorageError."""
    output = OutputPrefix(storage.normalize(output_url))
    run = require_run(output)
    if sample is not None:
        from jobs.verify_sample import sample_source

        sample_source(run, sample)  # a wrong checkpoint is said at once
    if "compacted" in run:
        if rebuild or sample is not None:
            where = f"{storage.public_url(output.url)} is compacted"
            raise PipelineError(f"{where}: --rebuild-ledger and --sample are for {run['compacted']['source']}")
        report = verify_compacted(output, quick=quick)
    else:
        report = rebuild_ledger(output, sample) if rebuild else verify(output, quick=quick, sample=sample)
    console = Console(soft_wrap=True, highlight=False)
    if as_json:
        console.print_json(json.dumps(asdict(report)))
    else:
        for line in _lines(report):
            console.print(line)
    return report.exit_code


def verify(output: OutputPrefix, *, quick: bool, sample: SampleSettings | None = None) -> Report:
    """The report of one output; a driver at work there is not disturbed."""
    running = is_held(output)
    verification, tally = Verification(output), Tally()
    for check in _checks(verification, tally, quick=quick):
        tally.add(check)
    problems = [*tally.problems, *(() if running else left_behind(output))]
    if verification.ledger_problem is None:
        problems += run_problems(output, verification.table, verification.rows)
    else:  # that says all that the missing rows would say
        problems = [verification.ledger_problem, *(p for p in problems if p.kind is not ProblemKind.UNRECORDED)]
    report = _report(output, verification.rows, tally, problems, running=running, quick=quick)
    return _with_sample(report, verification, tally, sample)


def verify_compacted(output: OutputPrefix, *, quick: bool) -> Report:
    """The report of an output of `dvae compact`."""
    compacted, running = CompactedRun(output), is_held(output)
    problems: list[Problem] = []
    files: list[FileDone] = []
    with JobProgress("files", len(compacted.names)) as progress:
        for check in compacted.checks(quick=quick):
            problems += check.problems
            files += [check.file] if check.file is not None else []
            progress.advance(1, f"{sum(file.totals.num_rows for file in files):,} images, {len(problems):,} problems")
    if not problems:  # or the manifest knows of more files than are right
        problems += compacted.manifest_problems(files)
    totals = sum((file.totals for file in files), Totals(0, 0, 0, 0))
    num_bytes = sum(file.mark.num_bytes for file in files)
    return Report(
        output.url, compacted.run["tokenizer_id"], not problems, running, quick, totals.num_done,
        totals.num_quarantined, totals.num_rows, totals.num_failed, num_bytes, 0, tuple(problems),
    )  # fmt: skip


def rebuild_ledger(output: OutputPrefix, sample: SampleSettings | None = None) -> Report:
    """Make the ledger again from every byte of the parts and the errors files; what is torn or wrong gets no row.
    Raises RunHeld beside a driver at work."""
    require_run(output)
    with Lease(output) as lease:
        verification, tally = Verification(output, without_ledger=True), Tally()
        for check in _checks(verification, tally, quick=False):
            tally.add(check)
        Ledger(output, lease.check).rewrite(tally.rows)
    problems = [p for p in tally.problems if p.kind is not ProblemKind.UNRECORDED]
    problems += [*left_behind(output), *run_problems(output, verification.table, tally.rows)]
    report = _report(output, tally.rows, tally, problems, running=False, quick=False)
    return _with_sample(report, verification, tally, sample)


def _with_sample(report: Report, verification: Verification, tally: Tally, sample: SampleSettings | None) -> Report:
    if sample is None:
        return report
    from jobs.verify_sample import compare_sample

    done = [row for row in tally.rows if row.state is ShardState.DONE]
    return replace(report, sample=compare_sample(verification.output, verification.run, done, sample))


def _checks(verification: Verification, tally: Tally, *, quick: bool) -> Iterator[ShardCheck]:
    with JobProgress("shards", len(verification.names)) as progress:
        for check in verification.checks(quick=quick):
            yield check
            progress.advance(1, tally.text())


def _report(
    output: OutputPrefix,
    rows: Iterable[ShardResult],
    tally: Tally,
    problems: list[Problem],
    *,
    running: bool,
    quick: bool,
) -> Report:
    return Report(
        output.url, require_run(output)["tokenizer_id"], not problems, running, quick,
        tally.num_done, tally.num_quarantined, tally.num_images, tally.num_failed, tally.part_bytes,
        sum(row.state is ShardState.DONE and row.sha256 is None for row in rows), tuple(problems),
    )  # fmt: skip


def _lines(report: Report) -> Iterator[str]:
    for name, value in _counts(report):
        yield f"{name:<12}{escape(value)}"
    if report.sample is not None:
        yield from (f"{name:<12}{escape(value)}" for name, value in sample_lines(report.sample))
    counts = Counter(problem.kind for problem in report.problems)
    for kind in ProblemKind:
        if counts[kind]:
            yield from _problem_lines(kind, [p for p in report.problems if p.kind is kind])
    if report.complete:
        what = "every shard has its files" if report.quick else "every image of every shard has a row or an error"
        yield f"[green]complete[/]: {what}"
    else:
        yield "[red]not complete[/]: " + ", ".join(f"{counts[kind]:,} {kind}" for kind in ProblemKind if counts[kind])


def _counts(report: Report) -> Iterator[tuple[str, str]]:
    yield "run", report.output + (" (a driver is at work: what it is writing may be named here)" * report.running)
    yield "tokenizer", report.tokenizer_id
    yield "checked", "footers and listings" if report.quick else "every byte of every part"
    yield "shards", f"{report.num_done:,} done and right, {report.num_quarantined:,} quarantined"
    num_all = report.num_images + report.num_failed
    yield "images", f"{num_all:,} = {report.num_images:,} rows + {report.num_failed:,} errors"
    yield "parts", f"{report.part_bytes / 1e6:,.1f} MB"
    if report.num_without_sha256:
        yield "sha256", f"not recorded for {report.num_without_sha256:,} parts; --rebuild-ledger records it"


def _problem_lines(kind: ProblemKind, problems: list[Problem]) -> Iterator[str]:
    yield f"[red]{kind}[/]: {len(problems):,}; {REMEDIES[kind]}"
    for problem in problems[:MAX_SHOWN]:
        yield f"  {escape(problem.file)}: {escape(problem.message)}"
    if (hidden := len(problems) - MAX_SHOWN) > 0:
        yield f"  and {hidden:,} more: --json lists all"
