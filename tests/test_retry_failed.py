"""`dvae retry` on a real Ray: what failed is done, what went well is left alone, to the bytes of a calm run."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from fakes import FakeSource, ShardFault
from jobs import cli, tokenize_dataset
from jobs.checkpoints import read_head
from jobs.config import ConfigError, check
from jobs.retry_failed import run_retry
from jobs.tokenize_config import TokenizeConfig
from jobs.verify import run_verify
from make_data import folder_bytes, sample_members, tar_bytes, write_checkpoint, write_shards
from make_run import tokenize_here
from pipeline import storage
from pipeline.errors import NoRun, RunHeld, RunMismatch
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix, part_name
from pipeline.records import ShardState

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
WHOLE = tar_bytes(sample_members(70, 6))
MIXED = tar_bytes([*sample_members(80, 3), ("bad.jpg", b"no image")])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def source(checkpoint: Path) -> FakeSource:
    return FakeSource(read_head(str(checkpoint)))


def settings(checkpoint: Path, folder: Path, output: str = "out", **changes: Any) -> TokenizeConfig:
    values = {
        "checkpoint": str(checkpoint), "shards": str(folder / "in"), "output": str(folder / output), "batch_size": 8,
        "retry_pause_s": 0, "ray": {"num_actors": 1}, "attempts": 2, "max_failed_samples": 0.5,
    }  # fmt: skip
    return check(TokenizeConfig, {**values, **changes}, "test")


@pytest.fixture
def run(checkpoint: Path, tmp_path: Path) -> Path:
    """Two good shards, one with a bad image, one cut short: the folder of `in` and `out`."""
    write_shards(tmp_path / "in", [3, 4])
    (tmp_path / "in" / "mixed.tar").write_bytes(MIXED)
    (tmp_path / "in" / "short.tar").write_bytes(WHOLE[:2000])
    assert tokenize_here(settings(checkpoint, tmp_path)) == 1
    return tmp_path


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "out" / "tokens").iterdir()}


def test_a_mended_shard_is_done_and_the_rest_is_not_touched_nor_the_input_listed(
    checkpoint: Path, run: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "in" / "short.tar").write_bytes(WHOLE)
    (run / "in" / "added.tar").write_bytes(WHOLE)  # of no concern to a retry
    before = times(run)
    monkeypatch.setattr(tokenize_dataset, "expand", lambda _: pytest.fail("the input is listed"))
    capsys.readouterr()
    assert run_retry(str(run / "out"), ["ray.num_actors=2"], "dvae retry", source) == 0
    said = capsys.readouterr().out
    assert "short.tar · quarantined: shard_truncated · done: 6 images, 0 failed" in said
    assert "mixed.tar · 1 images: 1 not_an_image · none of 1 decodes now" in said
    assert "4 of 4 shards · 16 images tokenised · 1 failed" in said
    after = times(run)
    assert before.items() < after.items() and len(after) == 4
    assert json.loads((run / "out" / "manifest.json").read_text())["num_done"] == 4
    assert run_verify(str(run / "out"), as_json=False) == 0
    monkeypatch.undo()
    (run / "in" / "added.tar").unlink()
    assert tokenize_here(settings(checkpoint, run, "calm")) == 0
    for folder in ("tokens", "errors"):
        assert folder_bytes(run / "out" / folder) == folder_bytes(run / "calm" / folder)


def test_where_nothing_failed_it_says_so_and_writes_nothing(
    checkpoint: Path, source: FakeSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "in", [3])
    assert tokenize_here(settings(checkpoint, tmp_path)) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert run_retry(str(tmp_path / "out"), [], "dvae retry", source) == 0
    assert "nothing failed" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_what_fails_again_is_quarantined_again_and_said_so(
    run: Path, source: FakeSource, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_retry(str(run / "out"), [], "dvae retry x", source) == 1
    said = capsys.readouterr().out
    assert "short.tar · quarantined: shard_truncated · quarantined again: shard_truncated" in said
    assert "1 shards are quarantined" in said and "dvae retry x" in said
    assert not (run / "out" / "manifest.json").exists()


def test_a_shard_with_a_good_part_that_cannot_be_read_again_keeps_it(
    checkpoint: Path, run: Path, source: FakeSource, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "in" / "short.tar").write_bytes(WHOLE)
    before = folder_bytes(run / "out" / "tokens")
    marks = run / "marks"
    marks.mkdir()
    broken = ShardFault(read_head(str(checkpoint)), needle="mixed", deed="raise", marks=str(marks))
    assert run_retry(str(run / "out"), [], "dvae retry", broken, whole_shards=True) == 0
    assert len(list(marks.iterdir())) == 2
    assert (
        "mixed.tar · 1 images: 1 not_an_image · could not be read again, and keeps its part" in capsys.readouterr().out
    )
    assert before.items() <= folder_bytes(run / "out" / "tokens").items()
    row = Ledger(OutputPrefix(str(run / "out"))).read()[str(run / "in" / "mixed.tar")]
    assert (row.state, row.num_rows, row.num_failed) == (ShardState.DONE, 3, 1)
    assert run_verify(str(run / "out"), as_json=False) == 0
    assert run_retry(str(run / "out"), [], "dvae retry", source, whole_shards=True) == 0
    assert before.items() <= folder_bytes(run / "out" / "tokens").items()
    assert run_verify(str(run / "out"), as_json=False) == 0


def test_a_shard_whose_actor_is_lost_does_not_keep_its_part_for_somebody_may_still_be_writing(
    checkpoint: Path, run: Path, source: FakeSource
) -> None:
    (run / "in" / "short.tar").write_bytes(WHOLE)
    before = folder_bytes(run / "out" / "tokens")
    marks = run / "marks"
    marks.mkdir()
    deadly = ShardFault(read_head(str(checkpoint)), needle="mixed", deed="exit", marks=str(marks))
    assert run_retry(str(run / "out"), ["attempts=1"], "dvae retry", deadly, whole_shards=True) == 1
    row = Ledger(OutputPrefix(str(run / "out"))).read()[str(run / "in" / "mixed.tar")]
    assert (row.state, row.reason) == (ShardState.QUARANTINED, "shard_crashed")
    assert run_retry(str(run / "out"), [], "dvae retry", source) == 0
    assert before.items() <= folder_bytes(run / "out" / "tokens").items()


def test_a_run_that_was_stopped_is_left_to_be_gone_on_with(
    checkpoint: Path, run: Path, source: FakeSource, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if its driver had been killed before the first of its shards was done."""
    output = OutputPrefix(str(run / "out"))
    rows = Ledger(output).read()
    storage.remove_folder(output.ledger_folder())
    first = str(run / "in" / "made-000000.tar")
    storage.remove(output.part(part_name(first)))
    Ledger(output).append([row for row in rows.values() if row.shard != first])
    (run / "in" / "short.tar").write_bytes(WHOLE)
    assert run_retry(str(run / "out"), [], "dvae retry", source) == 1
    said = capsys.readouterr().out
    assert "3 of 4 shards" in said and "1 shards are not tokenised yet: go on with dvae tokenize" in said
    assert not (run / "out" / "manifest.json").exists()
    assert tokenize_here(settings(checkpoint, run)) == 0


