"""Whole files on a local (or mounted) disk: written aside, then moved or linked into place."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def write_whole(path: Path, data: bytes) -> None:
    """`data` appears at `path` whole or not at all, replacing what was there."""
    _with_temporary(path, data, os.replace)


def create_whole(path: Path, data: bytes) -> bool:
    """As `write_whole`, but only where nothing is; says whether `data` is there."""
    try:
        _with_temporary(path, data, _link)
    except FileExistsError:
        return _holds(path, data)
    return True


def swap_whole(path: Path, data: bytes, old: bytes) -> bool:
    """As `write_whole`, but only where `old` is; says whether `data` is there. The file that is replaced is its own
    lock: whoever waited for it finds another in its place."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return False
    with file:
        _lock(file)
        if _holds(path, old) and _is_still(file, path):
            write_whole(path, data)
            return True
    return _holds(path, data)


def _lock(file: BinaryIO) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:  # some mounts know none: there the two that meet may both believe they won
            raise


def _is_still(file: BinaryIO, path: Path) -> bool:
    return os.path.samestat(os.fstat(file.fileno()), path.stat())


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.read_bytes() == data
    except FileNotFoundError:  # whoever was there has gone meanwhile
        return False


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
