"""`dvae import`: other people's weights → a checkpoint of ours, with a record of where they came from.

Nothing in a source is executed. The same sources give the same files, on every machine and every time.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape

from jobs.checkpoints import RECORD, file_reader, find_checkpoint
from jobs.foreign_source import SourceFile, SourceNotFound, open_source
from jobs.model_card import CARD, facts_of, model_card
from jobs.model_origin import ORIGINS, source_of
from model.checkpoint import WEIGHTS, checkpoint_files, read_checkpoint
from model.config import NO_DECODER, ArchitectureConfig, model_config
from model.foreign_file import read_foreign
from model.pretrained import WHAT_IS_READ, Pretrained, read_pretrained
from pipeline import storage
from pipeline.errors import PipelineError
from pipeline.image_spec import ImageSpec

ENCODER, DECODER = "encoder.pkl", "decoder.pkl"  # as OpenAI names them, in a folder that is given as the source
MAX_SOURCES = 2
# As OpenAI's notebook, which is our default; as DALLE-pytorch's train_vae.py, as near as can be said here.
IMAGE_SPECS = {"openai": ImageSpec(), "dalle_pytorch": ImageSpec(resample="bilinear", small="upscale")}


class CannotImport(PipelineError):
    """The sources or the destination are not what an import needs."""


@dataclass(frozen=True)
class Imported:
    """`files`: those of the checkpoint, its record last."""

    kind: str
    what: str
    sources: Mapping[str, Mapping[str, Any]]
    stored_as: tuple[str, ...]
    files: Mapping[str, bytes]
    card: bytes | None = None  # that of the source

    @property
    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self.files[RECORD])
        return record

    @property
    def has_decoder(self) -> bool:
        return bool(self.record.get("has_decoder", True))


def run_import(
    sources: Sequence[str], dest: str, *, licence: str | None, as_json: bool, image_size: int | None = None
) -> int:
    """Raises SourceNotFound, SourceChanged, CannotImport, CheckpointNotFound, StorageError, ModelError."""
    dest = storage.normalize(dest)
    _check_destination(sources, dest)
    imported = import_sources(sources, licence, image_size)
    _publish(imported, dest)
    report = _report(imported, dest)
    console = Console(soft_wrap=True, highlight=False)
    if as_json:
        console.print_json(json.dumps(report))
    else:
        for name, value in _lines(report):
            console.print(f"{name:<12}{escape(value)}")
    return 0


def import_sources(sources: Sequence[str], licence: str | None = None, image_size: int | None = None) -> Imported:
    """Reads all of it, writes nothing. `image_size`: pixels a side, in place of the source's own."""
    if not 1 <= len(sources) <= MAX_SOURCES:
        raise CannotImport(f"{len(sources)} sources: give one file, or an encoder's and a decoder's")
    urls = [url for source in sources for url in _files_at(storage.normalize(source))]
    if not urls:
        return _of_our_own(sources, licence, image_size)
    with ExitStack() as stack:
        opened = [stack.enter_context(open_source(url)) for url in urls]
        named = dict(zip(_names(opened), opened, strict=True))
        found = read_pretrained([read_foreign(each.file, name) for name, each in named.items()])
    return _of_others(found, {name: each.to_json() for name, each in named.items()}, licence, image_size)


def _files_at(url: str) -> list[str]:
    """The foreign files that a source names; none where it is a folder of ours."""
    if storage.stat(url) is not None:
        folder = url.rpartition("/")[0]
        if storage.base_name(url) in (WEIGHTS, RECORD) and storage.exists(storage.join(folder, RECORD)):
            raise CannotImport(f"{storage.public_url(url)} is part of a checkpoint of dvae: name its folder, {folder}")
        return [url]
    inside = [storage.join(url, name) for name in (ENCODER, DECODER)]
    found = [each for each in inside if storage.stat(each) is not None]
    if not found and not storage.list_files(url):
        raise SourceNotFound(f"nothing at {storage.public_url(url)}; {WHAT_IS_READ}")
    return found


def _names(opened: Sequence[SourceFile]) -> Iterator[str]:
    """By which the files are known in messages and in the record."""
    count = Counter(each.name for each in opened)
    for number, each in enumerate(opened, 1):
        yield each.name if count[each.name] == 1 else f"{each.name} ({number})"


def _of_others(found: Pretrained, sources: Mapping[str, Any], licence: str | None, image_size: int | None) -> Imported:
    source = {"kind": found.kind, "files": dict(sources), "stored_as": list(found.stored_as)}
    spec = IMAGE_SPECS[found.kind].to_json()
    files = checkpoint_files(
        weights=found.weights,
        dvae_config=found.config,
        image_spec=_with_size(spec, image_size or found.image_size, found.config),
        step=0,
        training_state=None,
        extra={"source": source | ({"license": licence} if licence else {})},
        has_decoder=found.has_decoder,
    )
    return Imported(found.kind, ORIGINS[found.kind].what, sources, found.stored_as, files)


def _with_size(image_spec: dict[str, Any], size: int | None, config: ArchitectureConfig) -> dict[str, Any]:
    """Raises CannotImport where no such images can be made here, or the model cannot take them."""
    given = image_spec if size is None else image_spec | {"size": size}
    try:
        spec = ImageSpec.from_json(given)
        config.grid(spec.size)
    except ValueError as error:
        raise CannotImport(f"images of {given.get('size')} pixels cannot be tokenised: {error}") from error
    return spec.to_json()


