"""The Parquet files: types by codebook, one schema for all parts, the same bytes for the same arguments."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import duckdb
import fsspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import EndpointConnectionError
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from make_data import fake_table
from pipeline import storage, store_requests
from pipeline.errors import Damaged, StorageError
from pipeline.metadata import MetadataColumn
from pipeline.records import DecodedSample, FailureReason, ObjectInfo, SampleFailure, Stage
from pipeline.token_table import (
    ROW_GROUP_ROWS,
    TableSpec,
    count_errors,
    errors_bytes,
    narrow_tokens,
    part_bytes,
    read_errors,
    read_footer,
    read_table,
    read_tokens,
    token_schema,
)

SHARD = ObjectInfo("s3://bucket/a.tar", 10_240, "abc")
COLUMNS = (
    MetadataColumn("caption", "txt"),
    MetadataColumn("score", "json.s", "float32"),
    MetadataColumn("width_cm", "json.w", "int64"),
    MetadataColumn("good", "json.g", "bool"),
)
METADATA = {"caption": "ü\0 cat", "score": 0.1, "width_cm": 2**40, "good": True}
NULLS = dict.fromkeys(METADATA)


def row(index: int, metadata: dict[str, Any] | None = None, **changes: Any) -> DecodedSample:
    values = {"key": f"k{index}", "index": index, "offset": 1024 * index, "size": 700, "width": 640, "height": 480}
    return DecodedSample(**{**values, "metadata": metadata or {}, **changes})  # type: ignore[arg-type]


def part(spec: TableSpec, rows: Sequence[DecodedSample], seed: int = 0, shard: ObjectInfo = SHARD) -> bytes:
    tokens_BHW = np.random.default_rng(seed).integers(0, spec.codebook_size, (len(rows), *spec.grid))
    return part_bytes(spec, shard, rows, narrow_tokens(tokens_BHW, spec), num_failed=2)


def table(data: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(data))


@pytest.mark.parametrize(
    ("codes", "type"),
    [(2, pa.int16()), (8192, pa.int16()), (32_768, pa.int16()), (32_769, pa.int32()), (65_536, pa.int32()),
     (70_000, pa.int32())],
)  # fmt: skip
def test_the_integer_type_holds_every_code_and_is_signed(codes: int, type: pa.DataType) -> None:
    spec = fake_table(codebook_size=codes)
    tokens_BHW = np.array([[[0, codes - 1], [codes // 2, 1]]])
    data = part_bytes(spec, SHARD, [row(0)], narrow_tokens(tokens_BHW, spec), 0)
    assert table(data)["tokens"].to_pylist() == [[0, codes - 1, codes // 2, 1]]
    assert table(data).schema.field("tokens").type.value_type == type


@pytest.mark.parametrize("token", [-1, 8192, 40_000, 70_000, 2**40])
def test_a_token_outside_the_codebook_is_refused_before_it_is_narrowed(token: int) -> None:
    assert np.array(40_000).astype(np.int16) < 0  # what narrowing would do, without a word
    tokens_BHW = np.zeros((3, 2, 2), np.int64)
    tokens_BHW[1, 0, 1] = token
    with pytest.raises(ValueError, match=r"outside \[0, 8192\)"):
        narrow_tokens(tokens_BHW, fake_table(codebook_size=8192))


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 1), (3, 1, 4), (3, 2, 3), (3, 2, 2, 1)])
def test_another_grid_is_refused_even_with_as_many_tokens(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="it promised"):
        narrow_tokens(np.zeros(shape, np.int64), fake_table())


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.bool_])
def test_tokens_that_are_no_integers_are_refused(dtype: type) -> None:
    with pytest.raises(ValueError, match="not integers"):
        narrow_tokens(np.zeros((1, 2, 2), dtype), fake_table())


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64, np.uint64])
def test_every_integer_type_of_an_encoder_is_taken(dtype: type) -> None:
    assert narrow_tokens(np.full((1, 2, 2), 255, dtype), fake_table()).tolist() == [[255] * 4]


def test_tokens_are_row_major_in_a_list_of_fixed_length_whose_child_is_element() -> None:
    spec = fake_table(grid=(2, 3))
    data = part_bytes(spec, SHARD, [row(0)], narrow_tokens(np.arange(6).reshape(1, 2, 3), spec), 0)
    assert table(data)["tokens"].to_pylist() == [[0, 1, 2, 3, 4, 5]]
    type = table(data).schema.field("tokens").type
    assert type.list_size == 6 and type.value_field.name == "element"
    assert "tokens.list.element" in [pq.ParquetFile(io.BytesIO(data)).schema.column(n).path for n in range(8)]


def test_rows_come_back_as_they_were_with_nulls_where_nothing_was() -> None:
    rows = [row(0, METADATA), row(1, NULLS, offset=None, key="folder/ü key")]
    found = table(part(fake_table(columns=COLUMNS), rows)).drop_columns(["tokens"]).to_pylist()
    own = {"shard": SHARD.url, "width": 640, "height": 480, "size": 700}
    assert found == [
        {"key": "k0", "index": 0, "offset": 0, **own, **METADATA, "score": pytest.approx(0.1)},
        {"key": "folder/ü key", "index": 1, "offset": None, **own, **NULLS},
    ]
    assert table(part(fake_table(columns=COLUMNS), rows)).schema.remove_metadata() == token_schema(
        fake_table(columns=COLUMNS)
    )


def test_the_same_arguments_give_the_same_bytes_and_others_give_others() -> None:
    spec, rows = fake_table(columns=COLUMNS), [row(n, METADATA if n % 2 else NULLS) for n in range(50)]
    data = part(spec, rows)
    assert part(spec, rows) == data
    assert part(spec, rows, seed=1) != data
    assert part(spec, rows, shard=ObjectInfo(SHARD.url, SHARD.size_bytes, "other etag")) != data
    assert part(fake_table(columns=COLUMNS[::-1]), rows) != data


def test_more_rows_than_one_group_holds_stay_in_order() -> None:
    spec, number = fake_table(), ROW_GROUP_ROWS * 2 + 5
    data = part(spec, [row(n) for n in range(number)])
    assert pq.ParquetFile(io.BytesIO(data)).num_row_groups == 3
    assert table(data)["index"].to_pylist() == list(range(number))
    assert part(spec, [row(n) for n in range(number)]) == data


def test_the_footer_says_what_made_the_part_and_of_what(tmp_path: Path) -> None:
    shard = ObjectInfo("https://user:secret@host/a.tar?sig=abc", 10_240, "etag")
    (tmp_path / "p.parquet").write_bytes(part(fake_table(columns=COLUMNS), [row(0, METADATA)], shard=shard))
    footer = read_footer(str(tmp_path / "p.parquet"))
    assert footer == {
        "schema_version": 1, "tokenizer_id": "fake", "grid": [2, 2], "codebook_size": 256,
        "image_spec": {"size": 16, "resample": "lanczos", "small": "refuse", "version": 1},
        "columns": [{"name": c.name, "from": c.source, "type": c.type} for c in COLUMNS],
        "shard": "https://host/a.tar", "shard_size": 10_240, "shard_etag": "etag", "num_rows": 1, "num_failed": 2,
    }  # fmt: skip


def test_no_secret_of_a_url_is_in_any_byte_of_a_part_or_an_errors_file() -> None:
    shard = ObjectInfo("https://user:secret@host/a.tar?sig=hidden", 1, "e")
    failure = SampleFailure("k", 0, 0, 1, Stage.SHARD, FailureReason.SHARD_UNREADABLE, f"GET {shard.url} gave 403")
    files = [part(fake_table(), [row(0)], shard=shard), errors_bytes(shard, [failure])]
    assert all(secret not in data for secret in (b"secret", b"hidden", b"user:") for data in files)
    assert [r["message"] for r in table(files[1]).to_pylist()] == ["GET https://host/a.tar gave 403"]


@pytest.mark.parametrize("damage", ["empty", "cut", "no footer", "not parquet", "foreign", "bad thrift"])
def test_a_footer_that_cannot_be_read_is_a_value_error(tmp_path: Path, damage: str) -> None:
    data = part(fake_table(), [row(0)])
    other = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}), other)
    damaged = {
        "empty": b"", "cut": data[:-10], "no footer": data[: len(data) // 2], "not parquet": b"x" * 500,
        "foreign": other.getvalue(), "bad thrift": data[:-300] + b"\xff" * 292 + data[-8:],
    }[damage]  # fmt: skip
    (tmp_path / "p.parquet").write_bytes(damaged)
    with pytest.raises(ValueError, match="not a whole part"):
        read_footer(str(tmp_path / "p.parquet"))


def test_a_flipped_byte_in_any_page_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    """Page checksums: without them most flips give other tokens, without a word. (The footer has none: the part's
    sha256 in the ledger finds flips there.)"""
    data, path = part(fake_table(grid=(8, 8)), [row(n) for n in range(40)]), tmp_path / "p.parquet"
    path.write_bytes(data)
    intact, num_silent_without = read_table([str(path)]), 0
    for position in range(4, len(data) - 8 - pq.read_metadata(io.BytesIO(data)).serialized_size, 5):
        flipped = bytearray(data)
        flipped[position] ^= 0x10
        path.write_bytes(flipped)
        try:
            rows = read_table([str(path)])
        except (OSError, pa.ArrowException):
            num_silent_without += _reads_as_another_table(bytes(flipped), intact)
        else:
            assert rows.equals(intact), position
    assert num_silent_without > 100


def _reads_as_another_table(data: bytes, intact: pa.Table) -> bool:
    try:
        return not table(data).equals(intact)
    except (OSError, pa.ArrowException):
        return False


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three parts: of nulls only, without a row, and with everything; as wide a trap for readers as a run can make."""
    spec = fake_table(columns=COLUMNS, codebook_size=32_768)
    for name, rows in (("a", [row(0, NULLS, offset=None)]), ("b", []), ("c", [row(n, METADATA) for n in range(3)])):
        (tmp_path / f"{name}.parquet").write_bytes(part(spec, rows))
    return tmp_path


