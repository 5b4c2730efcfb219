"""Stand-ins of OpenAI's pickled modules → their state dict; and whether their layers are those that we compute.

Names and shapes do not say everything: a module with another gain or another pooling has the same state dict and
other tokens. So the attributes that decide are compared as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from model.foreign_names import MODULES, ForeignFileError, Instance, TensorRef

MAX_MODULES, MAX_DEPTH = 10_000, 16  # the published encoder has 99, 5 deep
GROUPS = 4
BLOCKS = {"dall_e.encoder EncoderBlock", "dall_e.decoder DecoderBlock"}
LAYERS: dict[str, dict[str, Any]] = {  # what such a layer must be
    "torch.nn.modules.pooling MaxPool2d": {
        "kernel_size": 2, "stride": 2, "padding": 0, "dilation": 1, "ceil_mode": False,
    },
    "torch.nn.modules.upsampling Upsample": {"scale_factor": 2.0, "mode": "nearest", "size": None},
}  # fmt: skip


def modules_of(root: Instance, file_name: str) -> Iterator[tuple[str, Instance]]:
    """(path, module) of all, the root first with an empty path. Raises ForeignFileError where they have no end."""
    waiting, count = [("", root)], 0
    while waiting:
        path, module = waiting.pop()
        count += 1
        if count > MAX_MODULES or path.count(".") >= MAX_DEPTH:
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
        for kind in ("_parameters", "_buffers"):
            for name, tensor in _dict(module, kind, path, file_name).items():
                if isinstance(tensor, TensorRef):
                    found[f"{path}.{name}".lstrip(".")] = tensor
                elif tensor is not None:
                    raise ForeignFileError(f"{file_name}: {path}.{name} is no tensor but a {type(tensor).__name__}")
    return found


def check_layers(root: Instance, blocks_per_group: int, file_name: str) -> None:
    """Raises ForeignFileError naming the first attribute that is another than in our layers."""
    gain = 1 / (GROUPS * blocks_per_group) ** 2
    for path, module in modules_of(root, file_name):
        wanted = {"post_gain": gain} if module.of in BLOCKS else LAYERS.get(module.of, {})
        for name, value in wanted.items():
            found = module.state.get(name, value)
            if type(found) not in (type(value), int, float, str) or found != value:
                shown = found if isinstance(found, int | float | str) else type(found).__name__
                raise ForeignFileError(f"{file_name}: {path}.{name} is {shown!r}; dvae's layers have {value!r} there")


def _dict(module: Instance, name: str, path: str, file_name: str) -> dict[str, Any]:
    value = module.state.get(name, {})
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ForeignFileError(f"{file_name}: {name} of {path or 'the module'} are not in a dict")
    return value
