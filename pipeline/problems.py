"""What can be wrong with an output, by name: plain values, each kind with one remedy."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ProblemKind(StrEnum):
    """A closed set."""

    MISSING = "missing"  # the ledger has it, the store has not
    TORN = "torn"  # cannot be read, or has other bytes than the ledger says
    WRONG = "wrong"  # whole, but not what this run must have written
    FOREIGN = "foreign"  # no shard of this run accounts for it
    UNRECORDED = "unrecorded"  # whole and right, the ledger doesn't know it
    QUARANTINED = "quarantined"
    INCOMPLETE = "incomplete"  # something is left to do
    MANIFEST = "manifest"  # manifest.json says other things than the ledger


@dataclass(frozen=True, slots=True)
class Problem:
    """`file` is its name below the output."""

    kind: ProblemKind
    file: str
    message: str


REMEDIES = {
    ProblemKind.MISSING: "run the same command again: it makes what is not there",
    ProblemKind.TORN: "remove these files and run the same command again: it makes them anew",
    ProblemKind.WRONG: "remove these files and run the same command again: it makes them anew",
    ProblemKind.FOREIGN: "move these files elsewhere: whoever reads the folder reads them too",
    ProblemKind.UNRECORDED: "run the same command again, or dvae verify with --rebuild-ledger: both record them",
    ProblemKind.QUARANTINED: "run the same command again: it tries these shards again",
    ProblemKind.INCOMPLETE: "run the same command again: it goes on",
    ProblemKind.MANIFEST: "run the same command again: it writes the manifest anew",
}