def test_it_is_refused_what_tokenize_is_refused(run: Path, source: FakeSource, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(RunMismatch, match="tokenizer_id"):
        run_retry(str(run / "out"), [f"checkpoint={other}"], "dvae retry", source)
    with Lease(OutputPrefix(str(run / "out"))), pytest.raises(RunHeld):
        run_retry(str(run / "out"), [], "dvae retry", source)
    for own in ("output=elsewhere", f"shards={tmp_path}"):
        with pytest.raises(ConfigError, match="takes output and shards from the run"):
            run_retry(str(run / "out"), [own], "dvae retry", source)
    with pytest.raises(ConfigError, match=r"plan\.json.*\n?.*did you mean ray\.num_actors"):
        run_retry(str(run / "out"), ["ray.num_actor=3"], "dvae retry", source)
    with pytest.raises(NoRun, match="holds no run"):
        run_retry(str(tmp_path / "nothing"), [], "dvae retry", source)
    (run / "out" / "plan.json").unlink()
    with pytest.raises(NoRun, match="no settings of a run: run `dvae tokenize CONFIG`"):
        run_retry(str(run / "out"), [], "dvae retry", source)


def test_the_command_needs_no_yaml_and_gives_the_exit_code(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a person types it."""
    (run / "in" / "short.tar").write_bytes(WHOLE)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        cli.main(["retry", str(run / "out")])
    signal.signal(signal.SIGTERM, on_sigterm)
    assert ended.value.code == 0 and "4 of 4 shards · 16 images" in capsys.readouterr().out
