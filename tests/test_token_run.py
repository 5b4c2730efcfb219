"""A run opened for reading: which parts are committed, their rows, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from make_data import MortalStore, fake_table
from pipeline import storage, store_requests
from pipeline.errors import Damaged, NoRun, PipelineError, RunMismatch, StorageError
from pipeline.ledger import Ledger
from pipeline.metadata import MetadataColumn
from pipeline.output import OutputPrefix, RunDescription, claim, part_name
from pipeline.records import DecodedSample, ObjectInfo, ShardResult, ShardState
from pipeline.token_run import TokenRun
from pipeline.token_table import ROW_GROUP_ROWS, TableSpec, narrow_tokens, part_bytes, token_schema
from test_token_table import Shaky

TABLE = fake_table(grid=(2, 3), columns=(MetadataColumn("caption", "txt"),))


def shard_bytes(shard: str, num_rows: int, table: TableSpec = TABLE, etag: str = "e") -> bytes:
    samples = [
        DecodedSample(f"{shard}-{n}", n, 1024 * n, 700, 64, 48, {"caption": None if n % 3 else f"ü\0 {n}"})
        for n in range(num_rows)
    ]
    tokens_BHW = np.random.default_rng(num_rows).integers(0, table.codebook_size, (num_rows, *table.grid))
    return part_bytes(table, ObjectInfo(shard, 10**6, etag), samples, narrow_tokens(tokens_BHW, table), num_failed=0)


class World:
    """An output whose parts are made one by one, with a row in the ledger or without."""

    def __init__(self, url: str) -> None:
        self.output = OutputPrefix(url)
        claim(self.output, RunDescription(TABLE, {}, {}), accept_numerics=False)

    def add(self, shard: str, num_rows: int, *, recorded: bool = True, **changes: Any) -> str:
        data, name = shard_bytes(shard, num_rows, **changes), part_name(shard)
        storage.publish(self.output.part(name), data)
        if recorded:
            self.record(shard, part=name, num_rows=num_rows, part_bytes=len(data))
        return name

    def record(self, shard: str, state: ShardState = ShardState.DONE, **values: Any) -> None:
        Ledger(self.output).append([ShardResult(shard, 10**6, "e", state, **values)])

    def open(self) -> TokenRun:
        return TokenRun.open(self.output.url)

    def rows(self) -> list[dict[str, Any]]:
        run = self.open()
        return [row for part in run.parts for row in run.read_part(part).to_pylist()]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(str(tmp_path / "out"))


def test_the_parts_of_a_run_come_by_name_with_what_the_ledger_says(world: World) -> None:
    for shard, num_rows in (("/in/c.tar", 3), ("/in/a.tar", 5), ("/in/b.tar", 0)):
        world.add(shard, num_rows)
    run = world.open()
    assert [(part.shard, part.num_rows) for part in run.parts] == [("/in/a.tar", 5), ("/in/b.tar", 0), ("/in/c.tar", 3)]
    assert [part.name for part in run.parts] == sorted(part.name for part in run.parts)
    assert all(Path(part.url).stat().st_size == part.size_bytes for part in run.parts)
    assert (run.table, run.num_rows, run.missing) == (TABLE, 8, ())


def test_a_part_that_is_as_the_ledger_says_costs_no_request_when_a_run_is_opened(world: World) -> None:
    name = world.add("/in/a.tar", 4)
    path = Path(world.output.part(name))
    path.write_bytes(b"x" * path.stat().st_size)
    assert world.open().num_rows == 4


@pytest.mark.parametrize("ledger", ["without", "behind", "older than the part"])
def test_where_the_ledger_does_not_know_a_part_its_footer_tells(world: World, ledger: str) -> None:
    world.add("/in/a.tar", 5, recorded=ledger != "without")
    if ledger == "behind":
        world.add("/in/b.tar", 2, recorded=False)
    if ledger == "older than the part":
        world.add("/in/a.tar", 2, recorded=False)
    found = {part.shard: part.num_rows for part in world.open().parts}
    assert found == {"without": {"/in/a.tar": 5}, "behind": {"/in/a.tar": 5, "/in/b.tar": 2}}.get(
        ledger, {"/in/a.tar": 2}
    )
    assert len(world.rows()) == sum(found.values())


@pytest.mark.parametrize("state", [ShardState.QUARANTINED, ShardState.REMOVED])
def test_what_an_earlier_run_left_of_a_shard_that_is_not_done_is_no_part(world: World, state: ShardState) -> None:
    world.add("/in/a.tar", 5)
    world.add("/in/b.tar", 2)
    world.record("/in/b.tar", state)
    assert [part.shard for part in world.open().parts] == ["/in/a.tar"]


def test_files_that_are_no_parts_of_the_run_are_passed_over_with_a_word(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    good = Path(world.output.part(world.add("/in/a.tar", 5)))
    world.add("/in/other.tar", 5, recorded=False, table=replace(TABLE, tokenizer_id="other"))
    (good.parent / "torn.parquet").write_bytes(good.read_bytes()[:-9])
    (good.parent / "copy.parquet").write_bytes(good.read_bytes())
    (good.parent / "notes.txt").write_text("no Parquet")
    assert [part.shard for part in world.open().parts] == ["/in/a.tar"]
    assert caplog.text.count("is passed over") == 3


def test_a_part_that_the_ledger_promises_and_nobody_finds_is_named(world: World) -> None:
    world.add("/in/a.tar", 5)
    Path(world.output.part(gone := world.add("/in/b.tar", 2))).unlink()
    assert world.open().missing == (gone,)


def test_a_growing_run_is_read_as_it_was_when_it_was_opened(world: World) -> None:
    world.add("/in/b.tar", 5)
    run = world.open()
    world.add("/in/a.tar", 3)
    assert run.num_rows == 5 and world.open().num_rows == 8


def test_an_output_without_a_run_or_of_another_command_is_refused(tmp_path: Path) -> None:
    for text in (None, "{}", json.dumps({"step": 3})):
        if text is not None:
            (tmp_path / "run.json").write_text(text)
        with pytest.raises(NoRun, match="dvae tokenize"):
            TokenRun.open(str(tmp_path))


def test_a_run_without_parts_is_empty(world: World) -> None:
    assert world.open().parts == () and list(world.open().batches(())) == []


def test_a_newer_schema_is_refused_with_both_versions_and_the_remedy(world: World) -> None:
    url = world.output.file("run.json")
    storage.publish(url, json.dumps({**json.loads(storage.read_bytes(url)), "schema_version": 2}).encode())
    with pytest.raises(RunMismatch, match=r"run\.json is of another version.*schema 2.*knows 1; install a newer"):
        world.open()


# Rows


def test_rows_come_as_they_were_written_all_columns_or_some(world: World) -> None:
    world.add("/in/a.tar", 5)
    run = world.open()
    wanted = pq.read_table(run.parts[0].url)
    assert run.read_part(run.parts[0]).equals(wanted)
    assert run.read_part(run.parts[0], ["caption", "key"]).equals(wanted.select(["caption", "key"]))
    assert run.read_rows(run.parts[0], 1, 4, ["key"]).equals(wanted.select(["key"]).slice(1, 3))
    assert run.read_part(run.parts[0]).schema.remove_metadata() == token_schema(TABLE)


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (2047, 2049), (2048, 4096), (100, 4200), (4100, 4101), (7, 7)])
def test_any_span_of_rows_can_be_read_across_row_groups(world: World, start: int, stop: int) -> None:
    world.add("/in/a.tar", 2 * ROW_GROUP_ROWS + 200)
    run = world.open()
    assert run.read_rows(run.parts[0], start, stop, ["index"])["index"].to_pylist() == list(range(start, stop))


@pytest.mark.parametrize("rows", [1, 1000, 2048, 5000, 10**6])
def test_batches_give_every_row_once_in_order_with_tokens_as_an_array(world: World, rows: int) -> None:
    counts = {"/in/a.tar": 3, "/in/b.tar": 0, "/in/c.tar": 9000 if rows > 1 else 5}
    for shard, num_rows in counts.items():
        world.add(shard, num_rows)
    run = world.open()
    batches = list(run.batches(run.parts, ["key", "tokens"], rows))
    assert all(0 < len(batch) <= rows and batch.tokens_BN.dtype == np.int16 for batch in batches)
    assert [key for batch in batches for key in batch.columns["key"].to_pylist()] == [
        f"{shard}-{n}" for shard, num_rows in counts.items() for n in range(num_rows)
    ]
    written = pa.concat_tables(pq.read_table(part.url) for part in run.parts)["tokens"].to_pylist()
    assert np.concatenate([batch.tokens_BN for batch in batches]).tolist() == written
    assert {(batch.part.shard, name) for batch in batches for name in batch.columns["key"].to_pylist()} == {
        (shard, f"{shard}-{n}") for shard, num_rows in counts.items() for n in range(num_rows)
    }


def test_a_column_that_is_not_there_is_refused_with_those_that_are(world: World) -> None:
    world.add("/in/a.tar", 1)
    run = world.open()
    with pytest.raises(PipelineError, match=r"no column 'captoin'; its columns are key, .*, caption"):
        run.read_part(run.parts[0], ["captoin"])


def test_a_flipped_bit_is_damage_and_never_another_token(world: World) -> None:
    path = Path(world.output.part(world.add("/in/a.tar", 50)))
    data = bytearray(path.read_bytes())
    tokens = pq.read_metadata(path).row_group(0).column(3)
    data[tokens.data_page_offset + tokens.total_compressed_size // 4] ^= 0x10
    path.write_bytes(data)
    run = world.open()
    with pytest.raises(Damaged, match=path.name):
        run.read_part(run.parts[0])


def test_a_part_that_was_replaced_or_dropped_since_is_an_error_that_says_so(world: World) -> None:
    world.add("/in/a.tar", 5)
    run = world.open()
    world.add("/in/a.tar", 4)
    with pytest.raises(StorageError, match="has changed since the run was opened: it has 4 rows, not 5"):
        run.read_part(run.parts[0])
    Path(run.parts[0].url).unlink()
    with pytest.raises(StorageError, match="has changed since the run was opened: it is gone"):
        run.read_part(run.parts[0])


def test_a_part_of_another_model_under_the_right_name_is_refused(world: World) -> None:
    world.add("/in/a.tar", 5)
    run = world.open()
    world.add("/in/a.tar", 5, table=replace(TABLE, tokenizer_id="other"))
    with pytest.raises(Damaged, match="is of another run: tokenizer_id is 'other' there"):
        run.read_part(run.parts[0])


def test_a_store_that_fails_now_and_then_gives_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_requests, "MAX_PAUSE_S", 0.0)
    monkeypatch.setattr(Shaky, "errors", [])
    fsspec.register_implementation("shaky", Shaky, clobber=True)
    world = World("shaky://b/run")
    world.add("/in/a.tar", 5)
    run = world.open()
    wanted = run.read_part(run.parts[0])
    Shaky.errors = [ConnectionResetError("reset"), TimeoutError()]
    assert run.read_part(run.parts[0]).equals(wanted) and not Shaky.errors


def test_any_store_of_fsspec_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    MortalStore.fresh()
    world = World("mortal://b/run")
    world.add("/in/a.tar", 5)
    assert [row["index"] for row in world.rows()] == list(range(5))
