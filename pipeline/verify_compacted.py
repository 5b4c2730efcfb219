"""A compacted run against its map: every file there and right, every row of a shard where the map has it."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from pipeline import compact_file
from pipeline.compact_file import ShardPlace
from pipeline.compacted import FileDone, manifest_of, read_map, read_marked, shards_folder
from pipeline.errors import Damaged
from pipeline.map_ahead import map_ahead
from pipeline.output import OutputPrefix, listed, read_json, require_run, table_of
from pipeline.problems import Problem, ProblemKind
from pipeline.records import ObjectInfo

READERS = 1  # whole files in memory: twice as many


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
            message = "it is not there: dvae compact did not come to its end"
            yield Problem(ProblemKind.INCOMPLETE, "manifest.json", message)
        elif stored != manifest_of(self.table, self.run["compacted"], files):
            yield Problem(ProblemKind.MANIFEST, "manifest.json", "it says other things than the map")

    def _check(self, name: str, *, quick: bool) -> FileCheck:
        if name not in self._maps:
            folder = "tokens" if name in self._tokens else "errors"
            return FileCheck((Problem(ProblemKind.INCOMPLETE, f"{folder}/{name}", "no map in shards/ has it"),))
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
                yield Problem(kind, f"{folder}/{file.name}", f"{found:,} bytes of {mark.num_bytes:,}")

    def _contents(self, file: FileDone, places: list[ShardPlace]) -> Iterator[Problem]:
        errors, folder = b"", "errors"
        try:
            if file.errors_mark.num_bytes:
                errors = read_marked(self.output.errors(file.name), file.errors_mark)
            folder = "tokens"
            rows = read_marked(self.output.part(file.name), file.mark)
            for fault in compact_file.faults(places, rows, errors, self.table):
                yield Problem(ProblemKind.WRONG, f"tokens/{file.name}", fault)
        except Damaged as error:
            yield Problem(ProblemKind.TORN, f"{folder}/{file.name}", str(error))


def _size(there: Mapping[str, ObjectInfo], name: str) -> int:
    return there[name].size_bytes if name in there else 0