def test_all_parts_have_one_schema_also_the_one_without_rows(folder: Path) -> None:
    schemas = {pq.read_schema(path).remove_metadata() for path in folder.iterdir()}
    assert schemas == {token_schema(fake_table(columns=COLUMNS, codebook_size=32_768))}


def test_pyarrow_polars_and_duckdb_read_the_folder_as_one_table(folder: Path) -> None:
    arrow = ds.dataset(folder).to_table().sort_by("index")
    assert arrow.num_rows == 4
    polars = pl.scan_parquet(f"{folder}/*.parquet").sort("index").collect()
    assert polars.to_arrow()["tokens"].to_pylist() == arrow["tokens"].to_pylist()
    assert polars["caption"].to_list() == [None, *["ü\0 cat"] * 3]
    assert polars.schema["tokens"] == pl.Array(pl.Int16, 4)
    query = f"SELECT key, len(tokens), tokens[4], caption, typeof(tokens) FROM '{folder}/*.parquet' ORDER BY index, key"
    rows = duckdb.sql(query).fetchall()
    assert [(key, length) for key, length, *_ in rows] == [("k0", 4), ("k0", 4), ("k1", 4), ("k2", 4)]
    assert [last for _, _, last, *_ in rows] == [tokens[3] for tokens in arrow["tokens"].to_pylist()]
    assert rows[0][4].startswith("SMALLINT")
    counted = f"SELECT count(*) FROM (SELECT unnest(tokens) AS t FROM '{folder}/*.parquet') WHERE t BETWEEN 0 AND 32767"
    assert duckdb.sql(counted).fetchall() == [(16,)]


