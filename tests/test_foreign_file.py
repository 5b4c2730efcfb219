"""Files of strangers are read without running anything in them, or refused by the name of what is wrong."""

from __future__ import annotations

import builtins
import encodings.cp437  # noqa: F401 - zipfile imports it when it first reads a name: not the file's doing
import io
import json
import os
import pickle
import struct
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors
from torch import nn

from foreign_files import Calls, Conv2d, archive, encoder, pickled, rewritten, saved
from model.foreign_file import ForeignFile, read_foreign
from model.foreign_modules import modules_of, state_dict
from model.foreign_names import ForeignFileError, Instance, StorageRef, TensorRef
from model.foreign_pickle import read_pickle

WEIGHTS = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.tensor(2.5)}


def opened(data: bytes) -> ForeignFile:
    return read_foreign(io.BytesIO(data), "x.pt")


def read_whole(data: bytes) -> dict[str, torch.Tensor]:
    """As an import does it, from a state dict or a module."""
    file = opened(data)
    refs = state_dict(file.value, file.name) if isinstance(file.value, Instance) else file.value
    assert isinstance(refs, dict)
    return file.tensors(refs)


# What is read


@pytest.mark.parametrize("first_format", [False, True])
def test_a_pickled_module_gives_its_own_state_dict_without_its_classes(first_format: bool) -> None:
    module = encoder()
    data = saved(module, first_format=first_format)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "dall_e", None)  # what imports it gets an ImportError, installed or not
        found = read_whole(data)
    assert list(found) == list(module.state_dict())
    assert all(torch.equal(found[name], each) for name, each in module.state_dict().items())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("first_format", [False, True])
def test_state_dicts_of_every_protocol_are_read(protocol: int, first_format: bool) -> None:
    found = read_whole(saved(WEIGHTS, protocol=protocol, first_format=first_format))
    assert all(torch.equal(found[name], each) for name, each in WEIGHTS.items())


def test_what_torch_and_attr_put_beside_the_weights_is_passed_over() -> None:
    state = encoder().state_dict()  # an OrderedDict with `_metadata`
    assert list(read_whole(saved(state))) == list(state)
    module = Conv2d(1, 1, 1)
    module.__dict__.update(size=None, hooks={"a", "b"}, kind="é", number=1 << 70, half=0.5, yes=True, no=[False])
    module.make = partial(Conv2d, 1, kw=3)
    for protocol in (2, 4):
        assert list(read_whole(saved(module, protocol=protocol))) == ["w", "b"]


