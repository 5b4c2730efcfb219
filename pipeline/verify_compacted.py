"""A compacted run against its map: every file there and right, every row of a shard where the map has it."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import compact_file, part_check
from pipeline.compact_file import ShardPlace
from pipeline.compacted import FileDone, manifest_of, read_map, read_marked, shards_folder
from pipeline.errors import Damaged
from pipeline.map_ahead import map_ahead
from pipeline.output import OutputPrefix, listed, read_json, require_run, table_of
from pipeline.problems import Problem, ProblemKind
from pipeline.records import ObjectInfo, ShardState
from pipeline.token_table import TableSpec

# N rows of a shard

READERS = 1  # whole files in memory: twice as many
AGAIN = "run dvae compact into another place"


@dataclass(frozen=True)
class FileCheck:
    """`file` is None where anything is wrong with it."""

    problems: tuple[Problem, ...] = ()
    file: FileDone | None = None


class CompactedRun:
    """What there is to check in one output of `dvae compact`."""

    def __init__(self, output: OutputPrefix) -> None:
        self.output, self.run = output, require_run(output)
        self.table = table_of(output, self.run)
        self._maps, self._tokens = listed(shards_folder(output)), listed(output.tokens_folder())
        self._errors = listed(output.errors_folder())
        self.names = sorted({*self._maps, *self._tokens, *self._errors})

    def checks(self, *, quick: bool) -> Generator[FileCheck, None, None]:
        """One for each name, in their order. `quick`: sizes only."""
        return map_ahead(partial(self._check, quick=quick), self.names, threads=READERS)

    def manifest_problems(self, files: list[FileDone]) -> Iterator[Problem]:
        """`files`: all of which the map was read."""
        stored = read_json(self.output.file("manifest.json"))
        if stored is None:
            message = "it is not there: dvae compact did not come to its end; the same command goes on"
            yield Problem(ProblemKind.INCOMPLETE, "manifest.json", message)
        elif stored != manifest_of(self.table, self.run["compacted"], files):
            yield Problem(ProblemKind.MANIFEST, "manifest.json", f"it says other things than the map; {AGAIN}")

    def _check(self, name: str, *, quick: bool) -> FileCheck:
        if name not in self._maps:
            message = "no map knows it: a compaction that was killed left it, and goes on with the same command"
            folder = "tokens" if name in self._tokens else "errors"
            return FileCheck((Problem(ProblemKind.FOREIGN, f"{folder}/{name}", message),))
        try:
            file, places = read_map(self._maps[name].url)
        except Damaged as error:
            return FileCheck((Problem(ProblemKind.TORN, f"shards/{name}", str(error)),))
        problems = tuple(self._sizes(file)) or (() if quick else tuple(self._contents(file, places)))
        return FileCheck(problems, None if problems else file)

    def _sizes(self, file: FileDone) -> Iterator[Problem]:
        for folder, there, mark in (
            ("tokens", self._tokens, file.mark),
            ("errors", self._errors, file.errors_mark),
        ):
            found = _size(there, file.name)
            if found != mark.num_bytes:
                kind = ProblemKind.MISSING if not found else ProblemKind.TORN
                yield Problem(kind, f"{folder}/{file.name}", f"{found:,} bytes of {mark.num_bytes:,}; {AGAIN}")

    def _contents(self, file: FileDone, places: list[ShardPlace]) -> Iterator[Problem]:
        folder = "errors"
        try:
            errors = self._failed(file)
            folder = "tokens"
            data = read_marked(self.output.part(file.name), file.mark)
            lengths = [place.num_rows for place in places]
            for place, rows in zip(places, compact_file.read_rows(data, lengths, self.table), strict=True):
                for fault in _faults(place, rows, errors.get(place.shard, []), self.table):
                    yield Problem(ProblemKind.WRONG, f"tokens/{file.name}", f"{place.shard}: {fault}; {AGAIN}")
        except Damaged as error:
            yield Problem(ProblemKind.TORN, f"{folder}/{file.name}", f"{error}; {AGAIN}")

    def _failed(self, file: FileDone) -> Mapping[str, list[int | None]]:
        if not file.errors_mark.num_bytes:
            return {}
        return compact_file.failed_indexes(read_marked(self.output.errors(file.name), file.errors_mark))


def _size(there: Mapping[str, ObjectInfo], name: str) -> int:
    return there[name].size_bytes if name in there else 0


def _faults(place: ShardPlace, rows: Any, failed: list[int | None], table: TableSpec) -> Iterator[str]:
    """Rows and errors together must be the samples 0, 1, 2 … of the shard, each once."""
    yield from part_check.row_faults(rows, place.shard, place.size_bytes, table)
    if place.state is ShardState.QUARANTINED:
        if failed != [None] or len(rows):
            yield f"it was given up, and has {len(rows)} rows and {len(failed)} errors"
        return
    index_N: NDArray[np.int64] = np.r_[rows["index"].to_numpy(), np.asarray(failed, np.int64)]
    if (len(rows), len(failed)) != (place.num_rows, place.num_failed):
        yield f"{len(rows)} rows and {len(failed)} errors of {place.num_rows} and {place.num_failed}"
    elif not np.array_equal(np.sort(index_N), np.arange(len(index_N))):
        yield "its samples are not all accounted for, each once"