def test_our_own_readers_give_rows_by_key_by_number_and_in_the_order_of_the_list(folder: Path) -> None:
    urls = [str(folder / f"{name}.parquet") for name in "cba"]
    assert read_table(urls, ["index"])["index"].to_pylist() == [0, 1, 2, 0]
    assert [r["key"] for r in read_tokens(urls)] == ["k0", "k1", "k2", "k0"]
    assert [r["key"] for r in read_tokens(urls, limit=2)] == ["k0", "k1"]
    assert [r["key"] for r in read_tokens(urls, keys=["k2", "k0"])] == ["k0", "k2", "k0"]
    assert read_tokens(urls, keys=["none"]) == [] == read_tokens([])
    one = read_tokens(urls, keys=["k1"])[0]
    assert one["tokens"].shape == (4,) and one["tokens"].dtype == np.int16 and one["caption"] == "ü\0 cat"
    assert read_table([]).num_rows == 0


def test_errors_are_a_table_of_their_own_and_are_counted_by_reason(tmp_path: Path) -> None:
    def failure(index: int | None, reason: FailureReason, stage: Stage = Stage.DECODE) -> SampleFailure:
        return SampleFailure(index and f"k{index}", index, None, None, stage, reason, "m\ud800")

    one = [failure(1, FailureReason.NOT_AN_IMAGE), failure(2, FailureReason.TRUNCATED_IMAGE)]
    two = [failure(3, FailureReason.NOT_AN_IMAGE), failure(None, FailureReason.SHARD_CRASHED, Stage.SHARD)]
    for name, failures in (("one", one), ("two", two)):
        (tmp_path / f"{name}.parquet").write_bytes(errors_bytes(SHARD, failures))
    urls = [str(tmp_path / "one.parquet"), str(tmp_path / "two.parquet")]
    assert count_errors(urls) == {"not_an_image": 2, "truncated_image": 1, "shard_crashed": 1}
    assert count_errors([]) == {}
    assert read_table(urls).to_pylist()[3] == {
        "shard": SHARD.url, "key": None, "index": None, "offset": None, "size": None, "stage": "shard",
        "reason": "shard_crashed", "message": "m?",
    }  # fmt: skip
    assert errors_bytes(SHARD, one) == errors_bytes(SHARD, one)
    assert pl.scan_parquet(f"{tmp_path}/*.parquet").collect().height == 4


