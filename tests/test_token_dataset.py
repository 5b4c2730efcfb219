"""Token rows through torch's DataLoader: ranks, workers, tensors, and resuming whatever was made ahead."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from jobs.token_dataset import TokenDataset, TokenLoader, TokenRows
from make_tokens import TokenWorld
from pipeline.errors import NoRun, PipelineError, RunMismatch
from pipeline.token_run import TokenRun

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
SIZES = {"a": 230, "b": 0, "c": 3, "d": 100, "e": 70}
NUM_ROWS = sum(SIZES.values())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TokenRun:
    world = TokenWorld(str(tmp_path_factory.mktemp("tokens") / "out"))
    for name, num_rows in SIZES.items():
        world.add(f"/in/{name}.tar", num_rows)
    return world.open()


def dataset(run: TokenRun, rank: int = 0, world_size: int = 1, **changes: Any) -> TokenDataset:
    values: dict[str, Any] = {"batch_size": 16, "columns": ["key"], "shuffle_rows": 100, **changes}
    return TokenDataset(run, rank=rank, world_size=world_size, **values)


def keys(batches: Sequence[TokenRows]) -> list[list[str]]:
    return [batch.columns["key"] for batch in batches]  # type: ignore[misc]


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 2), (3, 0), (1, 3)])
def test_each_row_comes_once_an_epoch_over_all_ranks_and_workers(
    run: TokenRun, world_size: int, num_workers: int
) -> None:
    loaders = [TokenLoader(dataset(run, rank, world_size), num_workers) for rank in range(world_size)]
    batches = [list(loader) for loader in loaders]
    assert [len(each) for each in batches] == [len(loader) for loader in loaders]
    found = Counter(key for rank in batches for each in keys(rank) for key in each)
    assert len(found) == NUM_ROWS and set(found.values()) == {1}
    assert [loader.epoch for loader in loaders] == [1] * world_size


def test_tokens_are_long_unless_another_type_is_asked_for_and_columns_are_tensors_or_lists(run: TokenRun) -> None:
    first = next(iter(dataset(run, columns=["key", "caption", "index"])))
    assert first.tokens.dtype == torch.int64 and first.tokens.shape == (16, 6)
    assert isinstance(first.columns["index"], torch.Tensor) and isinstance(first.columns["caption"], list)
    table = {row["key"]: row for part in run.parts for row in run.read_part(part).to_pylist()}
    rows = zip(first.tokens.tolist(), *(first.columns[name] for name in ("key", "caption", "index")), strict=True)
    for tokens_N, key, caption, index in rows:
        row = table[key]
        assert (tokens_N, caption, int(index)) == (row["tokens"], row["caption"], row["index"])
    assert next(iter(dataset(run, dtype=torch.int16))).tokens.dtype == torch.int16


@pytest.mark.parametrize("num_workers", [0, 3])
def test_resumed_behind_any_batch_the_rest_is_the_same_however_far_the_workers_were(
    run: TokenRun, num_workers: int
) -> None:
    loader = TokenLoader(dataset(run, 1, 2), num_workers)
    states, batches = [], []
    for batch in loader:
        batches.append(batch)
        states.append(json.loads(json.dumps(loader.state_dict())))
    assert [batch.state for batch in batches] == states and states[-1]["epoch"] == 1
    for number in (1, 2, len(batches) // 2, len(batches) - 1):
        resumed = TokenLoader(dataset(run, 1, 2), num_workers)
        resumed.load_state_dict(states[number - 1])
        assert keys(list(resumed)) == keys(batches[number:])
    assert keys(list(resumed)) == keys(list(loader)) != keys(batches)


def test_a_plain_dataloader_of_torch_resumes_from_the_state_of_a_batch(run: TokenRun) -> None:
    def loader(state: dict[str, Any] | None = None) -> DataLoader[TokenRows]:
        tokens = dataset(run)
        if state:
            tokens.load_state_dict(state)
        return DataLoader(tokens, batch_size=None, num_workers=2)

    batches = list(loader())
    assert keys(list(loader(batches[4].state))) == keys(batches[5:])


def test_workers_that_stay_alive_go_on_with_the_next_epoch(run: TokenRun) -> None:
    loader = TokenLoader(dataset(run), 2, persistent_workers=True)
    epochs = [keys(list(loader)) for _ in range(2)]
    fresh = TokenLoader(dataset(run), 2)
    fresh.set_epoch(1)
    assert epochs[1] == keys(list(fresh)) != epochs[0]


def test_a_worker_that_is_slow_to_begin_begins_where_the_others_did(run: TokenRun) -> None:
    """Workers share the dataset's place with the main process, which may have batches of one before another looks."""
    loader = TokenLoader(dataset(run), 2)
    batches = iter(loader)
    states = [next(batches).state, next(batches).state]
    assert loader.state_dict() == states[1] and states[1]["num_batches"] == 2
    assert loader.dataset.state_dict(2)["num_batches"] == 0


def test_breaking_off_and_iterating_again_goes_on(run: TokenRun) -> None:
    loader = TokenLoader(dataset(run), 2)
    first = [batch for _, batch in zip(range(3), loader, strict=False)]
    assert keys([*first, *loader]) == keys(list(TokenLoader(dataset(run), 2)))


