"""The ledger: the newest row of a shard counts, and a kill at any step of a merge loses nothing."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from make_data import Killed, MortalStore
from pipeline import ledger as ledger_module
from pipeline import storage
from pipeline.errors import RunHeld, StorageError
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix
from pipeline.records import ShardResult, ShardState

DONE = ShardResult("s3://b/0.tar", 10, "e", ShardState.DONE, "0-12345678.parquet", 90, 10, 4096, "sha", 1.5, attempts=2)
LOST = ShardResult("s3://b/1.tar", 11, "f", ShardState.QUARANTINED, attempts=3, reason="shard_truncated", message="cut")


def row(n: int, version: int = 0) -> ShardResult:
    return replace(DONE, shard=f"s3://b/{n}.tar", num_rows=version)


def by_shard(*rows: ShardResult) -> dict[str, ShardResult]:
    return {one.shard: one for one in rows}


def segments(output: OutputPrefix) -> list[str]:
    return [storage.base_name(info.url) for info in storage.list_files(output.ledger_folder())]


@pytest.fixture
def output(tmp_path: Path) -> OutputPrefix:
    return OutputPrefix(str(tmp_path))


@pytest.fixture
def few_segments(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(ledger_module, "COMPACT_SEGMENTS", 4)
    return 4


def test_rows_come_back_as_they_were(output: OutputPrefix) -> None:
    assert Ledger(output).read() == {}
    Ledger(output).append([DONE, LOST])
    assert Ledger(output).read() == by_shard(DONE, LOST)


def test_the_newest_row_of_a_shard_counts(output: OutputPrefix) -> None:
    for version in range(12):  # two digits and more: names sort as numbers do
        Ledger(output).append([row(0, version), row(version + 1)])
    assert Ledger(output).read()["s3://b/0.tar"].num_rows == 11
    Ledger(output).append([row(5, 1), row(5, 2)])  # in one segment too
    assert Ledger(output).read()["s3://b/5.tar"].num_rows == 2


def test_nothing_to_say_makes_no_segment(output: OutputPrefix) -> None:
    Ledger(output).append([])
    assert segments(output) == []


def test_a_ledger_that_was_not_read_first_overwrites_nothing(output: OutputPrefix) -> None:
    Ledger(output).append([row(0)])
    Ledger(output).append([row(1)])
    assert Ledger(output).read() == by_shard(row(0), row(1))
    assert segments(output) == ["00000001.parquet", "00000002.parquet"]


def test_two_drivers_that_both_append_lose_no_row(output: OutputPrefix) -> None:
    one, two = Ledger(output), Ledger(output)
    assert one.read() == two.read() == {}  # both know the next number
    for n in range(3):
        one.append([row(n)])
        two.append([row(10 + n)])
    assert Ledger(output).read() == by_shard(*(row(n) for n in (0, 1, 2, 10, 11, 12)))
    assert len(segments(output)) == 6


def test_other_files_in_the_folder_are_passed_over(output: OutputPrefix, tmp_path: Path) -> None:
    Ledger(output).append([row(0)])
    for name in (".DS_Store", "notes.txt", "old.parquet", "00000007.tmp"):
        (tmp_path / "ledger" / name).write_bytes(b"x")
    assert Ledger(output).read() == by_shard(row(0))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"x" * 100])
def test_a_damaged_segment_is_named_with_the_remedy(output: OutputPrefix, tmp_path: Path, content: bytes) -> None:
    Ledger(output).append([row(0)])
    (tmp_path / "ledger" / "00000002.parquet").write_bytes(content)
    with pytest.raises(StorageError, match=r"00000002\.parquet is no segment of a ledger; remove it"):
        Ledger(output).read()


def test_a_flipped_byte_in_any_page_of_a_segment_is_an_error_or_changes_nothing(
    output: OutputPrefix, tmp_path: Path
) -> None:
    Ledger(output).append([row(n, n) for n in range(20)])
    path, before, num_refused = tmp_path / "ledger" / "00000001.parquet", Ledger(output).read(), 0
    data = path.read_bytes()
    for position in range(4, len(data) - 8 - pq.read_metadata(path).serialized_size, 3):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        try:
            assert Ledger(output).read() == before, position
        except StorageError:
            num_refused += 1
    assert num_refused > 50


def test_messages_are_stored_without_credentials(output: OutputPrefix, tmp_path: Path) -> None:
    Ledger(output).append([replace(LOST, message="GET https://me:secret@h/a.tar?sig=hidden failed")])
    assert Ledger(output).read()[LOST.shard].message == "GET https://h/a.tar failed"
    data = (tmp_path / "ledger" / "00000001.parquet").read_bytes()
    assert b"secret" not in data and b"hidden" not in data


def test_compaction_keeps_the_newest_rows_in_one_segment(output: OutputPrefix, few_segments: int) -> None:
    for n in range(few_segments + 1):
        Ledger(output).append([row(n), row(100, n)])
    before = Ledger(output).read()
    Ledger(output).compact()
    assert segments(output) == ["00000006.parquet"]
    assert Ledger(output).read() == before
    Ledger(output).compact()  # few are left alone
    assert segments(output) == ["00000006.parquet"]
    Ledger(output).append([row(100, 99)])
    assert Ledger(output).read()["s3://b/100.tar"].num_rows == 99


def test_a_long_run_merges_while_it_goes_on(output: OutputPrefix, few_segments: int) -> None:
    """A run of a day appends thousands of segments; a status should not have to read them all."""
    Ledger(output).append([row(0, 1)])
    ledger = Ledger(output)
    for n in range(40):
        ledger.append([row(n % 7, n)])
    assert len(segments(output)) <= 40 // (few_segments + 1) + few_segments + 1
    assert {shard: one.num_rows for shard, one in Ledger(output).read().items()} == {
        f"s3://b/{n % 7}.tar": n for n in range(33, 40)
    }


def test_a_kill_at_any_step_of_a_compaction_loses_nothing(few_segments: int) -> None:
    for kill_before in itertools.count():
        output = OutputPrefix("mortal://out")
        MortalStore.fresh()
        for n in range(few_segments + 2):
            Ledger(output).append([row(n), row(100, n)])
        expected = Ledger(output).read()
        MortalStore.alive(kill_before)
        try:
            Ledger(output).compact()
        except Killed:
            MortalStore.alive()
            assert Ledger(output).read() == expected
            Ledger(output).append([row(100, 77)])  # and what comes after still counts more
            assert Ledger(output).read()["s3://b/100.tar"].num_rows == 77
        else:
            break
    assert kill_before == few_segments + 3


def test_a_kill_at_any_step_of_a_growing_ledger_loses_only_what_was_not_yet_said(few_segments: int) -> None:
    for kill_before in itertools.count():
        output = OutputPrefix("mortal://out")
        MortalStore.fresh().alive(kill_before)
        ledger, said = Ledger(output), 0
        try:
            for n in range(12):
                ledger.append([row(n), row(100, n)])
                said = n + 1
        except Killed:
            found = Ledger(output).read()
            assert {f"s3://b/{n}.tar" for n in range(said)} <= set(found)
            assert not found or found["s3://b/100.tar"].num_rows >= said - 1
        else:
            break
    assert kill_before > 20


def test_a_reader_beside_a_merging_driver_sees_every_row(output: OutputPrefix, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(3):
        Ledger(output).append([row(n)])
    real, merged = storage.read_bytes, False

    def read_bytes(url: str) -> bytes:
        nonlocal merged
        if not merged:
            merged = True
            monkeypatch.setattr(ledger_module, "COMPACT_SEGMENTS", 2)
            Ledger(output).compact()
        return real(url)

    monkeypatch.setattr(storage, "read_bytes", read_bytes)
    assert Ledger(output).read() == by_shard(*(row(n) for n in range(3)))


def test_a_segment_is_plain_parquet_for_any_engine(output: OutputPrefix, tmp_path: Path) -> None:
    Ledger(output).append([DONE, LOST])
    table = pq.read_table(tmp_path / "ledger" / "00000001.parquet")
    assert table["state"].to_pylist() == ["done", "quarantined"]


def test_a_row_is_written_a_few_times_at_most_however_long_a_run_is(
    output: OutputPrefix, few_segments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And few segments are left. Merging all that there is, each time, would write each row hundreds of times."""
    written: list[int] = []
    real = ledger_module._segment_bytes
    monkeypatch.setattr(ledger_module, "_segment_bytes", lambda rows: written.append(len(rows)) or real(rows))
    ledger, number = Ledger(output), 700
    for n in range(number):
        ledger.append([row(n)])
    assert sum(written) <= 5 * number  # tiers of 5, 25, 125 and 625
    assert len(segments(output)) <= 5 * few_segments
    assert set(Ledger(output).read()) == {f"s3://b/{n}.tar" for n in range(number)}