def test_each_reason_and_stage_can_be_stored_and_is_a_plain_word() -> None:
    failures = [SampleFailure("k", 0, 0, 0, stage, reason, "") for stage in Stage for reason in FailureReason]
    assert len(table(errors_bytes(SHARD, failures))) == len(failures)
    assert all(
        json.loads(json.dumps(reason.value)) == reason and str(reason).isidentifier() for reason in FailureReason
    )


# A store that fails


class Shaky(MemoryFileSystem):
    """Raises the first of `errors` at each read, by its own request or through an open file."""

    protocol = "shaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    errors: ClassVar[list[Exception]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("shaky://", "memory://"))

    def cat_file(self, path: str, *arguments: Any, **options: Any) -> bytes:
        Shaky.fail()
        return bytes(super().cat_file(path, *arguments, **options))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return super()._open(path, mode, **options) if mode != "rb" else ShakyFile(self, path, self.cat_whole(path))

    def cat_whole(self, path: str) -> bytes:
        return bytes(self.store[path].getvalue())

    @staticmethod
    def fail() -> None:
        if Shaky.errors:
            raise Shaky.errors.pop(0)


class ShakyFile(MemoryFile):
    def read(self, *arguments: Any) -> bytes:
        Shaky.fail()
        return bytes(super().read(*arguments))


READERS = {
    "footer": lambda: read_footer("shaky://b/part.parquet"),
    "rows": lambda: read_table(["shaky://b/part.parquet"], ["key"]).to_pylist(),
    "errors": lambda: read_errors("shaky://b/errors.parquet"),
    "counts": lambda: count_errors(["shaky://b/errors.parquet"]),
}


@pytest.fixture
def shaky(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_requests, "MAX_PAUSE_S", 0.0)
    monkeypatch.setattr(Shaky, "errors", [])
    fsspec.register_implementation("shaky", Shaky, clobber=True)
    failure = SampleFailure("k", 0, 0, 0, Stage.DECODE, FailureReason.NOT_AN_IMAGE, "m")
    storage.publish("shaky://b/part.parquet", part(fake_table(), [row(0)]))
    storage.publish("shaky://b/errors.parquet", errors_bytes(SHARD, [failure]))


PASSING = [ConnectionResetError("reset"), EndpointConnectionError(endpoint_url="http://h"), TimeoutError()]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_a_failure_that_passes_changes_nothing(shaky: None, read: str, error: Exception) -> None:
    wanted = READERS[read]()  # type: ignore[no-untyped-call]
    Shaky.errors = [error, error]
    assert READERS[read]() == wanted and not Shaky.errors  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("error", [*PASSING, PermissionError(13, "denied")], ids=repr)
def test_a_failure_that_stays_is_the_stores_and_not_a_torn_file(
    shaky: None, monkeypatch: pytest.MonkeyPatch, read: str, error: Exception
) -> None:
    monkeypatch.setattr(store_requests, "PATIENCE_S", 0.2)
    Shaky.errors = [error] * 10**6
    with pytest.raises(StorageError, match=f"cannot read shaky://b/.*{type(error).__name__}") as raised:
        READERS[read]()  # type: ignore[no-untyped-call]
    assert not isinstance(raised.value, Damaged)


def test_a_damaged_errors_file_is_known_as_one(shaky: None) -> None:
    for data in (b"", b"PAR1", storage.read_bytes("shaky://b/errors.parquet")[:-9], part(fake_table(), [row(0)])):
        storage.publish("shaky://b/errors.parquet", data)
        with pytest.raises(Damaged, match="no whole errors file"):
            READERS["errors"]()  # type: ignore[no-untyped-call]
