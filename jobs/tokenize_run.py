"""One tokenising run and the right to write to it: what run.json says, the lease, the ledger."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jobs.checkpoints import TokenizerSource, read_head
from jobs.tokenize_config import TokenizeConfig
from pipeline import storage
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix, RunDescription, check_run, claim
from pipeline.token_table import TableSpec
from pipeline.tokenize_shard import TokenizeJob


@dataclass(frozen=True)
class TokenizeRun:
    """A run as its settings and its checkpoint describe it. Nothing is read of its output, nor written."""

    config: TokenizeConfig
    output: OutputPrefix
    table: TableSpec
    source: TokenizerSource

    @classmethod
    def of(cls, config: TokenizeConfig) -> TokenizeRun:
        """Reads the checkpoint's head. Raises CheckpointNotFound, ModelError."""
        head = read_head(config.checkpoint)
        table = TableSpec(head.tokenizer_id, head.grid, head.codebook_size, head.image_spec, config.columns())
        source = TokenizerSource(
            head.url, config.device, config.precision, config.batch_size, config.threads, config.compile
        )
        return cls(config, OutputPrefix(storage.normalize(config.output)), table, source)

    def description(self) -> RunDescription:
        return RunDescription(self.table, self.config.options(), self.source.numerics())

    def job(self, decode_threads: int) -> TokenizeJob:
        return TokenizeJob(
            self.output, self.table, self.config.batch_size, decode_threads,
            tuple(self.config.options()["image_extensions"]), self.config.require_end_marker,
        )  # fmt: skip


@contextmanager
def held(run: TokenizeRun) -> Iterator[Ledger]:
    """Inside, this driver holds the output, and only it writes there. Raises RunMismatch (before anything is written,
    the lease included), RunHeld; the ledger's `check` raises RunHeld once another driver has the output."""
    accept = run.config.accept_numerics
    check_run(run.output, run.description(), accept_numerics=accept)
    with Lease(run.output) as lease:
        claim(run.output, run.description(), accept_numerics=accept)
        storage.remove_temporaries(run.output.url)
        ledger = Ledger(run.output, lease.check)
        ledger.compact()
        try:
            yield ledger
        finally:  # what an actor was at when it was stopped
            if lease.lost is None:
                storage.remove_temporaries(run.output.url)
