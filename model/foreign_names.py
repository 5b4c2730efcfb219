"""What a foreign pickle may name, and what stands for it here: texts and inert stand-ins, never the things themselves.

This is the whole list. To allow more is to say, in this file, what the new name becomes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from model.config import ModelError

# What the storages of torch hold, by name.
STORAGES = {
    "torch FloatStorage": "float32",
    "torch HalfStorage": "float16",
    "torch BFloat16Storage": "bfloat16",
    "torch DoubleStorage": "float64",
    "torch LongStorage": "int64",
    "torch IntStorage": "int32",
    "torch ShortStorage": "int16",
    "torch CharStorage": "int8",
    "torch ByteStorage": "uint8",
    "torch BoolStorage": "bool",
}
MODULES = {
    "dall_e.encoder Encoder",
    "dall_e.encoder EncoderBlock",
    "dall_e.decoder Decoder",
    "dall_e.decoder DecoderBlock",
    "dall_e.utils Conv2d",
    "torch.nn.modules.container Sequential",
    "torch.nn.modules.pooling MaxPool2d",
    "torch.nn.modules.activation ReLU",
    "torch.nn.modules.upsampling Upsample",
    "torch.nn.modules.linear Identity",
}
MAX_MESSAGE = 1_000
OPAQUE = {"torch device", "builtins set", "__builtin__ set", "functools partial"}  # beside the weights, and never asked


class ForeignFileError(ModelError):
    """A foreign file is not what can be imported; the message names the file and the first thing that is wrong. What
    is quoted from the file may be of any length and steer a terminal: neither reaches the message."""

    def __init__(self, message: str) -> None:
        shown = message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "…"
        super().__init__("".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in shown))


@dataclass(frozen=True)
class Name:
    """`module name`, as the pickle spells it. Only a text."""

    text: str


@dataclass
class Instance:
    """Stands for an object: the name of its class and its `__dict__`."""

    of: str
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StorageRef:
    """Numbers that lie elsewhere in the file, under `key`."""

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor that has not been read: a view of a storage, offset and strides in elements."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> TensorRef:
    """As torch's _rebuild_tensor_v2 is called. `metadata` says that the numbers are another's, negated or conjugated.
    Raises ValueError."""
    if not (isinstance(storage, StorageRef) and is_count(offset) and _are_counts(shape) and _are_counts(stride)):
        raise ValueError("a tensor is described by other things than a storage, an offset, a shape and strides")
    if len(shape) != len(stride):
        raise ValueError(f"a tensor has {len(shape)} sizes and {len(stride)} strides")
    if metadata:
        raise ValueError("a tensor is a negated or conjugated view of its numbers: save its .resolve_neg()")
    return TensorRef(storage, offset, shape, stride)


def _rebuild_parameter(tensor: Any, requires_grad: Any, hooks: Any) -> TensorRef:
    """As torch's own is called. Raises ValueError."""
    if not isinstance(tensor, TensorRef):
        raise ValueError("a parameter is made of something that is no tensor")
    return tensor


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    """A dict keeps its order. Raises ValueError, TypeError."""
    return {key_of(key): value for key, value in pairs}


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _ordered_dict,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
}
KNOWN = FUNCTIONS.keys() | STORAGES.keys() | MODULES | OPAQUE


def key_of(value: Any) -> Any:
    """Hashing a deep tuple may take for ever."""
    if not isinstance(value, str | int):
        raise ValueError(f"a key is a {type(value).__name__}")
    return value


def text_of(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a {type(value).__name__} stands where a name is needed")
    return value


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _are_counts(values: Any) -> bool:
    return isinstance(values, tuple) and len(values) <= 8 and all(map(is_count, values))
