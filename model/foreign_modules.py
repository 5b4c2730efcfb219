"""Stand-ins of OpenAI's pickled modules → their state dict; and whether their layers are those that we compute.

Names and shapes do not say everything: a module with another gain, another pooling or a layer more has the same state
dict and other tokens. So the layers are held against ours in their order, and the attributes that decide as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from torch import nn

from model.autoencoder import Group
from model.dvae import Block, Conv2d
from model.foreign_names import MODULES, ForeignFileError, Instance, TensorRef

MAX_NAME = 100
MAX_ITEMS, MAX_DEPTH = 20_000, 16  # modules, parameters and buffers; the published encoder has 200 or so, 5 deep
GROUPS = 4
BLOCK_OF = {
    "dall_e.encoder Encoder": "dall_e.encoder EncoderBlock",
    "dall_e.decoder Decoder": "dall_e.decoder DecoderBlock",
}
LAYERS: dict[str, dict[str, Any]] = {  # what such a layer must be
    "torch.nn.modules.pooling MaxPool2d": {
        "kernel_size": 2, "stride": 2, "padding": 0, "dilation": 1, "ceil_mode": False,
    },
    "torch.nn.modules.upsampling Upsample": {"scale_factor": 2.0, "mode": "nearest", "size": None},
}  # fmt: skip
CONV = "dall_e.utils Conv2d"
KINDS = ("_modules", "_parameters", "_buffers")
CALLED = (
    "forward",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_compiled_call_impl",
)  # what else decides what is computed
_THEIRS: dict[type, str] = {  # our layers' classes → theirs; an encoder or decoder itself is the root
    Conv2d: CONV,
    nn.ReLU: "torch.nn.modules.activation ReLU",
    nn.MaxPool2d: "torch.nn.modules.pooling MaxPool2d",
    nn.Upsample: "torch.nn.modules.upsampling Upsample",
    nn.Identity: "torch.nn.modules.linear Identity",
    nn.Sequential: "torch.nn.modules.container Sequential",
    Group: "torch.nn.modules.container Sequential",
}


def modules_of(root: Instance, file_name: str) -> Iterator[tuple[str, Instance]]:
    """(path, module) of all, the root first with an empty path. Raises ForeignFileError where they have no end: a file
    may hold one dict and name it as that of many modules."""
    waiting, count = [("", root)], 0
    while waiting:
        path, module = waiting.pop()
        count += sum(len(value) for kind in KINDS if isinstance(value := module.state.get(kind), dict))
        if count > MAX_ITEMS or path.count(".") >= MAX_DEPTH:
            raise ForeignFileError(f"{file_name} holds more modules than any model, or one within itself: refused")
        yield path, module
        for name, child in reversed(_dict(module, "_modules", path, file_name).items()):
            if not isinstance(child, Instance) or child.of not in MODULES:
                raise ForeignFileError(f"{file_name}: {path}.{name} is no module but a {type(child).__name__}")
            waiting.append((f"{path}.{name}".lstrip("."), child))


def state_dict(root: Instance, file_name: str) -> dict[str, TensorRef]:
    """Parameters and buffers by dotted name, as the module's own state_dict would name them."""
    found: dict[str, TensorRef] = {}
    for path, module in modules_of(root, file_name):
        for kind in KINDS[1:]:
            for name, tensor in _dict(module, kind, path, file_name).items():
                if isinstance(tensor, TensorRef):
                    found[f"{path}.{name}".lstrip(".")] = tensor
                elif tensor is not None:
                    raise ForeignFileError(f"{file_name}: {path}.{name} is no tensor but a {type(tensor).__name__}")
    return found


def check_layers(root: Instance, ours: nn.Module, blocks_per_group: int, file_name: str) -> None:
    """Raises ForeignFileError naming the first layer that stands elsewhere, or the first attribute that is another,
    than in `ours`."""
    theirs = {**_THEIRS, Block: BLOCK_OF[root.of]}
    wanted_layers = [(path, theirs.get(type(each), root.of)) for path, each in ours.named_modules()]
    found_layers = [(path, module.of) for path, module in modules_of(root, file_name)]
    for found, wanted in zip_longest(found_layers, wanted_layers):
        if found != wanted:
            raise ForeignFileError(
                f"{file_name} has {_layer(found)} where dvae's layers, in their order, have {_layer(wanted)}"
            )
    _check_attributes(root, 1 / (GROUPS * blocks_per_group) ** 2, file_name)


def _layer(layer: tuple[str, str] | None) -> str:
    return "nothing" if layer is None else f"{layer[0]}, a {layer[1].rpartition(' ')[2]}"


def _check_attributes(root: Instance, gain: float, file_name: str) -> None:
    for path, module in modules_of(root, file_name):
        _check_plain(module, path, file_name)
        wanted = {"post_gain": gain} if module.of in BLOCK_OF.values() else LAYERS.get(module.of, {})
        weight = module.state.get("_parameters", {}).get("w") if module.of == CONV else None
        if isinstance(weight, TensorRef):
            wanted = {"kw": weight.shape[-1]}  # it decides the padding
        for name, value in wanted.items():
            found = module.state.get(name)
            if type(found) not in (type(value), int, float, str) or found != value:
                shown = found if isinstance(found, int | float | str) else type(found).__name__
                raise ForeignFileError(f"{file_name}: {path}.{name} is {shown!r}; dvae's layers have {value!r} there")


def _check_plain(module: Instance, path: str, file_name: str) -> None:
    """An attribute of a parameter's or a layer's name would be taken in its place."""
    names = [name for kind in KINDS for name in module.state.get(kind, {})]
    for name in (*names, *CALLED):
        if module.state.get(name) not in (None, {}):
            raise ForeignFileError(f"{file_name}: {path}.{name} is set on the object itself, so it computes otherwise")


def _dict(module: Instance, name: str, path: str, file_name: str) -> dict[str, Any]:
    value = module.state.get(name, {})
    if not isinstance(value, dict) or not all(isinstance(key, str) and len(key) <= MAX_NAME for key in value):
        raise ForeignFileError(f"{file_name}: {name} of {path or 'the module'} are not in a dict of names")
    return value