def test_a_merge_of_merged_segments_keeps_the_newest_row(output: OutputPrefix, few_segments: int) -> None:
    ledger = Ledger(output)
    for n in range(130):
        ledger.append([row(n % 3, n), row(7, n)])
    found = Ledger(output).read()
    assert {shard: one.num_rows for shard, one in found.items()} == {
        "s3://b/0.tar": 129, "s3://b/1.tar": 127, "s3://b/2.tar": 128, "s3://b/7.tar": 129,
    }  # fmt: skip


def failing_once(monkeypatch: pytest.MonkeyPatch, name: str, on_call: int) -> None:
    """One call of the store's `name` fails."""
    real, calls = getattr(storage, name), itertools.count(1)

    def call(*arguments: object) -> object:
        if next(calls) == on_call:
            raise StorageError("503 slow down")
        return real(*arguments)

    monkeypatch.setattr(storage, name, call)


@pytest.mark.parametrize(
    ("name", "on_call"),
    [("remove", 1), ("remove", 3), ("read_bytes", 2), ("create", 6)]
    + [("remove", 23), ("read_bytes", 24), ("create", 30)],  # while merged ones wait to be merged again
)
def test_a_merge_that_fails_is_said_and_ends_nothing(
    output: OutputPrefix,
    few_segments: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    on_call: int,
) -> None:
    """Rows that were written are not said to be unwritten, what comes after is appended, and the newest row counts."""
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        failing_once(patch, name, on_call)
        ledger = Ledger(output)
        for n in range(60):
            ledger.append([row(n), row(100, n)] if n in (0, 7, 14, 20, 22, 23) else [row(n)])
    assert [("503" in record.getMessage()) for record in caplog.records] == [True]
    found = Ledger(output).read()
    assert set(found) == {f"s3://b/{n}.tar" for n in [*range(60), 100]} and found["s3://b/100.tar"].num_rows == 23
    Ledger(output).compact()
    assert len(segments(output)) == 1 and Ledger(output).read() == found


def test_a_driver_that_lost_its_lease_in_a_merge_ends(output: OutputPrefix, few_segments: int) -> None:
    checks = itertools.count(1)

    def check() -> None:
        if next(checks) == few_segments + 2:
            raise RunHeld("taken over")

    ledger = Ledger(output, check)
    with pytest.raises(RunHeld):
        for n in range(few_segments + 1):
            ledger.append([row(n)])
    assert len(segments(output)) == few_segments + 1