def test_a_state_of_another_number_of_workers_or_ranks_is_refused_but_at_an_epochs_end(run: TokenRun) -> None:
    batches = list(TokenLoader(dataset(run), 2))
    middle, end = batches[3].state, batches[-1].state
    with pytest.raises(RunMismatch, match="of 2 DataLoader workers, here are 1"):
        TokenLoader(dataset(run)).load_state_dict(middle)
    with pytest.raises(RunMismatch, match="shares was 2 and is 4"):
        TokenLoader(dataset(run, 0, 2), 2).load_state_dict(middle)
    tokens = dataset(run)
    tokens.load_state_dict(middle)
    with pytest.raises(RunMismatch, match="of 2 DataLoader workers, here are 1"):
        next(iter(tokens))
    for loader in (TokenLoader(dataset(run)), TokenLoader(dataset(run, 0, 2), 3)):
        loader.load_state_dict(end)
        assert next(iter(loader)).state["epoch"] == 1
        assert next(iter(loader)).state["num_batches"] == 2  # broken off, and gone on with


def test_what_would_change_the_order_behind_its_back_is_refused(run: TokenRun) -> None:
    for option in ({"in_order": False}, {"batch_size": 4}, {"shuffle": True}):
        with pytest.raises(ValueError, match=f"TokenLoader decides {next(iter(option))} itself"):
            TokenLoader(dataset(run), 2, **option)
    with pytest.raises(ValueError, match=r"columns is a list of names: write \['key'\]"):
        TokenDataset(run, batch_size=4, columns="key")
    with pytest.raises(RunMismatch, match="no state of a reader of tokens: it lacks 'num_workers'"):
        TokenLoader(dataset(run)).load_state_dict({"epoch": 0, "num_batches": 1, "order": {}})


def test_too_few_rows_for_a_batch_of_each_worker_are_refused_and_not_an_epoch_of_nothing(run: TokenRun) -> None:
    tokens = TokenDataset(run, batch_size=10**6, drop_last=True, rank=0, world_size=2)
    with pytest.raises(PipelineError, match="no batch of 1000000 for each of 2 shares; take a smaller batch"):
        next(iter(TokenLoader(tokens)))


def test_a_rank_without_rows_comes_to_the_end_of_its_epoch(tmp_path: Path) -> None:
    world = TokenWorld(str(tmp_path))
    world.add("/in/a.tar", 1)
    loader = TokenLoader(dataset(world.open(), 1, 2))
    assert list(loader) == [] and loader.epoch == 1


def test_a_dataset_travels_to_workers_that_are_not_forked(run: TokenRun) -> None:
    tokens = dataset(run)
    assert keys(list(pickle.loads(pickle.dumps(tokens)))) == keys(list(tokens))


def test_what_cannot_be_read_is_said_when_the_dataset_is_made(tmp_path: Path) -> None:
    with pytest.raises(NoRun):
        TokenDataset(str(tmp_path), batch_size=4)
    with pytest.raises(ValueError, match="rank and world_size go together"):
        TokenDataset(str(tmp_path), batch_size=4, rank=1)


RANKS = """
import sys
from datetime import timedelta
from torch import distributed
from jobs.api import TokenDataset, TokenLoader
from pipeline.errors import NoRun

store, rank, url = sys.argv[1], int(sys.argv[2]), sys.argv[3]
distributed.init_process_group("gloo", f"file://{store}", timedelta(seconds=60), rank=rank, world_size=2)
# Only rank 0 may open the run: the other one's URL is none.
loader = TokenLoader(TokenDataset(url if rank == 0 else "nowhere", batch_size=16, columns=["key"]))
for batch in loader:
    print(*batch.columns["key"], sep="\\n")
try:
    TokenDataset("nowhere", batch_size=16)
except NoRun:
    print("refused")
"""


@pytest.mark.slow
def test_all_ranks_of_a_process_group_read_what_rank_0_opened(run: TokenRun, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANKS, str(tmp_path / "store")]
    ranks = [
        subprocess.Popen([*command, str(rank), run.output.url], stdout=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    lines = [line for rank in ranks for line in rank.communicate(timeout=120)[0].splitlines()]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert lines.count("refused") == 2 and len(set(lines)) == NUM_ROWS + 1 == len(lines) - 1


@pytest.mark.server
def test_a_bucket_is_read_by_workers_that_were_forked_after_it_was_opened(s3: str) -> None:
    world = TokenWorld(f"{s3}/token-dataset")
    for name, num_rows in SIZES.items():
        world.add(f"/in/{name}.tar", num_rows)
    tokens = TokenDataset(world.output.url, batch_size=16, columns=["key"], shuffle_rows=100)
    here = TokenLoader(tokens)
    there = TokenLoader(dataset(world.open()), 2)
    rows = [Counter(key for each in keys(list(loader)) for key in each) for loader in (here, there)]
    assert [len(found) for found in rows] == [NUM_ROWS] * 2 and set((rows[0] + rows[1]).values()) == {2}
