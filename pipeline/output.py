"""One run's output prefix: where its files lie, and what the run is (run.json). Refuses to mix two runs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.errors import RunMismatch, StorageError
from pipeline.records import ObjectInfo
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
    for suffix in storage.SHARD_SUFFIXES:
        stem = stem.removesuffix(suffix)
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


def claim(output: OutputPrefix, run: RunDescription, *, accept_numerics: bool) -> None:
    """Write run.json, or check that it describes this run. Raises RunMismatch naming the field, both values and
    the remedy."""
    stored = read_run(output)
    if stored is None:
        _refuse_unknown_parts(output)
        if storage.create(output.file("run.json"), _run_json(run, [dict(run.numerics)])):
            return
        stored = read_run(output) or {}
    check_run(output, stored, run, accept_numerics=accept_numerics)
    used = stored.get("numerics") or []
    if dict(run.numerics) not in used:
        storage.publish(output.file("run.json"), _run_json(run, [*used, dict(run.numerics)]))


def read_run(output: OutputPrefix) -> dict[str, Any] | None:
    """run.json, or None where there is none. Raises StorageError when it is damaged."""
    return read_json(output.file("run.json"))


def read_manifest(output: OutputPrefix) -> dict[str, Any] | None:
    """manifest.json, which is there only when every shard of the last plan is accounted for."""
    return read_json(output.file("manifest.json"))


def read_json(url: str) -> dict[str, Any] | None:
    """An object of JSON, or None where there is none. Raises StorageError when it is damaged."""
    try:
        return dict(json.loads(storage.read_bytes(url)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise StorageError(f"{storage.public_url(url)} is damaged: {error}") from error


def check_run(output: OutputPrefix, stored: dict[str, Any], run: RunDescription, *, accept_numerics: bool) -> None:
    where = storage.public_url(output.url)
    for name, here, there in _differences("", run.identity(), {k: v for k, v in stored.items() if k != "numerics"}):
        raise RunMismatch(
            f"{where} holds another run: {name} is {there!r} there and {here!r} here; "
            "choose another output, or go back to the settings of that run"
        )
    used = stored.get("numerics") or [{}]
    if accept_numerics or dict(run.numerics) in used:
        return
    name, here, there = next(_differences("numerics.", dict(run.numerics), used[-1]))
    raise RunMismatch(
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


def _refuse_unknown_parts(output: OutputPrefix) -> None:
    if storage.list_files(output.tokens_folder()):
        raise RunMismatch(
            f"{storage.public_url(output.url)} has parts but no run.json, so nobody knows what made them; "
            "choose another output"
        )


def _run_json(run: RunDescription, numerics: list[dict[str, Any]]) -> bytes:
    return json.dumps({**run.identity(), "numerics": numerics}, indent=2, sort_keys=True).encode()


def listed(folder_url: str) -> dict[str, ObjectInfo]:
    """The objects of one folder by file name."""
    return {storage.base_name(info.url): info for info in storage.list_files(folder_url)}
