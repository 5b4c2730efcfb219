"""The files that torch.save and safetensors write → a tree of plain values whose tensors are read when they are wanted.

Three forms: torch's zip archive (since 1.6), its first format (pickles, then the storages), and safetensors. What a
file declares is held against what it has before anything of it is read. The archive is foreign_archive.py's
business, pickles are foreign_pickle.py's, and torch.load is never called.
"""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from model.foreign_archive import BIG_ENDIAN, MAX_PICKLE_BYTES, Archive, num_bytes_of, size_of
from model.foreign_names import ForeignFileError, StorageRef, TensorRef, is_count
from model.foreign_pickle import read_pickle

FLOATS = ("float32", "float16", "bfloat16")  # what fp32 holds exactly
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch's first format
SAFETENSORS = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
WEB_PAGE = "is a web page, not a file of weights: the download went wrong; fetch it again"
NOT_WEIGHTS = {  # how other things begin that are downloaded in place of weights
    **dict.fromkeys((b"<!", b"<h", b"<H"), WEB_PAGE),  # more than "<", which begins a safetensors file too
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
                raise ForeignFileError(
                    f"{self.name}: {name!r} is larger than what the file holds of it, or shares it with another tensor "
                    "(then save .contiguous().clone() of each)"
                )

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
    if not start.strip():
        raise ForeignFileError(f"{name} is empty")
    if start.startswith(b"PK"):
        archive = Archive(file, name)
        return ForeignFile(name, archive.value(), archive)
    if start[:1] == b"\x80":
        return _read_first_format(file, name)
    if start[8:9] == b"{":
        return _read_safetensors(file, name)
    raise ForeignFileError(
        f"{name} is no file of weights: it is none that torch.save or safetensors writes{_told(start)}"
    )


def _told(start: bytes) -> str:
    """What a text says: the answer of a server that refused, often."""
    text = start.removeprefix(b"\xef\xbb\xbf").decode("ascii", "replace").strip()
    line = text.partition("\n")[0].strip()
    return f"; it is a text: {line!r}" if line.isprintable() and line.isascii() else ""


class _PlacedStorages:
    """Storages that lie in the file itself, each from a known byte on."""

    def __init__(self, file: BinaryIO, name: str, starts: Mapping[str, int]) -> None:
        self._file, self._name, self._starts = file, name, starts

    def check(self, storage: StorageRef) -> None:
        """Done when the file was opened."""

    def read(self, storage: StorageRef) -> bytes:
        self._file.seek(self._starts[storage.key])
        data = self._file.read(num_bytes_of(storage))
        if len(data) != num_bytes_of(storage):
            raise ForeignFileError(f"{self._name} is cut short within the storage {storage.key!r}")
        return data


def _read_first_format(file: BinaryIO, name: str) -> ForeignFile:
    """Five pickles: magic number, version, about the machine, the object, the keys of its storages; then those."""
    num_bytes, head = size_of(file), io.BytesIO(file.read(MAX_PICKLE_BYTES))
    if read_pickle(head, name) != MAGIC or read_pickle(head, name) != PROTOCOL:
        raise ForeignFileError(
            f"{name} is a plain pickle, not a file of torch.save: refused, and nothing in it was run"
        )
    machine = read_pickle(head, name)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ForeignFileError(f"{name} {BIG_ENDIAN}")
    storages: dict[str, StorageRef] = {}
    value, keys = read_pickle(head, name, storages), read_pickle(head, name)
    are_texts = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not are_texts or len(keys) != len(storages) or set(keys) != storages.keys():
        raise ForeignFileError(f"{name}: the storages that it lists are not those that its tensors need")
    return ForeignFile(name, value, _placed(file, name, num_bytes, head.tell(), [storages[key] for key in keys]))


def _placed(file: BinaryIO, name: str, num_bytes: int, position: int, storages: list[StorageRef]) -> _PlacedStorages:
    """Eight bytes say how many elements a storage has; then it comes."""
    starts: dict[str, int] = {}
    for storage in storages:
        file.seek(position)
        found = int.from_bytes(file.read(8), "little")
        starts[storage.key] = position + 8
        position += 8 + num_bytes_of(storage)
        if found != storage.numel or position > num_bytes:
            raise ForeignFileError(
                f"{name} is damaged or cut short: it does not hold the {storage.numel:,} numbers of {storage.key!r}"
            )
    if position != num_bytes:
        raise ForeignFileError(f"{name} has {num_bytes - position:,} bytes after its last storage: refused")
    return _PlacedStorages(file, name, starts)


def _read_safetensors(file: BinaryIO, name: str) -> ForeignFile:
    """Eight bytes say how long the JSON is that describes the tensors; they follow it."""
    num_bytes, header_bytes = size_of(file), int.from_bytes(file.read(8), "little")
    if header_bytes > min(MAX_PICKLE_BYTES, num_bytes - 8):
        raise ForeignFileError(
            f"{name} is no whole safetensors file: its header of {header_bytes:,} bytes is not there"
        )
    try:
        header = json.loads(file.read(header_bytes), object_pairs_hook=_each_once)
        entries = {key: each for key, each in header.items() if key != "__metadata__"}
        value = {key: _described(key, each) for key, each in entries.items()}
        places = {key: tuple(map(int, each["data_offsets"])) for key, each in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError) as error:
        raise ForeignFileError(f"{name} is no safetensors file: its header cannot be read ({error})") from error
    body = 8 + header_bytes
    needed = {key: num_bytes_of(ref.storage) for key, ref in value.items()}
    _check_places({key: (*places[key], needed[key]) for key in value}, num_bytes - body, name)
    return ForeignFile(name, value, _PlacedStorages(file, name, {key: body + each[0] for key, each in places.items()}))


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a name that stands twice in JSON one reader takes the first, another the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _check_places(places: dict[str, tuple[int, ...]], num_bytes: int, name: str) -> None:
    """(start, end, bytes that the tensor needs) of each: they lie one behind another and fill the file, as safetensors
    itself demands."""
    position = 0
    for key, (start, end, needed) in sorted(places.items(), key=lambda each: each[1]):
        if start != position or end - start != needed or end > num_bytes:
            raise ForeignFileError(f"{name}: {key!r} does not lie within the file, which is damaged or cut short")
        position = end
    if position != num_bytes:
        raise ForeignFileError(f"{name} has {num_bytes - position:,} bytes after its last tensor: refused")


def _described(key: str, entry: dict[str, Any]) -> TensorRef:
    shape = tuple(entry["shape"])
    if len(shape) > 8 or not all(map(is_count, (*shape, *entry["data_offsets"]))):
        raise ValueError(f"the shape or the place of {key!r}")
    if entry["dtype"] not in SAFETENSORS:
        raise ValueError(f"{key!r} is of type {entry['dtype']!r}; known are {', '.join(SAFETENSORS)}")
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return TensorRef(StorageRef(key, SAFETENSORS[entry["dtype"]], math.prod(shape)), 0, shape, stride)
