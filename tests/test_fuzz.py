"""Damaged shards by the hundred: nothing crashes, hangs, eats the memory or loses a sample. fuzz_shards.py says how."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

import fuzz_shards
from fuzz_shards import fuzz
from fuzz_tars import KINDS, make_case
from pipeline import shards
from pipeline.records import ObjectInfo
from pipeline.tar_members import Member

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as images.py does; pytest sets its own filters


def fuzzed(cases: int, seed: int, timeout_s: float) -> dict[str, Any]:
    """The figures of a run in a process of its own, for it may die, and its peak of memory is its own."""
    script = Path(__file__).parent / "fuzz_shards.py"
    command = [sys.executable, str(script), "--cases", str(cases), "--seed", str(seed)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"hung: {(error.stderr or b'')[-500:]!r}")
    assert done.stdout, f"seed {seed} died with {done.returncode}: {done.stderr[-2000:]}"
    return dict(json.loads(done.stdout))


def check(figures: dict[str, Any], cases: int) -> None:
    assert not figures["problems"], "\n".join(figures["problems"][:20])
    assert figures["cases"] == cases and set(figures["by_kind"]) == set(KINDS)
    assert figures["rows"] and figures["errors"] and figures["refused"]
    assert figures["peak_mib"] < 700


def test_two_hundred_damaged_shards_are_accounted_for_or_refused() -> None:
    check(fuzzed(230, seed=1, timeout_s=240), 230)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_five_thousand_damaged_shards_are_accounted_for_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    figures = fuzzed(5000, seed=1, timeout_s=1100)
    with capsys.disabled():
        print("\n" + json.dumps(figures, indent=1))  # noqa: T201
    check(figures, 5000)


def test_cases_are_the_same_each_time_and_differ_from_one_another() -> None:
    first = [make_case(3, number) for number in range(2 * len(KINDS))]
    assert first == [make_case(3, number) for number in range(2 * len(KINDS))]
    assert len({case.data for case in first}) > len(KINDS)


def quiet_members(stream: BinaryIO, shard: ObjectInfo, wanted: Any, *, require_end_marker: bool) -> Iterator[Member]:
    """As tarfile reads: it ends without a word where a tar is cut or damaged."""
    try:
        with tarfile.open(fileobj=io.BytesIO(stream.read()), mode="r") as tar:
            for one in tar:
                file = tar.extractfile(one) if one.isreg() else None
                data = file.read() if file else None
                if not one.isdir():
                    yield Member(one.name, one.size, one.offset_data, data, one.isreg())
    except tarfile.TarError:
        return


def test_the_fuzzer_notices_a_reader_that_ends_quietly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "tar_members", quiet_members)
    problems = fuzz(range(4 * len(KINDS)), 1, tmp_path)["problems"]
    for kind in ("cut anywhere", "cut at a member", "cut in a header"):
        assert any(problem.startswith(kind) for problem in problems), kind


def test_the_fuzzer_notices_a_sample_that_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = shards._sample
    monkeypatch.setattr(shards, "_sample", lambda key, index, *a, **k: sample(key, index // 2, *a, **k))
    assert any("indices" in problem for problem in fuzz(range(len(KINDS)), 1, tmp_path)["problems"])


@pytest.mark.parametrize(
    ("deed", "limit_s", "found"),
    [(lambda name: {}[name], 60, "KeyError"), (lambda _: time.sleep(600), 0.2, "more than 0.2 s")],
)
def test_the_fuzzer_notices_a_case_that_hangs_or_raises_what_is_no_shard_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deed: Callable[[str], Any], limit_s: float, found: str
) -> None:
    monkeypatch.setattr(fuzz_shards, "CASE_TIME_LIMIT_S", limit_s)
    monkeypatch.setattr(shards, "split_key", deed)
    (problem,) = fuzz(range(1), 1, tmp_path)["problems"]
    assert found in problem
