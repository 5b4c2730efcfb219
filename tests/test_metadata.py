"""Metadata columns: what is missing is null, what is there and is not what the column wants is a failure."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from pipeline.metadata import OWN_COLUMNS, ColumnType, MetadataColumn, MetadataError, read_metadata


def column(source: str = "json.x", type: ColumnType = "string") -> MetadataColumn:
    return MetadataColumn("c", source, type)


def value(found: Any, type: ColumnType = "string") -> Any:
    return read_metadata({"json": json.dumps({"x": found}).encode()}, [column(type=type)])["c"]


def text(found: bytes, type: ColumnType = "string") -> Any:
    return read_metadata({"txt": found}, [column("txt", type)])["c"]


def test_a_whole_member_is_text_as_it_stands() -> None:
    assert text(b" a cat\n ") == " a cat\n "
    assert text("ü 日本 \U0001f600".encode()) == "ü 日本 \U0001f600"
    assert text(b"") == ""


def test_what_is_not_there_is_null() -> None:
    columns = [
        MetadataColumn("caption", "txt"),
        MetadataColumn("score", "json.a.score", "float32"),
        MetadataColumn("label", "cls", "int32"),
    ]
    nothing = {"caption": None, "score": None, "label": None}
    assert read_metadata({}, columns) == nothing
    for there in ({}, {"a": {}}, {"a": None}, {"a": {"score": None}}, {"a": [1]}, {"a": 3}, [], 3, None, "text"):
        assert read_metadata({"json": json.dumps(there).encode()}, columns) == nothing


def test_columns_of_one_member_are_independent() -> None:
    members = {"json": b'{"a": {"b": 1.5}, "n": 3}', "txt": b"7"}
    columns = [
        MetadataColumn("deep", "json.a.b", "float64"),
        MetadataColumn("n", "json.n", "int64"),
        MetadataColumn("all_of_it", "json"),
        MetadataColumn("number", "txt", "int32"),
    ]
    assert read_metadata(members, columns) == {
        "deep": 1.5,
        "n": 3,
        "all_of_it": '{"a": {"b": 1.5}, "n": 3}',
        "number": 7,
    }


def test_a_member_is_parsed_only_where_a_field_of_it_is_asked_for() -> None:
    assert read_metadata({"json": b"{broken"}, [column("json")]) == {"c": "{broken"}
    with pytest.raises(MetadataError, match=r"\.json is not JSON"):
        read_metadata({"json": b"{broken"}, [column("json.x")])


@pytest.mark.parametrize(
    ("type", "found", "expected"),
    [
        ("string", "a", "a"), ("string", 3, "3"), ("string", 1.5, "1.5"), ("string", True, "true"), ("string", "", ""),
        ("string", ["b", {"a": "ü"}], '["b", {"a": "ü"}]'), ("string", "\ud800", "?"),
        ("int32", 3, 3), ("int32", -(2**31), -(2**31)), ("int32", 2**31 - 1, 2**31 - 1), ("int32", 3.0, 3),
        ("int32", "12", 12), ("int64", 2**63 - 1, 2**63 - 1), ("int64", -(2**63), -(2**63)),
        ("float32", 1, 1.0), ("float32", 0.1, 0.1), ("float32", "2.5e3", 2500.0), ("float32", -3.4e38, -3.4e38),
        ("float64", 1e300, 1e300), ("float64", "inf", float("inf")), ("float32", float("inf"), float("inf")),
        ("bool", True, True), ("bool", False, False), ("bool", 1, True), ("bool", 0, False), ("bool", " True ", True),
        ("bool", "false", False),
    ],
)  # fmt: skip
def test_values_become_the_columns_type(type: ColumnType, found: Any, expected: Any) -> None:
    result = value(found, type)
    assert (result, result.__class__) == (expected, expected.__class__)


@pytest.mark.parametrize(
    ("type", "found"),
    [
        ("int32", 2**31), ("int32", -(2**31) - 1), ("int32", 1.5), ("int32", True), ("int32", "x"), ("int32", "1.0"),
        ("int32", [1]), ("int32", {}), ("int32", ""), ("int64", 2**63), ("int64", float("nan")),
        ("int64", float("inf")), ("int64", 1e300), ("float32", 3.5e38), ("float32", "1e39"), ("float32", "x"),
        ("float32", True), ("float32", [1.0]), ("float32", 10**400), ("float64", ""),
        ("bool", 2), ("bool", "yes"), ("bool", []), ("bool", 1.5),
    ],
)  # fmt: skip
def test_values_that_are_not_of_the_columns_type_are_a_failure_that_names_them(type: ColumnType, found: Any) -> None:
    with pytest.raises(MetadataError, match=f"^json.x is .*, not {type}$"):
        value(found, type)


@pytest.mark.parametrize("type", ["int32", "float64", "bool"])
def test_whole_members_are_numbers_too_whatever_blanks_surround_them(type: ColumnType) -> None:
    assert text(b" 1\n", type) == 1
    for bad in (b"", b"x", b"1 2", b"9" * 5000):
        if type != "float64" or bad != b"9" * 5000:
            with pytest.raises(MetadataError):
                text(bad, type)


@pytest.mark.parametrize("data", [b"\xff\xfe", "é".encode("latin-1")])
def test_text_that_is_not_utf8_is_a_failure(data: bytes) -> None:
    for source in ("txt", "txt.x"):
        with pytest.raises(MetadataError, match=r"\.txt is not UTF-8"):
            read_metadata({"txt": data}, [column(source)])


def test_a_member_that_nobody_asked_for_is_not_looked_at() -> None:
    assert read_metadata({"json": b"\xff", "txt": b"a"}, [column("txt")]) == {"c": "a"}


def test_json_of_any_depth_is_a_value_or_a_failure() -> None:
    """There is a depth that can be read and not be written again."""
    for depth in range(sys.getrecursionlimit() // 2, sys.getrecursionlimit() + 50):
        nested = b"[" * depth + b"]" * depth
        for type in ("string", "int32"):
            try:
                found = read_metadata({"json": b'{"x": ' + nested + b"}"}, [column(type=type)])
            except MetadataError:
                continue
            assert found == {"c": nested.decode()}
    with pytest.raises(MetadataError):
        read_metadata({"json": b"[" * 100_000}, [column()])


def test_a_failures_message_stays_short() -> None:
    with pytest.raises(MetadataError) as raised:
        value("x" * 10_000, "int32")
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("name", ["", "a b", "1a", "a.b", "ä", "a-b", *sorted(OWN_COLUMNS), "Key", "TOKENS"])
def test_column_names_are_plain_and_not_those_of_the_table_itself(name: str) -> None:
    with pytest.raises(ValueError, match="not a free name"):
        MetadataColumn(name, "txt")


@pytest.mark.parametrize("source", ["", ".", "json.", ".x", "json..x"])
def test_sources_are_a_member_or_a_field_of_it(source: str) -> None:
    with pytest.raises(ValueError, match=r"not txt or json\.field"):
        MetadataColumn("c", source)


def test_extensions_are_asked_for_in_lower_case_as_the_shard_gives_them() -> None:
    assert MetadataColumn("c", "TXT").extension == "txt"
    assert MetadataColumn("c", "JSON.Some.Field").field_path == ("Some", "Field")
