"""The files that torch.save and safetensors write → a tree of plain values whose tensors are read when they are wanted.

Three forms: torch's zip archive (since 1.6), its first format (pickles, then the storages), and safetensors. What a
file declares is held against what it has before anything of it is read, so no file makes memory of more than
`MAX_RATIO` times its size. The pickles are foreign_pickle.py's business, and torch.load is never called.
"""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from model.foreign_names import ForeignFileError, StorageRef, TensorRef, is_count
from model.foreign_pickle import read_pickle

MAX_PICKLE_BYTES = 8 << 20  # the pickle of a model with thousands of tensors and its optimiser takes a tenth of it
MAX_RATIO = 20  # of all bytes unpacked to those of the file; weights hardly shrink, and torch.save packs nothing
SLACK_BYTES = 1 << 20
FLOATS = ("float32", "float16", "bfloat16")  # what fp32 holds exactly
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch's first format
SAFETENSORS = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
BIG_ENDIAN = "was written on a big-endian machine: save it again on a little-endian one"
WEB_PAGE = "is a web page, not a file of weights: the download went wrong; fetch it again"
NO_CRC = "or it was saved after torch.serialization.set_crc32_options(False): save it again without that"
NOT_WEIGHTS = {  # how other things begin that are downloaded in place of weights
    **dict.fromkeys((b"<!", b"<h", b"<H", b"<?"), WEB_PAGE),  # more than "<", which begins a safetensors file too
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself: run `git lfs pull`",
    b"\x1f\x8b\x08": "is compressed by gzip: unpack it first",
}


class Storages(Protocol):
    def check(self, storage: StorageRef) -> None:
        """Raises ForeignFileError where the file holds another number of bytes, by what it declares."""

    def read(self, storage: StorageRef) -> bytes:
        """Exactly the storage's bytes. Raises ForeignFileError where they are damaged."""


class ForeignFile:
    """`value`: dicts, lists, texts, numbers, stand-ins and TensorRefs."""

    def __init__(self, name: str, value: Any, storages: Storages) -> None:
        self.name, self.value, self._storages = name, value, storages

    def check(self, wanted: Mapping[str, TensorRef]) -> None:
        """Each is a part of what the file holds, and no number is in two of them: nothing that is made of them can be
        larger than the file. Raises ForeignFileError."""
        taken: Counter[str] = Counter()
        for name, ref in wanted.items():
            if ref.storage.dtype not in FLOATS:
                raise ForeignFileError(f"{self.name}: {name!r} is {ref.storage.dtype}; weights are {', '.join(FLOATS)}")
            self._storages.check(ref.storage)
            last = ref.offset + sum((size - 1) * stride for size, stride in zip(ref.shape, ref.stride, strict=True))
            taken[ref.storage.key] += math.prod(ref.shape)
            if 0 in ref.shape or last >= ref.storage.numel or taken[ref.storage.key] > ref.storage.numel:
                raise ForeignFileError(f"{self.name}: {name!r} is larger than what the file holds of it")

    def tensors(self, wanted: Mapping[str, TensorRef]) -> dict[str, Tensor]:
        """Read in fp32, contiguous; fp16 and bf16 become fp32 exactly. Raises ForeignFileError, as `check` does."""
        self.check(wanted)
        by_storage: dict[StorageRef, list[str]] = {}
        for name, ref in wanted.items():
            by_storage.setdefault(ref.storage, []).append(name)
        made: dict[str, Tensor] = {}
        for storage, names in by_storage.items():  # each is read once, however many tensors lie in it
            numbers = torch.frombuffer(bytearray(self._storages.read(storage)), dtype=getattr(torch, storage.dtype))
            made |= {name: self._tensor(name, wanted[name], numbers) for name in names}
        return {name: made[name] for name in wanted}

    def _tensor(self, name: str, ref: TensorRef, numbers: Tensor) -> Tensor:
        view = numbers.as_strided(ref.shape, ref.stride, ref.offset)
        tensor = view.to(torch.float32).clone(memory_format=torch.contiguous_format)
        if not bool(torch.isfinite(tensor).all()):
            raise ForeignFileError(f"{self.name}: {name!r} holds numbers that are not finite")
        return tensor


def read_foreign(file: BinaryIO, name: str) -> ForeignFile:
    """`file` can be sought in, and stays open for as long as tensors are read. Raises ForeignFileError naming the file
    as `name`, and what it is instead."""
    start = file.read(64)
    file.seek(0)
    for beginning, what in NOT_WEIGHTS.items():
        if start.lstrip().startswith(beginning):
            raise ForeignFileError(f"{name} {what}")
    if not start:
        raise ForeignFileError(f"{name} is empty")
    if start.startswith(b"PK"):
        archive = _Archive(file, name)
        return ForeignFile(name, archive.value(), archive)
    if start[:1] == b"\x80":
        return _read_first_format(file, name)
    if start[8:9] == b"{":
        return _read_safetensors(file, name)
    raise ForeignFileError(f"{name} is no file of weights: it is none that torch.save or safetensors writes")


