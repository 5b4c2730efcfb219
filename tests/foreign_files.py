"""Files of weights as strangers write them: OpenAI's pickled modules in small, and what an attacker would make of them.

The classes have the names, attributes and arithmetic of those in `dall_e`. They can be imported under those names only
while something is being pickled, so whatever reads the file has to do without them.
"""

from __future__ import annotations

import io
import pickle
import sys
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, CODES, INIT = 8, 32, 8


class Conv2d(nn.Module):
    __module__ = "dall_e.utils"

    def __init__(self, n_in: int, n_out: int, kw: int, use_float16: bool = True) -> None:
        self.__dict__.update(n_in=n_in, n_out=n_out, kw=kw, use_float16=use_float16)  # as attr does, before Module's
        self.__dict__.update(device=torch.device("cpu"), requires_grad=False)
        super().__init__()
        self.w = nn.Parameter(torch.randn(n_out, n_in, kw, kw) / (n_in * kw**2) ** 0.5)
        self.b = nn.Parameter(torch.randn(n_out) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=(self.kw - 1) // 2)


class _Block(nn.Module):
    kernels: tuple[int, ...]

    def __init__(self, n_in: int, n_out: int, n_layers: int) -> None:
        self.__dict__.update(n_in=n_in, n_out=n_out, n_layers=n_layers, device=None, requires_grad=False)
        super().__init__()
        self.n_hid, self.post_gain = n_out // 4, 1 / (n_layers**2)
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths = (n_in, self.n_hid, self.n_hid, self.n_hid, n_out)
        layers = []
        for i, kernel in enumerate(self.kernels):
            layers += [(f"relu_{i + 1}", nn.ReLU()), (f"conv_{i + 1}", Conv2d(widths[i], widths[i + 1], kernel))]
        self.res_path = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.post_gain * self.res_path(x)


class EncoderBlock(_Block):
    __module__ = "dall_e.encoder"
    kernels = (3, 3, 3, 1)


class DecoderBlock(_Block):
    __module__ = "dall_e.decoder"
    kernels = (1, 3, 3, 3)


def _groups(block: type[_Block], widths: list[int], num_blocks: int, resize: tuple[str, type, dict]) -> list:
    groups = []
    for g in range(1, 5):
        layers = [
            (f"block_{i + 1}", block(widths[g] if i else widths[g - 1], widths[g], 4 * num_blocks))
            for i in range(num_blocks)
        ]
        name, layer, options = resize
        groups.append((f"group_{g}", nn.Sequential(OrderedDict([*layers, *([(name, layer(**options))] * (g < 4))]))))
    return groups


class Encoder(nn.Module):
    __module__ = "dall_e.encoder"

    def __init__(self, n_hid: int = WIDTH, vocab_size: int = CODES, num_blocks: int = 2) -> None:
        self.__dict__.update(n_hid=n_hid, n_blk_per_group=num_blocks, input_channels=3, vocab_size=vocab_size)
        self.__dict__.update(device=torch.device("cpu"), requires_grad=False, use_mixed_precision=True)
        super().__init__()
        widths = [n_hid, n_hid, 2 * n_hid, 4 * n_hid, 8 * n_hid]
        groups = _groups(EncoderBlock, widths, num_blocks, ("pool", nn.MaxPool2d, {"kernel_size": 2}))
        last = [("relu", nn.ReLU()), ("conv", Conv2d(8 * n_hid, vocab_size, 1, use_float16=False))]
        layers = [("input", Conv2d(3, n_hid, 7)), *groups, ("output", nn.Sequential(OrderedDict(last)))]
        self.blocks = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Decoder(nn.Module):
    __module__ = "dall_e.decoder"

    def __init__(self, n_hid: int = WIDTH, vocab_size: int = CODES, num_blocks: int = 2, n_init: int = INIT) -> None:
        self.__dict__.update(n_init=n_init, n_hid=n_hid, n_blk_per_group=num_blocks, vocab_size=vocab_size)
        self.__dict__.update(output_channels=3, device=torch.device("cpu"), requires_grad=False)
        super().__init__()
        widths = [n_init, 8 * n_hid, 4 * n_hid, 2 * n_hid, n_hid]
        up = ("upsample", nn.Upsample, {"scale_factor": 2, "mode": "nearest"})
        last = [("relu", nn.ReLU()), ("conv", Conv2d(n_hid, 6, 1))]
        first = ("input", Conv2d(vocab_size, n_init, 1, use_float16=False))
        groups = _groups(DecoderBlock, widths, num_blocks, up)
        self.blocks = nn.Sequential(OrderedDict([first, *groups, ("output", nn.Sequential(OrderedDict(last)))]))

    def forward(self, z: Tensor) -> Tensor:
        return self.blocks(z)


@contextmanager
def importable_as_dall_e() -> Iterator[None]:
    """The classes above can be pickled by OpenAI's names for the block, and not afterwards."""
    modules = {name: types.ModuleType(name) for name in ("dall_e", "dall_e.utils", "dall_e.encoder", "dall_e.decoder")}
    for cls in (Conv2d, EncoderBlock, DecoderBlock, Encoder, Decoder):
        setattr(modules[cls.__module__], cls.__name__, cls)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield


def saved(value: Any, *, first_format: bool = False, protocol: int = 2) -> bytes:
    """torch.save of it: a zip archive, or the format before that."""
    buffer = io.BytesIO()
    # The first format keeps the source of classes, and complains where it finds none.
    with importable_as_dall_e(), warnings.catch_warnings(action="ignore"):
        torch.save(value, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=not first_format)
    return buffer.getvalue()


def encoder(seed: int = 0, **options: int) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(**options)


def decoder(seed: int = 1, **options: int) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(**options)


def archive(pickled: bytes, members: Mapping[str, bytes] | None = None, *, packed: bool = False) -> bytes:
    """A zip archive as torch.save's, with this for its pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as file:
        for name, data in {"data.pkl": pickled, "version": b"3\n", **(members or {})}.items():
            file.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def rewritten(data: bytes, changes: Mapping[str, bytes]) -> bytes:
    """A zip archive with other bytes under some names (those after the root folder); new names are added."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        members = {info.filename.partition("/")[2]: file.read(info) for info in file.infolist()}
    members |= changes
    return archive(members.pop("data.pkl"), members)


class Calls:
    """Pickles as a call of a function with these arguments: what an attacker writes."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def pickled(value: Any, protocol: int = 2) -> bytes:
    return pickle.dumps(value, protocol=protocol)
