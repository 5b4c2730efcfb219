"""The bench of the token dataset compares like with like: each way gives the same rows."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bench_token_dataset
from bench_token_dataset import WAYS, make_run, mixing

ROWS = 300
OURS_AND_ARROWS = [name for name in WAYS if not name.startswith("datasets")]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bench") / "run"
    make_run(folder, ROWS, 2, 70)
    return str(folder)


def rows_of(name: str, output: str) -> Counter[Any]:
    return Counter(tuple(map(int, tokens_N)) for batch in WAYS[name](output, 32) for tokens_N in batch)


@pytest.mark.parametrize("name", OURS_AND_ARROWS)
def test_each_way_gives_all_rows(output: str, name: str) -> None:
    assert rows_of(name, output) == rows_of("pyarrow lists", output)
    assert rows_of(name, output).total() == ROWS


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WAYS if name.startswith("datasets")])
def test_datasets_gives_all_rows_too(output: str, name: str) -> None:
    pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    assert rows_of(name, output) == rows_of("pyarrow lists", output)


@pytest.mark.usefixtures("one_thread")
def test_it_says_how_fast_each_is_and_by_what_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_token_dataset, "timed_elsewhere", bench_token_dataset.time_way)  # a process takes seconds
    monkeypatch.setattr(bench_token_dataset, "is_installed", lambda library: False)
    options = {"rows": 200, "grid": 2, "shard_rows": 70, "rounds": 2, "batch_size": 16, "only": None}
    figures = bench_token_dataset.bench(tmp_path, argparse.Namespace(**options))
    assert list(figures["speed"]) == OURS_AND_ARROWS and figures["without"] == ["datasets: it is not installed"]
    assert {each["rows"] for each in figures["speed"].values()} == {200}
    assert figures["TokenLoader_is_times_as_fast_as"]["TokenLoader"] == 1.0
    assert figures["mixing"]["TokenReader"]["rank_correlation"] < 0.9


def test_the_measures_of_mixing_know_stored_order_from_a_shuffle() -> None:
    stored_R = np.arange(10_000)
    shuffled = mixing(np.random.default_rng(1).permutation(stored_R), 100, 50)
    stored = mixing(stored_R, 100, 50)
    assert stored["rank_correlation"] == 1 and stored["mean_displacement"] == 0 and stored["shards_in_a_batch"] == 1
    assert stored["same_shard_next"] == pytest.approx(0.99, abs=0.001)
    assert shuffled["mean_displacement"] == pytest.approx(1 / 3, abs=0.01)
    for name in ("same_shard_next", "shards_in_a_batch"):
        assert shuffled[name] == pytest.approx(shuffled[f"{name}_perfect"], rel=0.2)
