"""A stranger's pickle → plain values. Nothing that it names is looked up, imported or called.

A pickle is a program for a stack machine. This is a machine of our own for what torch.save writes of weights: it makes
strings, numbers, lists, dicts and the inert stand-ins of foreign_names.py. A name in the pickle is compared with the
list there; any other is refused by name, used or not. foreign_file.py says where the bytes come from and reads tensors.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO

from model.foreign_names import (
    FUNCTIONS,
    KNOWN,
    MODULES,
    OPAQUE,
    STORAGES,
    ForeignFileError,
    Instance,
    Name,
    StorageRef,
    is_count,
    key_of,
    text_of,
)

INSTRUCTIONS = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
MAX_WORK = 1_000_000  # instructions, and items that they copy; a model of thousands of tensors takes a tenth
OBJECT_WORK = 10
MAX_KEY = 100  # of a storage; torch's are numbers
MAX_INTEGER = 1 << 128  # torch's own magic number has 77 bits; a million digits would cost time wherever they are used


def read_pickle(stream: BinaryIO, file_name: str, storages: dict[str, StorageRef] | None = None) -> Any:
    """The value that the pickle at the stream's position describes, up to its end; the storages that it names are put
    into `storages`. Raises ForeignFileError. Values may refer to themselves, and many times to one another: whoever
    walks them counts."""
    machine = _Machine(file_name, {} if storages is None else storages)
    try:
        return machine.run(stream)
    except ForeignFileError:
        raise
    except (ValueError, TypeError, LookupError, OverflowError, struct.error) as error:
        raise ForeignFileError(f"{file_name}: the pickle in it is damaged or cut short ({error})") from error


class _Machine:
    """`HANDLERS` are its instructions; there are no others."""

    def __init__(self, file_name: str, storages: dict[str, StorageRef]) -> None:
        self._file_name, self._storages = file_name, storages
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._work = 0

    def _spend(self, work: int) -> None:
        """What is memoised may be copied again and again: a small pickle could ask for any amount of it."""
        self._work += work
        if self._work > MAX_WORK:
            raise self._refusal("asks for more work than any model's weights take")

    def run(self, stream: BinaryIO) -> Any:
        while code := stream.read(1):
            self._spend(1)
            opcode = INSTRUCTIONS.get(code)
            if opcode is None:
                raise ValueError(f"there is no pickle instruction {code!r}")
            if opcode.name == "STOP":
                return self._stack.pop()
            if opcode.name not in HANDLERS:
                raise self._refusal(f"has the pickle instruction {opcode.name}, which torch.save writes for no weights")
            HANDLERS[opcode.name](self, None if opcode.arg is None else opcode.arg.reader(stream))
        raise ValueError("it has no end")

    def _refusal(self, what: str) -> ForeignFileError:
        return ForeignFileError(f"{self._file_name} {what}: refused, and nothing in it was run")

    def push(self, value: Any) -> None:
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise ValueError("an integer of more than 128 bits")
        self._stack.append(value)

    def ignore(self, _: Any) -> None:
        """PROTO and FRAME say how the pickle is laid out."""

    def mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def _to_mark(self) -> list[Any]:
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _last(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise ValueError("its stack is empty")
        values = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return values

    def make(self, _: Any, value: Callable[[], Any]) -> None:
        self._stack.append(value())

    def tuple_of(self, _: Any, count: int) -> None:
        self._stack.append(tuple(self._last(count)))

    def tuple_to_mark(self, _: Any) -> None:
        self._stack.append(tuple(self._to_mark()))

    def put(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def append(self, _: Any) -> None:
        values = self._last(1)
        self._top(list).extend(values)

    def appends(self, _: Any) -> None:
        values = self._to_mark()
        self._top(list).extend(values)

    def add_items(self, _: Any) -> None:
        """To a set; none is ever asked for what it holds."""
        self._to_mark()
        self._top(Instance)

    def set_item(self, _: Any) -> None:
        key, value = self._last(2)
        self._top(dict)[key_of(key)] = value

    def set_items(self, _: Any) -> None:
        values = self._to_mark()
        pairs = zip(values[::2], values[1::2], strict=True)
        self._top(dict).update((key_of(key), value) for key, value in pairs)

    def _top(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise ValueError(f"it fills a {type(self._stack[-1]).__name__} as if it were a {kind.__name__}")
        return self._stack[-1]

    def name(self, text: str | None) -> None:
        """GLOBAL brings the name, STACK_GLOBAL finds its two halves on the stack."""
        text = " ".join(map(str, map(text_of, self._last(2)))) if text is None else text
        if text not in KNOWN:
            shown = text.replace(" ", ".")[:200]
            raise self._refusal(f"names {shown!r}, which is none of the names that weights need")
        self._stack.append(Name(text))

    def reduce(self, _: Any) -> None:
        """A call in other machines: here, of three functions of this file; all else becomes a stand-in."""
        called, arguments = self._last(2)
        if not isinstance(called, Name) or not isinstance(arguments, tuple):
            raise ValueError("it calls what is no name")
        if called.text in OPAQUE:
            self._stack.append(Instance(called.text))
        elif called.text in FUNCTIONS:
            self._spend(sum(len(each) for each in arguments if isinstance(each, list | tuple)))
            self._stack.append(FUNCTIONS[called.text](*arguments))
        else:
            raise self._refusal(f"calls {called.text.replace(' ', '.')!r}, which weights do not")

    def new_object(self, _: Any) -> None:
        cls, arguments = self._last(2)
        if not isinstance(cls, Name) or cls.text not in MODULES or arguments != ():
            raise self._refusal("makes an object of a class that weights do not need")
        self._spend(OBJECT_WORK)
        self._stack.append(Instance(cls.text))

    def build(self, _: Any) -> None:
        """Sets a stand-in's `__dict__`. What a dict (a state dict's `_metadata`) or an opaque one is given is left."""
        state, target = self._last(1)[0], self._stack[-1]
        if isinstance(target, Instance) and target.of in MODULES:
            if not isinstance(state, dict):
                raise ValueError(f"the state of a {target.of} is a {type(state).__name__}")
            self._spend(len(state))
            target.state.update((text_of(key), value) for key, value in state.items())
        elif not isinstance(target, Instance | dict):
            raise ValueError(f"it sets attributes of a {type(target).__name__}")

    def persistent(self, _: Any) -> None:
        """What torch.save keeps outside of the pickle: a storage; in its first format also a class with its source."""
        match self._stack.pop():
            case ("storage", Name(kind), str(key), str(), int(numel)) | (
                "storage", Name(kind), str(key), str(), int(numel), None
            ) if kind in STORAGES and is_count(numel) and len(key) <= MAX_KEY:  # fmt: skip
                storage = StorageRef(key, STORAGES[kind], numel)
                if self._storages.setdefault(key, storage) != storage:
                    raise ValueError(f"storage {key!r} is described in two ways")
                self._stack.append(storage)
            case ("module", Name(text) as cls, _, _) if text in MODULES:
                self._stack.append(cls)
            case _:
                raise self._refusal("refers to something outside of its pickle that is no storage")


A_SET = Instance("builtins set")  # never asked, so one will do
_VALUES = (
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
)  # fmt: skip
_MADE: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": lambda: A_SET,
}
HANDLERS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(_VALUES, _Machine.push),
    **{name: partial(_Machine.make, value=value) for name, value in _MADE.items()},
    **{f"TUPLE{count}": partial(_Machine.tuple_of, count=count) for count in (1, 2, 3)},
    **dict.fromkeys(("PROTO", "FRAME"), _Machine.ignore),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    **dict.fromkeys(("GLOBAL", "STACK_GLOBAL"), _Machine.name),
    "MARK": _Machine.mark,
    "TUPLE": _Machine.tuple_to_mark,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "ADDITEMS": _Machine.add_items,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.new_object,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}
