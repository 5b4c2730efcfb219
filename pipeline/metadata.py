"""Chosen metadata columns: from a sample's `.txt`, `.json`, `.cls` … members to typed values."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

ColumnType = Literal["string", "int32", "int64", "float32", "float64", "bool"]

OWN_COLUMNS = frozenset({"key", "shard", "index", "tokens", "width", "height", "offset", "size"})
_INTEGER_LIMITS = {"int32": 2**31, "int64": 2**63}
_FLOAT32_MAX = 3.4028235677973366e38  # what lies at or above it rounds to infinity


class MetadataError(Exception):
    """A member is there and is not what the column wants; becomes a SampleFailure."""


@dataclass(frozen=True)
class MetadataColumn:
    """One column of the token table: `source` is `txt` for a whole member as text, or `json.a.b` for a field."""

    name: str
    source: str
    type: ColumnType = "string"

    def __post_init__(self) -> None:
        if self.name.lower() in OWN_COLUMNS or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.name):
            raise ValueError(f"metadata column {self.name!r} is not a free name of letters, digits and _")
        if not all(self.source.split(".")):
            raise ValueError(f"metadata column {self.name!r}: from {self.source!r} is not txt or json.field")

    @property
    def extension(self) -> str:
        return self.source.partition(".")[0].lower()

    @property
    def field_path(self) -> tuple[str, ...]:
        return tuple(self.source.split(".")[1:])


def read_metadata(members: Mapping[str, bytes], columns: Sequence[MetadataColumn]) -> dict[str, Any]:
    """One value a column; None where the member or the field isn't there. Raises MetadataError."""
    texts: dict[str, Any] = {}
    for extension in {column.extension for column in columns} & set(members):
        texts[extension] = _text(members[extension], extension)
        if any(column.field_path for column in columns if column.extension == extension):
            texts[extension] = (texts[extension], _parsed(texts[extension], extension))
    return {column.name: _value(texts.get(column.extension), column) for column in columns}


def _text(data: bytes, extension: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MetadataError(f".{extension} is not UTF-8: {error}") from error


def _parsed(text: str, extension: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MetadataError(f".{extension} is not JSON: {error}") from error


def _value(found: Any, column: MetadataColumn) -> Any:
    if not column.field_path:
        text = found[0] if isinstance(found, tuple) else found
        return None if text is None else _typed(text if column.type == "string" else text.strip(), column)
    value = found[1] if found is not None else None
    for name in column.field_path:
        value = value.get(name) if isinstance(value, dict) else None
    return None if value is None else _typed(value, column)


def _typed(value: Any, column: MetadataColumn) -> Any:
    try:
        return _CONVERT[column.type](value, column.type)
    except (ValueError, OverflowError, RecursionError) as error:
        shown = repr(value)[:80] if isinstance(value, str | int | float) else f"a {type(value).__name__}"
        raise MetadataError(f"{column.source} is {shown}, not {column.type}") from error


def _string(value: Any, _: str) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text.encode("utf-8", "replace").decode("utf-8")  # JSON may spell lone surrogates


def _integer(value: Any, type_name: str) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(value)
    number = _number(value, int)
    if not -_INTEGER_LIMITS[type_name] <= number < _INTEGER_LIMITS[type_name]:
        raise ValueError(value)
    return int(number)


def _float(value: Any, type_name: str) -> float:
    number = float(_number(value, float))
    if isinstance(value, bool) or (type_name == "float32" and _FLOAT32_MAX <= abs(number) < math.inf):
        raise ValueError(value)
    return number


def _number(value: Any, kind: type[int] | type[float]) -> int | float:
    if not isinstance(value, int | float | str):
        raise ValueError(value)
    return kind(value)


def _bool(value: Any, _: str) -> bool:
    if isinstance(value, bool):
        return value
    named = {"true": True, "1": True, "false": False, "0": False}.get(str(value).strip().lower())
    if named is None:
        raise ValueError(value)
    return named


_CONVERT = {
    "string": _string, "int32": _integer, "int64": _integer, "float32": _float, "float64": _float, "bool": _bool,
}  # fmt: skip