def test_views_and_other_layouts_become_plain_tensors() -> None:
    whole = torch.arange(24.0).reshape(2, 3, 2, 2)
    views = {"last": whole.to(memory_format=torch.channels_last), "turned": torch.arange(6.0).reshape(2, 3).T}
    views["part"] = torch.arange(10.0)[4:7]
    found = read_whole(saved(views))
    assert all(torch.equal(found[name], each) and found[name].is_contiguous() for name, each in views.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shorter_floats_become_fp32_exactly(dtype: torch.dtype) -> None:
    values = torch.linspace(-3, 3, 50).to(dtype)
    (found,) = read_whole(saved({"a": values})).values()
    assert found.dtype == torch.float32 and torch.equal(found, values.float())


def test_safetensors_are_read_too() -> None:
    found = read_whole(save_safetensors(WEIGHTS))
    assert all(torch.equal(found[name], each) for name, each in WEIGHTS.items())


def test_an_archive_that_somebody_packed_again_is_read() -> None:
    with zipfile.ZipFile(io.BytesIO(saved(WEIGHTS))) as file:
        members = {info.filename.partition("/")[2]: file.read(info) for info in file.infolist()}
    found = read_whole(archive(members.pop("data.pkl"), members, packed=True))
    assert torch.equal(found["a"], WEIGHTS["a"])


# What is refused: file, and what its message says


def in_archive(value: object, protocol: int = 2) -> bytes:
    return archive(pickled(value, protocol))


def in_first_format(value: object) -> bytes:
    """The header of the format, this, and no storages."""
    about = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    parts = (0x1950A86A20F9469CFC6C, 1001, about, value, [])
    return b"".join(map(pickled, parts))


def with_tensor(*, shape: tuple = (4,), stride: tuple = (1,), offset: int = 0, numel: int = 4, key: str = "0") -> bytes:
    """A tensor described as the caller likes, over four numbers."""
    text = b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n(("
    text += b"X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    text += (
        b"X"
        + struct.pack("<I", len(key))
        + key.encode()
        + b"X\x03\x00\x00\x00cpu"
        + _integer(numel)
        + b"tQ"
        + _integer(offset)
    )
    text += b"(" + b"".join(map(_integer, shape)) + b"t(" + b"".join(map(_integer, stride)) + b"t"
    return archive(text + b"\x89ccollections\nOrderedDict\n)RtRs.", {"data/0": bytes(16)})


def _integer(value: int) -> bytes:
    coded = pickle.encode_long(value)
    return b"\x8a" + bytes([len(coded)]) + coded


def within_itself() -> bytes:
    module = nn.Sequential()
    module._modules["me"] = module
    return saved(module)


def doubled(depth: int = 40) -> bytes:
    """Each level holds the one below twice: 2^40 modules in a few kilobytes."""
    module = nn.ReLU()
    for _ in range(depth):
        module = nn.Sequential(module, module)
    return saved(module)


def bomb() -> bytes:
    return archive(pickled({}), {"data/0": bytes(30_000_000)}, packed=True)


def overlapping() -> bytes:
    """A hundred members that are one and the same stretch of the file."""
    data = bytearray(archive(pickled({}), {f"data/{n:03}": bytes(8) for n in range(100)} | {"data/999": bytes(4096)}))
    with zipfile.ZipFile(io.BytesIO(bytes(data))) as file:
        big, others = file.getinfo("archive/data/999"), [f"archive/data/{n:03}" for n in range(100)]
    at = data.find(b"PK\x01\x02")
    while at >= 0:  # each entry of the table of contents that is one of the small ones
        name_length = struct.unpack_from("<H", data, at + 28)[0]
        if data[at + 46 : at + 46 + name_length].decode() in others:
            struct.pack_into("<III", data, at + 16, big.CRC, 4096, 4096)
            struct.pack_into("<I", data, at + 42, big.header_offset)
        at = data.find(b"PK\x01\x02", at + 4)
    return bytes(data)


def of_two_data_pickles() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for root in ("a", "b"):
            file.writestr(f"{root}/data.pkl", pickled({}))
    return buffer.getvalue()


def duplicated() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file, pytest.warns(UserWarning, match="Duplicate"):
        for value in ({}, Calls(os.system, "true")):
            file.writestr("archive/data.pkl", pickled(value))
    return buffer.getvalue()


def damaged(data: bytes) -> bytes:
    """One bit of a weight."""
    at = data.index(struct.pack("<3f", 1.0, 2.0, 3.0))
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def understated() -> bytes:
    """Declares four bytes, and unpacks to 30 MB."""
    data = bytearray(archive(bytes(30_000_000), packed=True))
    for signature, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", data, data.find(signature) + at, 4)
    return bytes(data)


def copied_again_and_again() -> bytes:
    """A long memoised tuple of pairs, made into a dict over and over."""
    pairs = b"(" + b"K\x01K\x02\x86" * 60_000 + b"tq\x00"
    return archive(b"\x80\x02ccollections\nOrderedDict\nq\x01" + pairs + b"h\x01h\x00\x85R" * 400 + b".")


def long_names() -> bytes:
    """Names of 200,000 letters, and modules under them."""
    module = nn.Sequential()
    for number in range(3):
        module._modules["x" * 200_000 + str(number)] = nn.Sequential()
    return saved(module)


def safetensors_of(**entry: object) -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | entry}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


def safetensors(entries: str, body: bytes) -> bytes:
    header = f"{{{entries}}}".encode()
    return len(header).to_bytes(8, "little") + header + body


def shared_parameters() -> Instance:
    """300 layers that name one dict of 300 parameters, in a file of a few kilobytes; more, and memory would end."""
    layer = Instance("torch.nn.modules.container Sequential", {"_parameters": dict.fromkeys(map(str, range(300)))})
    return Instance(layer.of, {"_modules": {str(n): layer for n in range(300)}})


A = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
MARKER = "dvae-import-was-here"
TOUCH = Calls(os.system, f"touch {MARKER}")
WEIGHTS_ZIP, WEIGHTS_FIRST = saved(WEIGHTS), saved(WEIGHTS, first_format=True)
FLOATS = save_safetensors(WEIGHTS)
CASES: dict[str, tuple[Callable[[], bytes], str]] = {
    "os.system": (lambda: in_archive(TOUCH), r"names '(posix|nt)\.system', which is none .* nothing in it was run"),
    "os.system in the first format": (lambda: in_first_format(TOUCH), r"names '(posix|nt)\.system'"),
    "os.system deep within weights": (lambda: in_archive({**{"a": 1}, "b": [TOUCH]}), r"names '(posix|nt)\.system'"),
    "eval, by protocol 4": (lambda: in_archive(Calls(eval, f"open('{MARKER}','w')"), 4), r"names 'builtins\.eval'"),
    "exec, by protocol 2": (lambda: in_archive(Calls(exec, f"open('{MARKER}','w')")), r"names '__builtin__\.exec'"),
    "a class outside the list": (lambda: in_archive(np.float64(1)), r"names 'numpy\.\S+scalar'"),
    "a module that no one has imported": (lambda: archive(b"\x80\x02cantigravity\nx\n."), r"names 'antigravity\.x'"),
    "a pickle within bytes that torch would load": (
        lambda: archive(b"\x80\x02ctorch.storage\n_load_from_bytes\n."), r"names 'torch\.storage\._load_from_bytes'"),
    "a class that is called": (
        lambda: archive(b"\x80\x02ctorch.nn.modules.container\nSequential\n)R."), r"calls 'torch\S+Sequential'"),
    "a function made an object": (
        lambda: archive(b"\x80\x02ccollections\nOrderedDict\n)\x81."), "makes an object of a class"),
    "an object with arguments": (
        lambda: archive(b"\x80\x02cdall_e.utils\nConv2d\nK\x01\x85\x81."), "makes an object of a class"),
    "protocol 0": (lambda: archive(f"(S'touch {MARKER}'\nios\nsystem\n.".encode()), "instruction STRING"),
    "an instance by protocol 0": (lambda: archive(b"(ios\nsystem\n."), "instruction INST"),
    "an extension code": (lambda: archive(b"\x80\x02\x82\x01."), "instruction EXT1"),
    "a persistent id that is no storage": (
        lambda: archive(b"\x80\x02X\x04\x00\x00\x00evilQ."), "outside of its pickle that is no storage"),
    "a second pickle in the archive": (
        lambda: archive(pickled({}), {"evil.pkl": pickled(TOUCH)}), r"second pickle, 'archive/evil\.pkl'"),
    "two pickles of one name": (duplicated, "two members of the name 'archive/data.pkl'"),
    "an archive within the archive": (lambda: archive(in_archive(TOUCH)), "instruction PERSID"),
    "an archive of two": (of_two_data_pickles, "needs one data.pkl"),
    "some other archive": (lambda: archive(b"").replace(b"data.pkl", b"datapkl_"), "needs one data.pkl"),
    "TorchScript": (lambda: archive(pickled({}), {"code/__torch__.py": b"..."}), "is a TorchScript program"),
    "a member that is more than it declares": (understated, r"data\.pkl (is damaged|has other than the 4 bytes)"),
    "a small pickle for endless work": (copied_again_and_again, "asks for more work than any model's weights take"),
    "a million empty sets": (lambda: archive(b"\x80\x04" + b"\x8f" * 1_000_000 + b"."), "asks for more work than"),
    "names without end": (long_names, "are not in a dict of names"),
    "more strides than sizes": (lambda: with_tensor(shape=(2,), stride=(1, 1)), "has 1 sizes and 2 strides"),
    "a size that is no number": (lambda: safetensors_of(shape=[float("inf")]), "no safetensors file"),
    "a size that is a text": (lambda: safetensors_of(shape="11"), "the shape or the place of 'a'"),
    "a place beyond numbers": (lambda: safetensors_of(data_offsets=[0, 1e400]), "no safetensors file"),
    "a type of which nobody knows": (lambda: safetensors_of(dtype="F8"), "'a' is of type 'F8'; known are F32, F16"),
    "a zip bomb": (bomb, r"declares 30,000,\d+ unpacked: a zip bomb, refused unread"),
    "members that overlap": (overlapping, "a zip bomb"),
    "a pickle of nine megabytes": (lambda: archive(bytes(9 << 20)), "more than 8,388,608 bytes: refused unread"),
    "a storage larger than its bytes": (
        lambda: with_tensor(numel=1 << 40, shape=(1 << 40,)), r"archive/data/0 has 16 bytes; its tensor needs 4,398"),
    "a tensor spread over one number": (lambda: with_tensor(shape=(1 << 40,), stride=(0,)), "'a' is larger than what"),
    "a tensor beyond its storage": (lambda: with_tensor(offset=1), "'a' is larger than what"),
    "a tensor of a negative size": (lambda: with_tensor(shape=(-4,)), "other things than a storage, an offset"),
    "two tensors of the same numbers": (
        lambda: saved(dict.fromkeys(("a", "b"), torch.ones(8))), "'b' is larger than what the file holds"),
    "a module within itself": (within_itself, "more modules than any model, or one within itself"),
    "modules doubled forty times": (doubled, "more modules than any model"),
    "a key that takes for ever to hash": (lambda: in_archive({((1,),): 1}), "a key is a tuple"),
    "a number of a million digits": (lambda: in_archive({"a": 1 << 3_000_000}), "an integer of more than 128 bits"),
    "a dict that is filled as a list": (lambda: archive(b"\x80\x02}K\x01a."), "fills a dict as if it were a list"),
    "an empty stack": (lambda: archive(b"\x80\x02R."), "damaged or cut short"),
    "a pickle without an end": (lambda: archive(b"\x80\x02}"), "damaged or cut short"),
    "a text longer than the file": (lambda: archive(b"\x80\x02X\xff\xff\xff\x7fabc."), "damaged or cut short"),
    "an archive cut short": (lambda: WEIGHTS_ZIP[:-30], "cut short or damaged: no zip archive ends it"),
    "an archive cut in half": (lambda: WEIGHTS_ZIP[: len(WEIGHTS_ZIP) // 2], "cut short or damaged"),
    "an archive with one bit turned": (lambda: damaged(WEIGHTS_ZIP), r"data/0 is damaged \(Bad CRC.*set_crc32_options"),
    "an archive without a storage": (
        lambda: archive(zipfile.ZipFile(io.BytesIO(WEIGHTS_ZIP)).read("archive/data.pkl")), "lacks its member arc"),
    "a storage cut short": (lambda: rewritten(WEIGHTS_ZIP, {"data/0": bytes(44)}), "has 44 bytes; its tensor needs 48"),
    "the first format cut in its pickles": (lambda: WEIGHTS_FIRST[:100], "damaged or cut short"),
    "the first format cut in its numbers": (lambda: WEIGHTS_FIRST[:-3], "damaged or cut short: it does not hold the"),
    "the first format with more after it": (lambda: WEIGHTS_FIRST + b"PK", "2 bytes after its last storage"),
    "storages that no tensor needs": (
        lambda: b"".join(map(pickled, (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}, ["7"]))),
        "the storages that it lists are not those"),
    "safetensors cut short": (lambda: FLOATS[:-1], r"'\w' does not lie within the file"),
    "safetensors with a long header": (lambda: struct.pack("<Q", 1 << 40) + b"{}", "no whole safetensors file"),
    "safetensors that share their numbers": (
        lambda: FLOATS.replace(b"[48,52]", b"[0,52] "), "'b' does not lie within the file"),
    "safetensors with a hole": (
        lambda: safetensors(A.replace("[0, 4]", "[4, 8]"), bytes(8)), "'a' does not lie within the file"),
    "safetensors with more after it": (lambda: safetensors(A, bytes(5)), "has 1 bytes after its last tensor"),
    "safetensors with a name twice": (lambda: safetensors(f"{A}, {A}", bytes(4)), "a name stands in it twice"),
    "a tensor that is its numbers negated": (
        lambda: saved({"a": torch._neg_view(torch.ones(3))}), "a negated or conjugated view of its numbers"),
    "the same in the first format": (
        lambda: saved({"a": torch._neg_view(torch.ones(3))}, first_format=True), "a negated or conjugated view"),
    "a storage of a long name": (
        lambda: with_tensor(key="x" * 101), "outside of its pickle that is no storage"),
    "big-endian": (lambda: rewritten(WEIGHTS_ZIP, {"byteorder": b"big"}), "written on a big-endian machine"),
    "a plain pickle": (lambda: pickled({"a": 1}), "a plain pickle, not a file of torch.save: refused"),
    "a plain pickle of an attacker": (lambda: pickled(TOUCH), r"names '(posix|nt)\.system'"),
    "nothing": (lambda: b"", "is empty"),
    "what a server says instead": (lambda: b"404: Not Found\n", "is no file of weights: .* a text: '404: Not Found'"),
    "a store's refusal": (lambda: b"\xef\xbb\xbf<?xml version='1.0'?><Error/>", "it is a text: .<.xml version"),
    "a web page": (lambda: b"\n<!DOCTYPE html><html>", "is a web page, not a file of weights"),
    "a pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
    "gzip": (lambda: b"\x1f\x8b\x08" + bytes(20), "is compressed by gzip"),
    "a picture": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(20), "is no file of weights"),
    "doubles": (lambda: saved({"a": torch.ones(2).double()}), "'a' is float64; weights are float32, float16, bfloat16"),
    "not finite": (lambda: saved({"a": torch.tensor([1.0, float("nan")])}), "'a' holds numbers that are not finite"),
    "no numbers": (lambda: saved({"a": torch.ones(0)}), "'a' is larger than what the file holds"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_bad_file_is_refused_by_name_and_nothing_in_it_is_run(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, words = CASES[case]
    data = make()
    monkeypatch.chdir(tmp_path)
    imported = set(sys.modules)
    with pytest.raises(ForeignFileError, match=words) as refusal:
        read_whole(data)
    assert str(refusal.value).startswith("x.pt")
    assert not any(tmp_path.iterdir()), "something in the file was run"
    assert set(sys.modules) == imported, "something in the file was imported"


def test_the_attacks_work_on_a_reader_that_runs_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else their refusal would show nothing."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickled(TOUCH))
    assert (tmp_path / MARKER).exists()


def test_reading_looks_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(encoder())

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a foreign file was given to something that can run it")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    for target, name in ((torch, "load"), (builtins, "eval"), (builtins, "exec"), (builtins, "__import__")):
        monkeypatch.setattr(target, name, forbidden)
    file = opened(data)
    count = len(file.tensors(state_dict(file.value, file.name)))
    monkeypatch.undo()
    assert count == 74


@pytest.mark.parametrize("data", [WEIGHTS_ZIP, WEIGHTS_FIRST, FLOATS], ids=["zip", "first format", "safetensors"])
def test_a_file_damaged_anywhere_is_read_or_refused_never_worse(data: bytes) -> None:
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        bad = bytearray(data)
        for at in random.integers(0, len(bad), random.integers(1, 4)):
            bad[at] = random.integers(256)
        try:
            read_whole(bytes(bad[: len(bad) - random.integers(0, 3)]))
        except (ForeignFileError, AssertionError):
            refused += 1
    assert refused > 100


def test_what_steers_a_terminal_or_has_no_end_stays_out_of_messages() -> None:
    said = str(ForeignFileError("\x1b[2Jx.pt\n" + "y" * 5_000_000))
    assert said.isprintable() and len(said) < 1_100


def test_a_member_is_not_unpacked_beyond_what_it_declares() -> None:
    data = understated()
    tracemalloc.start()
    with pytest.raises(ForeignFileError):
        opened(data)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 5_000_000


def test_a_storage_is_read_once_however_many_tensors_lie_in_it() -> None:
    class Counts:
        num_reads = 0

        def check(self, storage: StorageRef) -> None: ...

        def read(self, storage: StorageRef) -> bytes:
            self.num_reads += 1
            return np.arange(8, dtype=np.float32).tobytes()

    storages, flat = Counts(), StorageRef("0", "float32", 8)
    refs = {"a": TensorRef(flat, 0, (2, 2), (2, 1)), "b": TensorRef(flat, 4, (4,), (1,))}
    found = ForeignFile("x.pt", refs, storages).tensors(refs)
    assert list(found) == ["a", "b"] and storages.num_reads == 1
    assert found["a"].tolist() == [[0, 1], [2, 3]] and found["b"].tolist() == [4, 5, 6, 7]


def test_an_archive_may_be_written_as_a_stream_or_for_large_files() -> None:
    """Sizes behind the bytes, where the writer could not go back; and fields of 64 bits."""

    class OneWay(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: int) -> int:
            raise io.UnsupportedOperation

    out = OneWay()
    with zipfile.ZipFile(io.BytesIO(WEIGHTS_ZIP)) as source, zipfile.ZipFile(out, "w") as copy:
        for info in source.infolist():
            with copy.open(info.filename, "w", force_zip64=True) as member:
                member.write(source.read(info))
        assert all(info.flag_bits & 0x08 for info in copy.infolist()), "no data descriptors"
    found = read_whole(out.getvalue())
    assert found.keys() == WEIGHTS.keys() and all(torch.equal(found[name], WEIGHTS[name]) for name in found)


@pytest.mark.parametrize("walk", [state_dict, lambda root, name: list(modules_of(root, name))])
def test_one_dict_for_many_modules_is_not_walked_for_each(walk: Callable[[Instance, str], object]) -> None:
    with pytest.raises(ForeignFileError, match="more modules than any model"):
        walk(shared_parameters(), "x.pt")


def test_the_tree_of_a_module_is_walked_once_and_in_order() -> None:
    module = encoder()
    paths = [path for path, _ in modules_of(opened(saved(module)).value, "x")]
    assert paths == [name for name, _ in module.named_modules()]


def test_storages_are_noted_as_they_are_met() -> None:
    storages: dict = {}
    with zipfile.ZipFile(io.BytesIO(WEIGHTS_ZIP)) as file:
        value = read_pickle(io.BytesIO(file.read("archive/data.pkl")), "x", storages)
    assert isinstance(value["a"], TensorRef) and storages == {"0": value["a"].storage, "1": value["b"].storage}
