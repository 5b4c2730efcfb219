"""One run's output prefix: where its files lie, and what the run is (run.json). Refuses to mix two runs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.errors import Damaged, NoRun, RunMismatch
from pipeline.records import ObjectInfo
from pipeline.shard_patterns import SHARD_SUFFIXES
from pipeline.token_table import TableSpec

RUN_FORMAT = 1
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class OutputPrefix:
    """Names below one output URL; nothing is read or written until asked."""

    url: str

    def tokens_folder(self) -> str:
        return storage.join(self.url, "tokens")

    def errors_folder(self) -> str:
        return storage.join(self.url, "errors")

    def ledger_folder(self) -> str:
        return storage.join(self.url, "ledger")

    def part(self, name: str) -> str:
        return storage.join(self.url, "tokens", name)

    def errors(self, name: str) -> str:
        return storage.join(self.url, "errors", name)

    def file(self, name: str) -> str:
        return storage.join(self.url, name)


def part_name(shard_url: str) -> str:
    """From the shard's own name and a hash of its URL, so that a growing list of shards keeps its names."""
    url = storage.public_url(shard_url)
    stem = storage.base_name(url)
    for suffix in SHARD_SUFFIXES:
        stem = stem[: -len(suffix)] if stem.lower().endswith(suffix) else stem
    # Readers of a folder of Parquet files pass over names that begin with a dot or an underscore.
    stem = _UNSAFE.sub("_", stem).lstrip("._")[:100] or "shard"
    return f"{stem}-{hashlib.sha256(url.encode()).hexdigest()[:8]}.parquet"


@dataclass(frozen=True)
class RunDescription:
    """What the token rows depend on. `numerics` (precision, device, batch shape, threads) may be changed on
    resume only by an explicit option, and each that was used is recorded."""

    table: TableSpec
    options: Mapping[str, Any]
    numerics: Mapping[str, Any]

    def identity(self) -> dict[str, Any]:
        return {"format": RUN_FORMAT, **self.table.to_json(), "options": dict(self.options)}


def check_run(output: OutputPrefix, run: RunDescription, *, accept_numerics: bool) -> None:
    """Raises RunMismatch when the output holds the results of another run, naming the field, both values and the
    remedy. A run.json with nothing beside it is a start that came to nothing, and binds nobody."""
    _require_same(output, read_run(output), run, accept_numerics)


def _require_same(
    output: OutputPrefix, stored: dict[str, Any] | None, run: RunDescription, accept_numerics: bool
) -> None:
    problem = _unknown_maker(output) if stored is None else _mismatch(output, stored, run, accept_numerics)
    if problem is not None and _has_results(output):
        raise RunMismatch(problem)


def claim(output: OutputPrefix, run: RunDescription, *, accept_numerics: bool) -> None:
    """As `check_run`, then write run.json in place of just what was checked. Only for whoever holds the prefix."""
    url = output.file("run.json")
    there = _bytes_or_none(url)
    _require_same(output, None if there is None else _parse(url, there), run, accept_numerics)
    stored = {} if there is None else _parse(url, there)
    same = _mismatch(output, stored, run, accept_numerics) is None
    used = (stored.get("numerics") or []) if same else []
    if same and dict(run.numerics) in used:
        return
    mine = _run_json(run, [*used, dict(run.numerics)])
    if not (storage.create(url, mine) if there is None else storage.swap(url, mine, there)):
        raise RunMismatch(f"{storage.public_url(url)} was written by another driver at the same moment; run again")


def _has_results(output: OutputPrefix) -> bool:
    folders = (output.tokens_folder(), output.errors_folder(), output.ledger_folder())
    return any(storage.list_files(folder) for folder in folders)


def read_run(output: OutputPrefix) -> dict[str, Any] | None:
    """run.json, or None where there is none. Raises Damaged, StorageError."""
    return read_json(output.file("run.json"))


def require_run(output: OutputPrefix) -> dict[str, Any]:
    """run.json of a tokenising run. Raises NoRun where there is none (a training output has one of another kind)."""
    run = read_run(output)
    if run is None or "tokenizer_id" not in run:
        what = "holds no run (no run.json)" if run is None else "is the output of another command"
        raise NoRun(f"{storage.public_url(output.url)} {what}; name the output of `dvae tokenize`")
    return run


def table_of(output: OutputPrefix, run: Mapping[str, Any]) -> TableSpec:
    """The token table that run.json tells of. Raises RunMismatch when it is of a version that is not known here."""
    try:
        return TableSpec.from_json(run)
    except (ValueError, KeyError, TypeError) as error:
        raise RunMismatch(f"{storage.public_url(output.file('run.json'))} is of another version: {error}") from error


def read_json(url: str) -> dict[str, Any] | None:
    """An object of JSON, or None where there is none. Raises Damaged, StorageError."""
    data = _bytes_or_none(url)
    return None if data is None else _parse(url, data)


def _bytes_or_none(url: str) -> bytes | None:
    try:
        return storage.read_bytes(url)
    except FileNotFoundError:
        return None


def _parse(url: str, data: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(data))
    except (ValueError, TypeError) as error:
        raise Damaged(f"{storage.public_url(url)} is damaged: {error}") from error


def _mismatch(output: OutputPrefix, stored: dict[str, Any], run: RunDescription, accept_numerics: bool) -> str | None:
    where = storage.public_url(output.url)
    identity = {name: value for name, value in stored.items() if name != "numerics"}
    for name, here, there in _differences("", run.identity(), identity):
        return (
            f"{where} holds another run: {name} is {there!r} there and {here!r} here; "
            "choose another output, or go back to the settings of that run"
        )
    used = stored.get("numerics") or [{}]
    if accept_numerics or dict(run.numerics) in used:
        return None
    name, here, there = next(_differences("numerics.", dict(run.numerics), used[-1]))
    return (
        f"{where} was made with {name} {there!r}, here it is {here!r}: tokens may differ near ties; "
        "go back to that setting, or accept it with accept_numerics=true (which is recorded)"
    )


def _differences(prefix: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in [*here, *(n for n in there if n not in here)]:
        mine, theirs = here.get(name), there.get(name)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            yield from _differences(f"{prefix}{name}.", mine, theirs)
        elif mine != theirs:
            yield f"{prefix}{name}", mine, theirs


def _unknown_maker(output: OutputPrefix) -> str:
    return (
        f"{storage.public_url(output.url)} has parts but no run.json, so nobody knows what made them; "
        "choose another output"
    )


def _run_json(run: RunDescription, numerics: list[dict[str, Any]]) -> bytes:
    return json.dumps({**run.identity(), "numerics": numerics}, indent=2, sort_keys=True).encode()


def listed(folder_url: str) -> dict[str, ObjectInfo]:
    """The objects of one folder by file name."""
    return {storage.base_name(info.url): info for info in storage.list_files(folder_url)}
