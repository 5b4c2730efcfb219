"""Whole files on a local (or mounted) disk: written aside, then moved or linked into place."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def write_whole(path: Path, data: bytes) -> None:
    """`data` appears at `path` whole or not at all, replacing what was there."""
    _with_temporary(path, data, os.replace)


def create_whole(path: Path, data: bytes) -> None:
    """As `write_whole`, but raises FileExistsError where something is."""
    _with_temporary(path, data, _link)


def is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def temporaries(folder: Path) -> list[Path]:
    """What killed writers left, and what those at work are writing."""
    return sorted(folder.rglob(".*.tmp"))


def remove_temporaries(folder: Path) -> None:
    for path in temporaries(folder):
        path.unlink(missing_ok=True)


def remove_tree(folder: Path) -> None:
    """The folder and all in it; one that is not there is no error."""
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)


def _link(temporary: Path, path: Path) -> None:
    """A link fails where something is, at one stroke. Some mounts know no links: look there, then rename."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, "exists", str(path)) from error
        temporary.replace(path)


def _with_temporary(path: Path, data: bytes, finish: Callable[[Path, Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        finish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
