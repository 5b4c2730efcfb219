"""The benchmarks are honest: everybody makes the same tokens of the same pixels, what is measured is really taken."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from bench_startup import ACTOR, DRIVER, steps, tokenize
from make_data import image_bytes
from peers_hosts import Measured
from peers_ours import stages_alone, without_ray
from peers_report import as_json, as_text
from peers_scripts import data_loader, plain_loop
from peers_usage import Look, Meter
from peers_workloads import ROWS, Ran, Row, Work, make_shards
from pipeline.images import _decoded_fast

NUM_IMAGES, PER_SHARD = 64, 24


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, NUM_IMAGES, PER_SHARD)
    return tuple(sorted(str(path) for path in folder.iterdir()))


def tokens_of(peer: Callable[[Work], Ran], row: Row, shards: tuple[str, ...], output: Path) -> dict[str, bytes]:
    """Key -> tokens, as the peer wrote them."""
    peer(Work(row, shards, str(output), ""))
    rows = [
        row for path in output.rglob("*.parquet") for row in pq.ParquetFile(path).read(["key", "tokens"]).to_pylist()
    ]
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: np.array(row["tokens"], np.int32).tobytes() for row in rows}


@pytest.mark.parametrize("row", [ROWS[0], ROWS[3]], ids=lambda row: row.name)
def test_scripts_and_engine_make_the_same_tokens(row: Row, shards: tuple[str, ...], tmp_path: Path) -> None:
    ours = tokens_of(without_ray, row, shards, tmp_path / "ours")
    assert len(ours) == NUM_IMAGES and len(set(ours.values())) == NUM_IMAGES
    assert (_decoded_fast(image_bytes(0, width=400, height=400), Work(row, (), "", "").spec) is None) == (
        row.name != "free"
    )
    assert tokens_of(plain_loop, row, shards, tmp_path / "plain") == ours
    assert tokens_of(data_loader, row, shards, tmp_path / "loader") == ours


def test_the_stages_are_measured_and_bound_the_report(shards: tuple[str, ...], tmp_path: Path) -> None:
    stages = stages_alone(Work(ROWS[0], shards, str(tmp_path / "out"), "")).stages
    assert stages is not None and stages["decode_s"] > stages["write_s"] > 0
    ours = Measured(1000, 2.0, 0.5, 4.0, 0.1, 300_000_000)
    runs = {
        "stages": [Measured(64, 1.0, 0.0, 1.0, 0.0, 0, stages)],
        "plain": [Measured(500, 2.0, 0, 2.0, 0, 1)],
        "ours": [ours],
    }
    report = as_json({ROWS[0]: runs}, {"plain": "plain loop", "ours": "ours on Ray"}, 0.02)
    (row,) = report["rows"]
    assert row["ratios"]["ours / plain"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert row["peers"][1]["cpu_ms_per_image"]["median"] == 4.0
    assert "plain loop" in as_text(report)


def test_the_meter_sees_children_that_come_and_go() -> None:
    burn = "import time\nwhile time.process_time() < 0.6: pass\nprint(time.process_time())"
    with Meter(os.getpid()) as meter:
        begun = time.process_time()
        done = subprocess.run([sys.executable, "-c", burn], check=True, stdout=subprocess.PIPE)
        here = time.process_time() - begun
    assert 0.9 < (meter.cpu_s() - here) / float(done.stdout) < 1.8, "all of it, and once"
    assert meter.peak_bytes > 10_000_000


def test_what_a_child_took_before_the_clock_is_not_counted_when_it_ends() -> None:
    looks = [Look(1.0, {1: (5.0, 0.0), 2: (8.0, 0.0)}, 0), Look(2.0, {1: (5.0, 0.0), 2: (9.0, 0.0)}, 0)]
    meter = Meter(1, [*looks, Look(3.0, {1: (5.5, 9.25)}, 0)], {1: "root", 2: "worker"}, {1: 0, 2: 1})
    assert meter.cpu_s(begin=1.5) == 0.5 + 1.0 + 0.25


def test_a_start_is_noted_in_its_processes_and_adds_up(tmp_path: Path) -> None:
    config, marks = tmp_path / "run.yaml", tmp_path / "marks"
    config.write_text(f"checkpoint: {tmp_path}/none\nshards: {tmp_path}\noutput: {tmp_path}/out\n")
    assert tokenize(config, marks).returncode == 2  # which never starts Ray
    noted = [line.split(" ", 2)[2] for line in marks.read_text().splitlines()]
    wanted = ["python begin", *(last for _, last in DRIVER[:3]), "run_tokenize begin", "run_tokenize end"]
    assert [note for note in noted if note in wanted] == wanted
    found = {last: (10.0 + n, 1) for n, (_, last) in enumerate((*DRIVER, *ACTOR))}
    seconds = steps(9.0, 30.0, found)
    assert seconds["= to the first image encoded"] == len(found) and sum(seconds.values()) == 30.0 - 9.0 + len(found)
