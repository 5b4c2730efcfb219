"""Failures by reason: all are counted, a few are shown, and what they say can do no harm."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.failures import EXAMPLES, FILES_AT_ONCE, MOST_CHARACTERS, Failures, plain_text, read_failures
from pipeline.records import FailureReason, ObjectInfo, SampleFailure, Stage
from pipeline.token_table import ERRORS_SCHEMA, errors_bytes


def failure(key: str | None, reason: FailureReason, message: str = "why") -> SampleFailure:
    return SampleFailure(key, 0, 512, 9, Stage.DECODE, reason, message)


def files(folder: Path, number: int, per_file: int = 1) -> list[str]:
    urls = [str(folder / f"{n:04d}.parquet") for n in range(number)]
    for n, url in enumerate(urls):
        rows = [failure(f"k{n}-{m}", FailureReason.NOT_AN_IMAGE) for m in range(per_file)]
        storage.publish(url, errors_bytes(ObjectInfo(f"/in/{n}.tar", 1, "e"), rows))
    return urls


def test_every_row_is_counted_and_the_first_few_of_a_reason_are_kept(tmp_path: Path) -> None:
    urls = files(tmp_path, 2 * FILES_AT_ONCE + 1, per_file=2)
    whole = SampleFailure(None, None, None, None, Stage.SHARD, FailureReason.SHARD_TRUNCATED, "cut")
    rows = [failure("x", FailureReason.TOO_SMALL), whole]
    storage.publish(urls[-1], errors_bytes(ObjectInfo("/in/last.tar", 1, "e"), rows))
    failures = Failures()
    assert sum(read_failures(urls, failures)) == len(urls)
    num = 2 * (len(urls) - 1)
    assert failures.most_frequent() == [("not_an_image", num), ("shard_truncated", 1), ("too_small", 1)]
    assert [example["key"] for example in failures.examples["not_an_image"]] == ["k0-0", "k0-1", "k1-0"][:EXAMPLES]
    assert failures.examples["shard_truncated"] == [
        {"shard": "/in/last.tar", "key": None, "stage": "shard", "message": "cut"}
    ]
    assert (failures.num_images, failures.num_shards) == (num + 1, 1)


def test_a_damaged_errors_file_is_named_and_the_others_are_counted(tmp_path: Path) -> None:
    urls = files(tmp_path, 5)
    Path(urls[2]).write_bytes(b"PAR1 no more")
    failures = Failures()
    assert sum(read_failures(urls, failures)) == 5
    assert failures.counts == {"not_an_image": 4}
    assert list(failures.unreadable) == [urls[2]]


def test_an_errors_file_that_a_driver_takes_away_meanwhile_is_no_failure_any_more(tmp_path: Path) -> None:
    urls = files(tmp_path, 5)
    Path(urls[2]).unlink()
    failures = Failures()
    assert sum(read_failures(urls, failures)) == 5
    assert failures.counts == {"not_an_image": 4} and failures.unreadable == {}


def test_a_reason_that_is_none_of_ours_is_unknown_whatever_it_says(tmp_path: Path) -> None:
    for n, reason in enumerate(["\x1b[2J" + "x" * 2_000_000, "nobody's", "", "too_small"]):
        rows = {name: [None] for name in ERRORS_SCHEMA.names} | {"shard": ["s"], "message": ["m"]}
        rows |= {"reason": [reason], "stage": ["decode"]}
        pq.write_table(pa.table(rows, ERRORS_SCHEMA), tmp_path / f"{n}.parquet")
    failures = Failures()
    list(read_failures([str(path) for path in sorted(tmp_path.iterdir())], failures))
    assert failures.counts == {"unknown": 3, "too_small": 1} and failures.num_images == 4
    assert len(failures.examples["unknown"]) == 3


def test_of_many_damaged_files_some_are_named_and_all_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.failures.MOST_NAMED", 3)
    urls = files(tmp_path, 5)
    for url in urls:
        Path(url).write_bytes(b"PAR1 no more")
    failures = Failures()
    list(read_failures(urls, failures))
    assert failures.num_unreadable == 5 and list(failures.unreadable) == urls[:3]


def test_no_errors_files_are_no_failures() -> None:
    failures = Failures()
    assert list(read_failures([], failures)) == []
    assert failures.most_frequent() == []


def test_text_of_others_becomes_one_short_line_of_printable_characters() -> None:
    assert plain_text("a\0b\x1b[31m\nc\u202egnp.exe") == "a b [31m c gnp.exe"
    assert plain_text("é 猫 <b>") == "é 猫 <b>"
    assert plain_text(None) is None
    long = plain_text("x" * 10_000_000)
    assert long is not None and len(long) == MOST_CHARACTERS and long.endswith("…")
