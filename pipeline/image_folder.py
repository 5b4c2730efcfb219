"""Which files of a folder make a sample, and under which key. Opens no file: bytes are pack.py's.

A sample is an image with the `.txt` and `.json` of the same stem beside it. Its key is the path without
the extension, escaped so that WebDataset's rules (the key ends at the first dot of the base name; a top
folder like `__this__` is skipped) give it back whole: `urllib.parse.unquote(key)` is the path again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath

from pipeline.errors import PipelineError
from pipeline.shards import IMAGE_EXTENSIONS

SIDECAR_EXTENSIONS = frozenset({"txt", "json"})
_MOST_NAMED = 5  # of the files that a message names


class PackError(PipelineError):
    """A folder cannot be packed, or not into that output."""


class Why(StrEnum):
    """Why a file is in no shard."""

    NO_IMAGE = "no image of this name beside it"
    UNKNOWN_EXTENSION = "neither an image nor .txt or .json"
    HIDDEN = "hidden"
    NOT_A_FILE = "not a file: a link to a folder or to nothing, a socket, a pipe"


@dataclass(frozen=True)
class LeftOut:
    path: str  # relative to the folder
    why: Why

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


@dataclass(frozen=True, slots=True)
class SourceFile:
    path: str
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class FolderSample:
    key: str
    files: tuple[tuple[str, SourceFile], ...]  # (extension in lower case, file), by extension as in the tar


@dataclass(frozen=True)
class FolderListing:
    samples: tuple[FolderSample, ...]  # by key
    left_out: tuple[LeftOut, ...]  # by path


def list_folder(folder: str | os.PathLike[str]) -> FolderListing:
    """The samples of a folder and its sub-folders, in key order. Raises PackError."""
    root = Path(folder)
    if not root.is_dir():
        raise PackError(f"{folder} is not a folder; name a local folder with images in it")
    found: dict[tuple[str, str], list[tuple[str, SourceFile]]] = {}
    left_out: list[LeftOut] = []
    for relative, entry in _walk(root):
        stem, extension = _split(relative.name)
        if why := _why_not(relative, entry, extension):
            left_out.append(LeftOut(str(relative), why))
        else:
            status = entry.stat()
            file = SourceFile(entry.path, status.st_size, status.st_mtime_ns)
            found.setdefault((str(relative.parent), stem), []).append((extension, file))
    samples = _samples(root, found, left_out)
    return FolderListing(tuple(samples), tuple(sorted(left_out, key=lambda one: one.path)))


def webdataset_key(relative: PurePosixPath, stem: str) -> str:
    """The key of the file `stem`.* in the folder of `relative`; `unquote` turns it back into the path."""
    parts = [_escaped(part) for part in relative.parent.parts] + [_escaped(stem).replace(".", "%2E")]
    if len(parts) > 1 and re.fullmatch(r"__.*__", parts[0]):
        parts[0] = "%5F" + parts[0][1:]  # webdataset takes such a folder for its own and skips it
    return "/".join(parts)


def _escaped(name: str) -> str:
    return re.sub(r"[%\x00-\x1f\x7f]", lambda match: f"%{ord(match[0]):02X}", name)


def _walk(root: Path) -> Iterator[tuple[PurePosixPath, os.DirEntry[str]]]:
    """Every entry below `root` that is no plain folder. A folder that cannot be read raises PackError."""
    pending = [root]
    while pending:
        try:
            with os.scandir(pending.pop()) as scan:
                entries = list(scan)
        except OSError as error:
            raise PackError(f"cannot read the folder {error.filename}: {error.strerror}") from error
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                pending.append(Path(entry.path))
            else:
                yield PurePosixPath(Path(entry.path).relative_to(root).as_posix()), entry


def _split(name: str) -> tuple[str, str]:
    """At the last dot: the stem, and the extension in lower case."""
    stem, _, extension = name.rpartition(".")
    return stem, extension.lower()


def _why_not(relative: PurePosixPath, entry: os.DirEntry[str], extension: str) -> Why | None:
    if relative.name.startswith("."):
        return Why.HIDDEN
    if not entry.is_file():
        return Why.NOT_A_FILE
    if "." not in relative.name or extension not in SIDECAR_EXTENSIONS.union(IMAGE_EXTENSIONS):
        return Why.UNKNOWN_EXTENSION
    return None


def _samples(
    root: Path, found: dict[tuple[str, str], list[tuple[str, SourceFile]]], left_out: list[LeftOut]
) -> list[FolderSample]:
    """Group into samples; sidecars without an image are left out. Raises PackError on two of one name."""
    samples, clashes = [], []
    for (parent, stem), files in found.items():
        images = [file for extension, file in files if extension in IMAGE_EXTENSIONS]
        if not images:
            left_out += [LeftOut(_relative(root, file), Why.NO_IMAGE) for _, file in files]
        elif len(images) > 1 or len({extension for extension, _ in files}) < len(files):
            clashes.append(" and ".join(sorted(_relative(root, file) for _, file in files)))
        else:
            key = webdataset_key(PurePosixPath(parent) / "x", stem)
            samples.append(FolderSample(key, tuple(sorted(files, key=lambda pair: pair[0]))))
    _refuse(clashes, "share one name, so they would be one sample; rename one of each")
    _refuse([s.key for s in samples if not _is_utf8(s.key)], "are file names that are not UTF-8; rename them")
    return sorted(samples, key=lambda sample: sample.key)


def _relative(root: Path, file: SourceFile) -> str:
    return Path(file.path).relative_to(root).as_posix()


def _is_utf8(name: str) -> bool:
    return not re.search(r"[\ud800-\udfff]", name)  # how Python shows bytes of a name that are not UTF-8


def _refuse(names: list[str], rule: str) -> None:
    if names:
        shown = "; ".join(ascii(n) if not _is_utf8(n) else n for n in sorted(names)[:_MOST_NAMED])
        more = f"; and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        raise PackError(f"{shown}{more}: {rule}")
