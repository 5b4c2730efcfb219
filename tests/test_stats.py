"""`dvae stats` as a person or a program meets it: on a good run, an odd one, a damaged one and none."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.cli import _invoke
from jobs.stats import read_stats, run_stats
from make_data import fake_table
from make_tokens_run import TokensRun, damage_tokens, zipf_tokens
from pipeline import storage
from pipeline.errors import NoRun, PipelineError
from pipeline.lease import Lease
from pipeline.records import FailureReason, SampleFailure, Stage
from pipeline.token_run import TokenRun

TABLE = fake_table(grid=(4, 4), codebook_size=128)
HOSTILE = "[bold]<script>alert(1)</script>\x1b[2J\u202e" + "x" * 100_000


def add_shards(made: TokensRun, count: int = 6, odd: int | None = None) -> None:
    for number in range(count):
        tokens_BN = zipf_tokens(200, TABLE, number, shuffled=5 if number == odd else None)
        bad = [SampleFailure(HOSTILE, 7, 0, 9, Stage.DECODE, FailureReason.TOO_SMALL, HOSTILE)] if number == 1 else []
        made.add(f"/in/{number}.tar", tokens_BN, bad)


@pytest.fixture
def made(tmp_path: Path) -> TokensRun:
    return TokensRun(str(tmp_path / "out"), TABLE)


def stats_json(url: str, capsys: pytest.CaptureFixture[str], code: int = 0, **options: Any) -> dict[str, Any]:
    assert run_stats(url, as_json=True, **options) == code
    return dict(json.loads(capsys.readouterr().out))


def test_json_says_what_a_plain_count_says(made: TokensRun, capsys: pytest.CaptureFixture[str]) -> None:
    add_shards(made)
    found = stats_json(made.output.url, capsys)
    every = np.concatenate([zipf_tokens(200, TABLE, number) for number in range(6)])
    uses_K = np.bincount(every.ravel(), minlength=128)
    shares = uses_K[uses_K > 0] / every.size
    assert found["code_uses"] == uses_K.tolist()
    assert found["num_images"] == 1200 and found["num_parts"] == 6 and found["num_failed"] == 1
    assert found["entropy_bits"] == pytest.approx(-(shares * np.log2(shares)).sum(), abs=1e-5)
    assert found["perplexity"] == pytest.approx(2 ** found["entropy_bits"], rel=1e-3)
    assert (found["used_codes"], found["dead_codes"]) == ((uses_K > 0).sum(), (uses_K == 0).sum())
    assert np.shape(found["position_entropy_bits"]) == (4, 4)
    corner = np.bincount(every[:, 5], minlength=128)
    corner_shares = corner[corner > 0] / 1200
    assert found["position_entropy_bits"][1][1] == pytest.approx(-(corner_shares * np.log2(corner_shares)).sum(), 1e-4)
    assert found["errors_by_reason"] == {"too_small": 1}
    assert found["num_standing_out"] == 0 and len(found["shards"]) == 6


def test_a_shard_of_another_model_is_named(made: TokensRun, capsys: pytest.CaptureFixture[str]) -> None:
    add_shards(made, odd=4)
    found = stats_json(made.output.url, capsys)
    assert found["num_standing_out"] == 1
    first = found["shards"][0]
    assert first["shard"] == "/in/4.tar" and first["divergence_bits"] > first["threshold_bits"] > first["noise_bits"]
    assert run_stats(made.output.url, as_json=False) == 0
    said = capsys.readouterr().out
    assert "1 of 6 stand out in their use of the codes" in said and "/in/4.tar" in said


def test_shards_of_unlike_images_are_told_from_shards_of_few(
    made: TokensRun, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(5):
        made.add(f"/in/{number}.tar", zipf_tokens(200, TABLE, number, shuffled=number))
    assert run_stats(made.output.url, as_json=False) == 0
    assert "images too unlike those of other shards to tell another model" in capsys.readouterr().out


def test_the_table_tells_the_same_and_hostile_text_stays_one_short_line(
    made: TokensRun, capsys: pytest.CaptureFixture[str]
) -> None:
    add_shards(made)
    assert run_stats(made.output.url, as_json=False) == 0
    said = capsys.readouterr().out
    assert "1,200 in 6 parts, 1 failed" in said and "none stands out" in said
    (line,) = [line for line in said.splitlines() if "too_small" in line]
    assert "[bold]<script>" in line and len(line) < 1000
    assert "\x1b" not in said and "\u202e" not in said


def test_pictures_are_written_where_asked(made: TokensRun, tmp_path: Path) -> None:
    add_shards(made, odd=2)
    run_stats(made.output.url, as_json=True, plots=str(tmp_path / "plots"))
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "plots").iterdir()}
    assert sizes == dict.fromkeys(["code-use.png", "positions.png", "shards.png"], (720, 400))


@pytest.mark.parametrize("num_rows", [None, 0, 1])
def test_a_run_with_nothing_or_hardly_anything_in_it_is_told_so(
    made: TokensRun, capsys: pytest.CaptureFixture[str], tmp_path: Path, num_rows: int | None
) -> None:
    if num_rows is not None:
        made.add("/in/0.tar", zipf_tokens(num_rows, TABLE, 0))
    found = stats_json(made.output.url, capsys, plots=str(tmp_path / "plots"))
    assert found["num_images"] == (num_rows or 0) and found["shards"] == []
    assert math.isfinite(found["entropy_bits"])
    assert run_stats(made.output.url, as_json=False) == 0
    assert "nothing to hold against each other yet" in capsys.readouterr().out


def test_a_damaged_and_a_missing_part_are_named_and_the_exit_code_is_1(
    made: TokensRun, capsys: pytest.CaptureFixture[str]
) -> None:
    add_shards(made)
    parts = TokenRun.open(made.output.url).parts
    damage_tokens(parts[1].url)
    Path(parts[3].url).unlink()
    found = stats_json(made.output.url, capsys, code=1)
    assert list(found["unreadable"]) == [parts[1].url] and found["missing_parts"] == [parts[3].name]
    assert found["num_images"] == 800
    assert run_stats(made.output.url, as_json=False) == 1
    said = capsys.readouterr().out
    assert parts[1].name in said and parts[3].name in said and "dvae verify" in said


def test_errors_files_that_are_gone_are_missed_by_the_ledger_and_not_taken_for_no_failures(
    made: TokensRun, capsys: pytest.CaptureFixture[str]
) -> None:
    add_shards(made)
    (errors,) = storage.list_files(made.output.errors_folder())
    Path(errors.url).unlink()
    found = stats_json(made.output.url, capsys, code=1)
    assert found["num_failed"] == 1 and found["missing_errors"] == [Path(errors.url).name]
    assert run_stats(made.output.url, as_json=False) == 1
    assert f"1 errors file of which the ledger knows, as {Path(errors.url).name}" in capsys.readouterr().out


@pytest.mark.parametrize("data", [b"", b"PAR1 no more", b"PAR1" + bytes(5000) + b"PAR1"])
def test_a_part_that_is_torn_or_empty_does_not_vanish(
    made: TokensRun, capsys: pytest.CaptureFixture[str], data: bytes
) -> None:
    add_shards(made)
    part = TokenRun.open(made.output.url).parts[2]
    Path(part.url).write_bytes(data)
    assert stats_json(made.output.url, capsys, code=1)["missing_parts"] == [part.name]


def test_a_part_of_another_run_in_the_place_of_one_does_not_count_as_it(
    made: TokensRun, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    add_shards(made)
    other = TokensRun(str(tmp_path / "other"), replace(TABLE, tokenizer_id="another"))
    foreign = Path(other.add("/in/2.tar", zipf_tokens(9, TABLE, 2)))
    part = TokenRun.open(made.output.url).parts[2]
    Path(part.url).write_bytes(foreign.read_bytes())
    assert stats_json(made.output.url, capsys, code=1)["missing_parts"] == [part.name]


def test_json_of_a_large_codebook_is_one_line_that_nothing_colours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rich.console.Console.print_json", None)
    made = TokensRun(str(tmp_path / "out"), fake_table(grid=(2, 2), codebook_size=262_144))
    made.add("/in/0.tar", np.array([[0, 5, 5, 262_143]]))
    assert run_stats(made.output.url, as_json=True) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and json.loads(said)["code_uses"][5] == 2


def test_a_place_where_no_pictures_can_be_is_told_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PipelineError, match="file is a file"):
        run_stats(str(tmp_path / "no run"), as_json=True, plots=str(tmp_path / "file"))


def test_a_run_at_work_is_counted_as_far_as_it_is(made: TokensRun, capsys: pytest.CaptureFixture[str]) -> None:
    add_shards(made, count=2)
    with Lease(made.output):
        assert stats_json(made.output.url, capsys)["running"] is True


def test_where_there_is_no_run_the_exit_code_is_2_and_neither_torch_nor_ray_is_imported(tmp_path: Path) -> None:
    with pytest.raises(NoRun):
        run_stats(str(tmp_path), as_json=True)
    code = (
        "import sys; from jobs.cli import main\n"
        f"try: main(['stats', {str(tmp_path)!r}])\n"
        "except SystemExit as end: print(end.code, sorted({'torch', 'ray', 'duckdb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "2 []" and "holds no run" in done.stderr


@pytest.mark.ray
def test_where_results_are_large_one_task_runs_at_a_time_and_gives_the_same(
    made: TokensRun, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.stats_ray.RESULT_BYTES", 1)
    add_shards(made, count=4)
    here, there = (read_stats(TokenRun.open(made.output.url), ray_address=address) for address in (None, "auto"))
    assert {**here.to_json(), "counting_s": 0} == {**there.to_json(), "counting_s": 0}


@pytest.mark.ray
def test_counting_in_ray_tasks_gives_the_same(
    made: TokensRun, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.stats_ray.MOST_TASKS", 3)
    add_shards(made, count=10, odd=3)
    damage_tokens(TokenRun.open(made.output.url).parts[7].url)
    here, there = (read_stats(TokenRun.open(made.output.url), ray_address=address) for address in (None, "auto"))
    assert list(here.unreadable) == list(there.unreadable) and len(here.unreadable) == 1
    assert {**here.to_json(), "counting_s": 0} == {**there.to_json(), "counting_s": 0}


@pytest.mark.server
def test_a_run_in_a_bucket_is_counted_and_pictures_are_put_there(s3: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = TokensRun(f"{s3}/stats-out", TABLE)
    add_shards(made)
    found = stats_json(made.output.url, capsys, plots=f"{s3}/stats-plots")
    assert found["num_images"] == 1200 and found["errors_by_reason"] == {"too_small": 1}
    assert len(storage.list_files(f"{s3}/stats-plots")) == 3


def test_both_commands_are_there_with_their_options(made: TokensRun, tmp_path: Path) -> None:
    add_shards(made, count=3)
    assert _invoke(["stats", made.output.url, "--json", "--plots", str(tmp_path / "plots")]) == 0
    page = tmp_path / "page.html"
    assert _invoke(["report", made.output.url, "--html", str(page), "--images", "0"]) == 0
    assert "600" in page.read_text() and "<img" not in page.read_text()
