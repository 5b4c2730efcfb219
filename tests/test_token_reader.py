"""Token rows for training: right rows, each once, resumed at any batch and after any death."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from make_tokens import TABLE, TokenWorld
from pipeline.errors import Damaged, PipelineError, RunMismatch, StorageError
from pipeline.token_order import Share
from pipeline.token_reader import ReaderBatch, ReaderOptions, TokenReader
from pipeline.token_run import Part, TokenRun
from read_until_killed import EPOCHS, OPTIONS

SIZES = {"a": 5000, "b": 0, "c": 3, "d": 700, "e": 1}
NUM_ROWS = sum(SIZES.values())
SMALL = ReaderOptions(batch_size=64, columns=("key",), shuffle_rows=1000)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TokenRun:
    return made(str(tmp_path_factory.mktemp("tokens") / "out")).open()


def made(url: str) -> TokenWorld:
    world = TokenWorld(url)
    for name, num_rows in SIZES.items():
        world.add(f"/in/{name}.tar", num_rows)
    return world


def keys(batches: Sequence[ReaderBatch]) -> list[str]:
    return [key for batch in batches for key in batch.columns["key"]]


def test_each_row_comes_once_with_its_own_tokens_and_columns(run: TokenRun) -> None:
    options = replace(SMALL, columns=("caption", "key", "index", "offset"))
    wanted = {row["key"]: row for part in run.parts for row in run.read_part(part).to_pylist()}
    batches = list(TokenReader(run, options))
    assert [len(batch) for batch in batches] == [64] * (NUM_ROWS // 64) + [NUM_ROWS % 64]
    assert all(batch.tokens_BN.dtype == np.int16 and batch.tokens_BN.shape[1] == 6 for batch in batches)
    rows = [row for batch in batches for row in zip(batch.tokens_BN.tolist(), *batch.columns.values(), strict=True)]
    assert Counter(row[2] for row in rows) == Counter(dict.fromkeys(wanted, 1))
    for tokens_N, caption, key, index, offset in rows:
        row = wanted[key]
        assert (tokens_N, caption, index, offset) == (row["tokens"], row["caption"], row["index"], row["offset"])


def test_a_column_is_an_array_or_a_list_by_its_type_alone(run: TokenRun) -> None:
    batch = next(
        iter(TokenReader(run, replace(SMALL, columns=("tokens", "key", "caption", "index", "size", "offset"))))
    )
    kinds = {name: type(values) for name, values in batch.columns.items()}
    assert kinds == {"key": list, "caption": list, "index": np.ndarray, "size": np.ndarray, "offset": list}
    assert batch.columns["index"].dtype == np.int32 and batch.columns["size"].dtype == np.int64  # type: ignore[union-attr]
    assert all(len(values) == 64 for values in batch.columns.values())


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_each_row_comes_once_an_epoch_whatever_the_number_of_readers(run: TokenRun, count: int) -> None:
    for epoch in (0, 1):
        shares = [keys(list(TokenReader(run, SMALL, Share(n, count)).batches(epoch))) for n in range(count)]
        found = [key for share in shares for key in share]
        assert len(found) == NUM_ROWS == len(set(found))


def test_epochs_follow_each_other_in_orders_of_their_own_and_seeds_differ(run: TokenRun) -> None:
    reader = TokenReader(run, SMALL)
    epochs = [keys(list(reader)) for _ in range(2)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])
    assert [keys(list(reader.batches(epoch))) for epoch in (0, 1)] == epochs
    assert keys(list(TokenReader(run, replace(SMALL, seed=1)))) not in epochs
    assert keys(list(TokenReader(run, SMALL, threads=1))) == epochs[0]


def test_without_shuffling_rows_come_part_by_part_as_they_are_stored(run: TokenRun) -> None:
    found = keys(list(TokenReader(run, replace(SMALL, shuffle_rows=0))))
    assert found == [f"/in/{name}.tar-{n}" for name, num_rows in SIZES.items() for n in range(num_rows)]


@pytest.mark.parametrize("count", [1, 3, 8])
def test_with_drop_last_all_readers_have_as_many_whole_batches(run: TokenRun, count: int) -> None:
    readers = [TokenReader(run, replace(SMALL, drop_last=True), Share(n, count)) for n in range(count)]
    batches = [list(reader) for reader in readers]
    assert {len(share) for share in batches} == {NUM_ROWS // count // 64} == {len(reader) for reader in readers}
    assert {len(batch) for share in batches for batch in share} == {64}
    found = [key for share in batches for key in keys(share)]
    assert len(set(found)) == len(found) > NUM_ROWS - 65 * count


def test_more_readers_than_rows_leave_some_with_nothing(tmp_path: Path) -> None:
    world = TokenWorld(str(tmp_path))
    world.add("/in/a.tar", 2)
    readers = [TokenReader(world.open(), SMALL, Share(n, 4)) for n in range(4)]
    assert [len(list(reader)) for reader in readers] == [1, 1, 0, 0] == [len(reader) for reader in readers]
    assert [reader.epoch for reader in readers] == [1] * 4


# Resuming


@pytest.mark.parametrize("drop_last", [False, True])
def test_resumed_behind_any_batch_the_rest_is_the_same(run: TokenRun, drop_last: bool) -> None:
    options = replace(SMALL, batch_size=190, drop_last=drop_last)
    whole, states = TokenReader(run, options, Share(1, 2)), []
    batches = []
    for batch in whole:
        batches.append(batch)
        states.append(json.loads(json.dumps(whole.state_dict())))
    following = keys(list(whole))
    assert states[-1]["epoch"] == 1 and states[-1]["num_batches"] == 0
    for number, state in enumerate(states[:-1], 1):
        resumed = TokenReader(run, options, Share(1, 2))
        resumed.load_state_dict(state)
        rest = list(resumed)
        assert keys(rest) == keys(batches[number:])
        assert [batch.tokens_BN.tolist() for batch in rest] == [batch.tokens_BN.tolist() for batch in batches[number:]]
    assert keys(list(resumed)) == following


def test_breaking_off_and_iterating_again_goes_on(run: TokenRun) -> None:
    reader = TokenReader(run, SMALL)
    first = [batch for _, batch in zip(range(5), reader, strict=False)]
    assert keys([*first, *reader]) == keys(list(reader.batches(0)))


def test_killed_again_and_again_a_reader_gives_what_one_that_lived_gives(tmp_path: Path) -> None:
    world, log = TokenWorld(str(tmp_path / "out")), tmp_path / "log"
    for name, num_rows in {"a": 150, "b": 0, "c": 90, "d": 130, "e": 141}.items():
        world.add(f"/in/{name}.tar", num_rows)
    command = [sys.executable, str(Path(__file__).parent / "read_until_killed.py"), world.output.url, str(log)]
    codes = []
    while not codes or codes[-1] != 0:
        done = subprocess.run([*command, "1", "2", "17"], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        codes.append(done.returncode)
    assert codes.count(-signal.SIGKILL) >= 2
    lived = TokenReader(world.open(), OPTIONS, Share(1, 2))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["epoch"], line["keys"]) for line in lines] == [
        (epoch, batch.columns["key"]) for epoch in range(EPOCHS) for batch in lived.batches(epoch)
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"batch_size": 65}, "batch_size was 64 and is 65"),
        ({"shuffle_rows": 0}, "shuffle_rows was 1000 and is 0"),
        ({"drop_last": True}, "drop_last was False and is True"),
    ],
)
def test_a_state_of_another_order_is_refused_but_at_an_epochs_end(
    run: TokenRun, changes: dict[str, Any], said: str
) -> None:
    reader, other = TokenReader(run, SMALL), TokenReader(run, replace(SMALL, **changes))
    next(iter(reader))
    with pytest.raises(RunMismatch, match=f"{said}; go on with the next epoch"):
        other.load_state_dict(reader.state_dict())
    list(reader)
    other.load_state_dict(reader.state_dict())
    assert other.epoch == 1


def test_a_state_of_other_shares_or_of_a_run_that_has_grown_is_refused(tmp_path: Path) -> None:
    world = made(str(tmp_path))
    reader = TokenReader(world.open(), SMALL)
    next(iter(reader))
    with pytest.raises(RunMismatch, match="shares was 1 and is 2"):
        TokenReader(world.open(), SMALL, Share(0, 2)).load_state_dict(reader.state_dict())
    world.add("/in/new.tar", 3)
    with pytest.raises(RunMismatch, match="rows was 5704 and is 5707"):
        TokenReader(world.open(), SMALL).load_state_dict(reader.state_dict())


def test_columns_may_be_others_when_resumed(run: TokenRun) -> None:
    reader, other = TokenReader(run, SMALL), TokenReader(run, replace(SMALL, columns=("caption",)))
    first = next(iter(reader))
    other.load_state_dict(reader.state_dict())
    assert np.array_equal(next(iter(other)).tokens_BN, next(iter(reader)).tokens_BN) and len(first) == 64


# What is wrong


def test_a_run_without_rows_or_with_a_part_missing_is_refused(tmp_path: Path) -> None:
    world = TokenWorld(str(tmp_path))
    with pytest.raises(PipelineError, match=r"has no token rows yet; `dvae status"):
        TokenReader(world.open(), SMALL)
    world.add("/in/a.tar", 5)
    Path(world.output.part(world.add("/in/b.tar", 5))).unlink()
    with pytest.raises(Damaged, match=r"tokens/b-\w+.parquet is missing or damaged; `dvae verify"):
        TokenReader(world.open(), SMALL)


def test_options_that_make_no_sense_are_refused(run: TokenRun) -> None:
    for changes in ({"batch_size": 0}, {"seed": -1}, {"shuffle_rows": -1}, {"batch_size": 8.0}):
        with pytest.raises(ValueError, match="must be a whole number of at least"):
            replace(SMALL, **changes)  # type: ignore[arg-type]
    with pytest.raises(PipelineError, match="has no column 'text'"):
        TokenReader(run, replace(SMALL, columns=("text",)))


def test_a_damaged_part_ends_the_reading_with_its_name(tmp_path: Path) -> None:
    world = made(str(tmp_path))
    run = world.open()
    path = Path(run.parts[3].url)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StorageError, match=path.name):
        list(TokenReader(run, SMALL))


# Memory


@dataclass(frozen=True)
class CountingRun(TokenRun):
    """Notes how many rows were read."""

    def read_rows(self, part: Part, start: int, stop: int, columns: Sequence[str] | None = None) -> pa.Table:
        READ.append(stop - start)
        return super().read_rows(part, start, stop, columns)


READ: list[int] = []


def test_no_more_is_read_ahead_than_a_window_beside_the_one_in_use(tmp_path: Path) -> None:
    world = TokenWorld(str(tmp_path))
    for number in range(40):
        world.add(f"/in/{number}.tar", 100)
    opened = world.open()
    run = CountingRun(opened.output, opened.description, TABLE, opened.parts)
    READ.clear()
    given = 0
    for batch in TokenReader(run, replace(SMALL, batch_size=50, shuffle_rows=400)):
        given += len(batch)
        assert sum(READ) <= given + 2 * 400 + 50
    assert given == sum(READ) == 4000
