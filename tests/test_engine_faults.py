"""Faults of the engine on a real Ray: who is blamed, what is tried elsewhere, what is left behind."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fakes import FakeSource, SeveralFaults, ShardFault
from jobs.checkpoints import read_head
from jobs.config import check
from jobs.tokenize_config import TokenizeConfig
from jobs.tokenize_dataset import run_tokenize
from make_data import folder_bytes, write_checkpoint, write_shards
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix
from pipeline.records import ShardResult

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
NUM_SHARDS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_checkpoint(folder / "checkpoint")
    write_shards(folder / "shards", [6] * NUM_SHARDS)
    return folder


def config(data: Path, output: Path, **changes: object) -> TokenizeConfig:
    values = {
        "checkpoint": str(data / "checkpoint"), "shards": str(data / "shards"), "output": str(output),
        "batch_size": 8, "retry_pause_s": 0, "ray": {"num_actors": 2}, **changes,
    }  # fmt: skip
    return check(TokenizeConfig, values, "test")


def rows(output: Path) -> dict[str, ShardResult]:
    return {Path(url).name: row for url, row in Ledger(OutputPrefix(str(output))).read().items()}


def test_a_shard_that_hangs_at_the_end_is_finished_by_another_actor_long_before_its_deadline(
    data: Path, tmp_path: Path
) -> None:
    head, marks = read_head(str(data / "checkpoint")), tmp_path / "marks"
    marks.mkdir()
    assert run_tokenize(config(data, tmp_path / "calm"), "dvae", FakeSource(head)) == 0
    source = ShardFault(head, needle=f"{NUM_SHARDS - 1:06}", deed="hang", times=1, marks=str(marks))
    started = time.monotonic()
    assert run_tokenize(config(data, tmp_path / "out"), "dvae", source) == 0
    seconds = time.monotonic() - started
    assert len(list(marks.iterdir())) == 1, "it did hang"
    assert seconds < 150, "derived deadlines begin at 300 s"
    assert {row.attempts for row in rows(tmp_path / "out").values()} == {1}
    assert folder_bytes(tmp_path / "out" / "tokens") == folder_bytes(tmp_path / "calm" / "tokens")
    print(f"straggler: {seconds:.1f} s")  # noqa: T201


def test_shards_that_kill_break_or_exhaust_their_process_are_quarantined_with_a_telling_reason_and_no_other(
    data: Path, tmp_path: Path
) -> None:
    """With a single attempt, whoever is charged for a neighbour's deed is lost."""
    deeds = {1: "kill", 3: "out of memory", 4: "cuda out of memory", 6: "cannot travel"}
    source = SeveralFaults(
        read_head(str(data / "checkpoint")), deeds=tuple((f"{number:06}.tar", deed) for number, deed in deeds.items())
    )
    assert run_tokenize(config(data, tmp_path / "out", attempts=1), "dvae", source) == 1
    found = rows(tmp_path / "out")
    lost = {name: row for name, row in found.items() if row.reason is not None}
    assert [int(Path(name).stem[-6:]) for name in sorted(lost)] == sorted(deeds)
    assert {row.reason for row in lost.values()} == {"shard_crashed"}
    assert len(found) == NUM_SHARDS and not list((tmp_path / "out").rglob("*.tmp"))
    words = ["worker process has died", "MemoryError", "CUDA out of memory", "no words for it"]
    for word, name in zip(words, sorted(lost), strict=True):
        assert word in str(lost[name].message)