def _size(file: BinaryIO) -> int:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size


def _num_bytes(storage: StorageRef) -> int:
    itemsize: int = getattr(torch, storage.dtype).itemsize
    return storage.numel * itemsize


class _Archive:
    """A zip archive of torch.save, what it declares checked."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        num_bytes, self._name = _size(file), name
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
        path, needed = self._path(storage), _num_bytes(storage)
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


class _PlacedStorages:
    """Storages that lie in the file itself, each from a known byte on."""

    def __init__(self, file: BinaryIO, name: str, starts: Mapping[str, int]) -> None:
        self._file, self._name, self._starts = file, name, starts

    def check(self, storage: StorageRef) -> None:
        """Done when the file was opened."""

    def read(self, storage: StorageRef) -> bytes:
        self._file.seek(self._starts[storage.key])
        data = self._file.read(_num_bytes(storage))
        if len(data) != _num_bytes(storage):
            raise ForeignFileError(f"{self._name} is cut short within the storage {storage.key!r}")
        return data


def _read_first_format(file: BinaryIO, name: str) -> ForeignFile:
    """Five pickles: magic number, version, about the machine, the object, the keys of its storages; then those."""
    num_bytes, head = _size(file), io.BytesIO(file.read(MAX_PICKLE_BYTES))
    if read_pickle(head, name) != MAGIC or read_pickle(head, name) != PROTOCOL:
        raise ForeignFileError(
            f"{name} is a plain pickle, not a file of torch.save: refused, and nothing in it was run"
        )
    machine = read_pickle(head, name)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ForeignFileError(f"{name} {BIG_ENDIAN}")
    storages: dict[str, StorageRef] = {}
    value, keys = read_pickle(head, name, storages), read_pickle(head, name)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(storages):
        raise ForeignFileError(f"{name}: the storages that it lists are not those that its tensors need")
    return ForeignFile(name, value, _placed(file, name, num_bytes, head.tell(), [storages[key] for key in keys]))


def _placed(file: BinaryIO, name: str, num_bytes: int, position: int, storages: list[StorageRef]) -> _PlacedStorages:
    """Eight bytes say how many elements a storage has; then it comes."""
    starts: dict[str, int] = {}
    for storage in storages:
        file.seek(position)
        found = int.from_bytes(file.read(8), "little")
        starts[storage.key] = position + 8
        position += 8 + _num_bytes(storage)
        if found != storage.numel or position > num_bytes:
            raise ForeignFileError(
                f"{name} is damaged or cut short: it does not hold the {storage.numel:,} numbers of {storage.key!r}"
            )
    if position != num_bytes:
        raise ForeignFileError(f"{name} has {num_bytes - position:,} bytes after its last storage: refused")
    return _PlacedStorages(file, name, starts)


def _read_safetensors(file: BinaryIO, name: str) -> ForeignFile:
    """Eight bytes say how long the JSON is that describes the tensors; they follow it."""
    num_bytes, header_bytes = _size(file), int.from_bytes(file.read(8), "little")
    if header_bytes > min(MAX_PICKLE_BYTES, num_bytes - 8):
        raise ForeignFileError(
            f"{name} is no whole safetensors file: its header of {header_bytes:,} bytes is not there"
        )
    try:
        header = json.loads(file.read(header_bytes))
        entries = {key: each for key, each in header.items() if key != "__metadata__"}
        value = {key: _described(key, each) for key, each in entries.items()}
        starts = {key: 8 + header_bytes + int(each["data_offsets"][0]) for key, each in entries.items()}
        ends = [8 + header_bytes + int(each["data_offsets"][1]) for each in entries.values()]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError) as error:
        raise ForeignFileError(f"{name} is no safetensors file: its header cannot be read ({error})") from error
    if sum(_num_bytes(ref.storage) for ref in value.values()) > num_bytes:
        raise ForeignFileError(f"{name} declares more than its {num_bytes:,} bytes: refused unread")
    for (key, ref), end in zip(value.items(), ends, strict=True):
        if starts[key] < 8 + header_bytes or end > num_bytes or end - starts[key] != _num_bytes(ref.storage):
            raise ForeignFileError(f"{name}: {key!r} does not lie within the file, which is damaged or cut short")
    return ForeignFile(name, value, _PlacedStorages(file, name, starts))


def _described(key: str, entry: dict[str, Any]) -> TensorRef:
    shape = tuple(entry["shape"])
    if len(shape) > 8 or not all(map(is_count, (*shape, *entry["data_offsets"]))):
        raise ValueError(f"the shape or the place of {key!r}")
    if entry["dtype"] not in SAFETENSORS:
        raise ValueError(f"{key!r} is of type {entry['dtype']!r}; known are {', '.join(SAFETENSORS)}")
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return TensorRef(StorageRef(key, SAFETENSORS[entry["dtype"]], math.prod(shape)), 0, shape, stride)
