"""torch's zip archive: one pickle, and each storage as a member. What it declares is checked before any of it is
unpacked, so no file makes memory of more than `MAX_RATIO` times its size."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections import Counter
from typing import Any, BinaryIO

import torch

from model.foreign_names import ForeignFileError, StorageRef
from model.foreign_pickle import read_pickle

MAX_PICKLE_BYTES = 8 << 20  # the pickle of a model with thousands of tensors and its optimiser takes a tenth of it
MAX_MEMBERS = 100_000  # of an archive; each tensor is one
MAX_RATIO = 20  # of all bytes unpacked to those of the file; weights hardly shrink, and torch.save packs nothing
SLACK_BYTES = 1 << 20
BIG_ENDIAN = "was written on a big-endian machine: save it again on a little-endian one"
NO_CRC = "or it was saved after torch.serialization.set_crc32_options(False): save it again without that"


def size_of(file: BinaryIO) -> int:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size


def num_bytes_of(storage: StorageRef) -> int:
    itemsize: int = getattr(torch, storage.dtype).itemsize
    return storage.numel * itemsize


class Archive:
    """A zip archive of torch.save, what it declares checked."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        num_bytes, self._name = size_of(file), name
        try:
            self._zip = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
            raise ForeignFileError(f"{name} is cut short or damaged: no zip archive ends it ({error})") from error
        _check_members(self._zip.infolist(), num_bytes, name)
        self._sizes = {info.filename: info.file_size for info in self._zip.infolist()}
        self._root = _root(list(self._sizes), name)

    def value(self) -> Any:
        path = f"{self._root}/data.pkl"
        if self._sizes[path] > MAX_PICKLE_BYTES:
            raise ForeignFileError(f"{self._name}: {path} has more than {MAX_PICKLE_BYTES:,} bytes: refused unread")
        byte_order = f"{self._root}/byteorder"
        if self._sizes.get(byte_order) == len(b"big") and self._member(byte_order) == b"big":
            raise ForeignFileError(f"{self._name} {BIG_ENDIAN}")
        return read_pickle(io.BytesIO(self._member(path)), f"{self._name} ({path})")

    def check(self, storage: StorageRef) -> None:
        path, needed = self._path(storage), num_bytes_of(storage)
        if path not in self._sizes:
            raise ForeignFileError(f"{self._name} lacks its member {path}")
        if self._sizes[path] != needed:
            raise ForeignFileError(f"{self._name}: {path} has {self._sizes[path]:,} bytes; its tensor needs {needed:,}")

    def read(self, storage: StorageRef) -> bytes:
        return self._member(self._path(storage))

    def _path(self, storage: StorageRef) -> str:
        return f"{self._root}/data/{storage.key}"

    def _member(self, path: str) -> bytes:
        try:
            with self._zip.open(path) as member:  # ZipFile.read unpacks 2 GiB before it looks at the size
                data = member.read(self._sizes[path] + 1)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
            remedy = f"; {NO_CRC}" if "CRC" in str(error) else ""
            raise ForeignFileError(f"{self._name}: {path} is damaged ({error}){remedy}") from error
        if len(data) != self._sizes[path]:
            raise ForeignFileError(f"{self._name}: {path} has other than the {self._sizes[path]:,} bytes it declares")
        return data


def _check_members(infos: list[zipfile.ZipInfo], num_bytes: int, name: str) -> None:
    """What the archive's table of contents declares, before any of it is unpacked."""
    if len(infos) > MAX_MEMBERS:
        raise ForeignFileError(f"{name} has {len(infos):,} members, more than any model has tensors: refused")
    twice = [path for path, count in Counter(info.filename for info in infos).items() if count > 1]
    if twice:
        raise ForeignFileError(f"{name} has two members of the name {twice[0]!r}: refused")
    for info in infos:
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ForeignFileError(
                f"{name}: {info.filename} is encrypted or packed in a way that torch.save never uses"
            )
    packed, unpacked = sum(info.compress_size for info in infos), sum(info.file_size for info in infos)
    if packed > num_bytes or unpacked > MAX_RATIO * num_bytes + SLACK_BYTES:
        raise ForeignFileError(
            f"{name} has {num_bytes:,} bytes and declares {unpacked:,} unpacked: a zip bomb, refused unread "
            f"(at most {MAX_RATIO} times its size are allowed)"
        )


def _root(paths: list[str], name: str) -> str:
    """The folder of the one pickle that torch.save writes."""
    if any("/code/" in path or path.endswith("/constants.pkl") for path in paths):
        raise ForeignFileError(f"{name} is a TorchScript program: it holds code, not just weights; take the state dict")
    roots = [path.removesuffix("/data.pkl") for path in paths if path.endswith("/data.pkl") and path.count("/") == 1]
    if len(roots) != 1:
        raise ForeignFileError(f"{name} is a zip archive, but not one of torch.save: it needs one data.pkl")
    others = [path for path in paths if path.endswith((".pkl", ".pickle")) and path != f"{roots[0]}/data.pkl"]
    if others:
        raise ForeignFileError(f"{name} holds a second pickle, {others[0]!r}: refused, and nothing in it was run")
    return roots[0]