def _of_our_own(sources: Sequence[str], licence: str | None, image_size: int | None) -> Imported:
    """A checkpoint of ours, without what a resume needs, in the form of this version."""
    if len(sources) > 1:
        raise CannotImport(f"{sources[0]} is a folder: a checkpoint of dvae is imported by itself")
    url = find_checkpoint(sources[0])
    digests: dict[str, dict[str, Any]] = {}
    checkpoint = read_checkpoint(_noting(url, digests))
    before = source_of(checkpoint.extra)
    source = {"kind": "dvae", "files": digests} | ({"before": dict(before)} if before else {})
    licence = licence or before.get("license")
    files = checkpoint_files(
        weights=checkpoint.weights,
        dvae_config=checkpoint.dvae_config,
        image_spec=_with_size(checkpoint.image_spec, image_size, checkpoint.dvae_config),
        step=checkpoint.step,
        training_state=None,
        extra=checkpoint.extra | {"source": source | ({"license": licence} if licence else {})},
        has_decoder=checkpoint.has_decoder,
    )
    card = storage.join(url, CARD)
    told = storage.read_bytes(card) if image_size is None and storage.exists(card) else None  # figures of that size
    return Imported("dvae", "a checkpoint of dvae", digests, ("float32",), files, told)


def _noting(url: str, digests: dict[str, dict[str, Any]]) -> Callable[[str], bytes]:
    """Reads a checkpoint's files, and notes what they were."""
    read = file_reader(url)

    def noted(name: str) -> bytes:
        data = read(name)
        digests[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        return data

    return noted


def _check_destination(sources: Sequence[str], dest: str) -> None:
    """Before anything is read: what can be seen to be wrong."""
    if any(storage.normalize(source) == dest for source in sources):
        raise CannotImport(f"{storage.public_url(dest)} is both source and destination: name another folder at the end")
    if storage.is_local(dest) and storage.stat(dest) is not None:
        raise CannotImport(f"{dest} is a file: the last name is the folder for the checkpoint")
    if storage.exists(storage.join(dest, "run.json")):
        raise CannotImport(f"{storage.public_url(dest)} holds a run of dvae: name another folder")


def _publish(imported: Imported, dest: str) -> None:
    """The record comes last: it says that the rest is whole. Raises CannotImport where another model is there."""
    is_there = _check_there(imported, dest)
    card = storage.join(dest, CARD)
    record = storage.join(dest, RECORD)
    storage.remove(record)  # never an old record beside new files
    for name, data in imported.files.items():
        if name != RECORD:
            storage.publish(storage.join(dest, name), data)
    if not is_there or not storage.exists(card):  # it may have figures from `dvae eval`
        storage.publish(card, card_of(imported))
    storage.publish(record, imported.files[RECORD])


def _check_there(imported: Imported, dest: str) -> bool:
    """Whether this very import is there already; what may be replaced is one that was cut off, or the same encoder
    without its decoder, or with another licence in its record."""
    shown, new = storage.public_url(dest), imported.record
    try:
        data = storage.read_bytes(storage.join(dest, RECORD))
    except FileNotFoundError:
        weights = storage.stat(storage.join(dest, WEIGHTS))
        if weights is not None and weights.size_bytes != len(imported.files[WEIGHTS]):
            raise CannotImport(f"{shown} holds another {WEIGHTS}: name another folder") from None
        return False
    try:
        old = json.loads(data)
        same_model = old["tokenizer_id"] == new["tokenizer_id"]
        same_weights = same_model and old["files"][WEIGHTS]["sha256"] == new["files"][WEIGHTS]["sha256"]
        told = f"tokenizer {old['tokenizer_id']}, step {old['step']}"
    except (ValueError, KeyError, TypeError) as error:
        raise CannotImport(f"{shown} holds a {RECORD} that cannot be read ({error}): name another folder") from error
    if same_weights or (same_model and old.get("has_decoder") is False):
        return bool(data == imported.files[RECORD])
    if same_model:
        raise CannotImport(f"{shown} holds this encoder with a decoder ({told}): name another folder")
    raise CannotImport(f"{shown} holds another checkpoint ({told}): name another folder, or remove that one")


def card_of(imported: Imported) -> bytes:
    if imported.card is not None:
        return imported.card
    return model_card(facts_of(imported.record))


def _report(imported: Imported, dest: str) -> dict[str, Any]:
    record = imported.record
    config = model_config(record["model"])
    return {
        "checkpoint": storage.public_url(dest),
        "kind": imported.kind,
        "what": imported.what,
        "sources": {name: dict(each) for name, each in imported.sources.items()},
        "stored_as": list(imported.stored_as),
        "tokenizer_id": record["tokenizer_id"],
        "grid": list(config.grid(record["image_spec"]["size"])),
        "codebook_size": config.codebook_size,
        "image_spec": record["image_spec"],
        "has_decoder": imported.has_decoder,
        "bytes": len(imported.files[WEIGHTS]),
        "model_card": storage.public_url(storage.join(dest, CARD)),
    }


def _lines(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    height, width = report["grid"]
    yield "model", report["what"]
    for name, each in report["sources"].items():
        yield "source", f"{name}, {each['bytes']:,} bytes, sha256 {each['sha256']}"
    yield "tokenizer", f"{report['tokenizer_id']} · {height}x{width} tokens of {report['codebook_size']:,} codes"
    spec = report["image_spec"]
    yield "images", f"{spec['size']} pixels, {spec['resample']}; smaller ones: {spec['small']}"
    yield "wrote", f"{report['checkpoint']}, {report['bytes'] / 1e6:,.1f} MB; its licence and limits: {CARD}"
    if not report["has_decoder"]:
        yield "note", NO_DECODER
    yield "next", f"dvae tokenize tokenize.yaml checkpoint={report['checkpoint']} shards='SHARDS/*.tar' output=TOKENS"
