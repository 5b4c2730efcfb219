"""Whether something can be put where it is wanted, asked before the work and not after it. Of a local disk only: a
store tells when it is written to."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline import storage
from pipeline.errors import PipelineError


def require_file_place(url: str) -> None:
    """Raises PipelineError where no file can be written at `url`."""
    if (path := _local(url)) is None:
        return
    if path.is_dir():
        raise PipelineError(f"{path} is a folder: name a file in it")
    _require_folder(path.parent)


def require_folder_place(url: str) -> None:
    """Raises PipelineError where no file can be written below `url`."""
    if (path := _local(url)) is not None:
        _require_folder(path)


def _local(url: str) -> Path | None:
    place = storage.normalize(url)
    return Path(place) if storage.is_local(place) else None


def _require_folder(folder: Path) -> None:
    """Folders that are not there yet are made when it is written."""
    there = next(one for one in (folder, *folder.parents) if one.exists())
    if not there.is_dir():
        raise PipelineError(f"{there} is a file, so nothing can be put below it: name another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PipelineError(f"there is no permission to write into {there}: name another place")
