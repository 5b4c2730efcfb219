"""`dvae verify`: whatever is broken in a finished output is found, named as what it is, and its remedy repairs it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.tokenize_config import TokenizeConfig
from jobs.tokenize_dataset import run_tokenize
from jobs.verify import Report, verify
from make_data import folder_bytes, write_checkpoint
from make_run import part_of, record_part, rewrite_part, run_config, tokenize_here, write_shard
from pipeline import parquet_access, storage
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix
from pipeline.records import ShardState

GOOD, MIXED = "a", "b"  # shards: four good images; two good ones between two bad ones
LETTERS = {GOOD: "++++", MIXED: "-++-", "c": "", "d": "+++"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TokenizeConfig:
    """A complete run of four shards: 9 rows, 2 errors."""
    folder = tmp_path_factory.mktemp("verify")
    for number, (name, good) in enumerate(LETTERS.items()):
        write_shard(folder / "in" / f"{name}.tar", 10 * number, good)
    made = run_config(write_checkpoint(folder / "ck"), folder / "in", folder / "out", max_failed_samples=0.5)
    assert tokenize_here(made) == 0
    return made


@pytest.fixture
def output(config: TokenizeConfig, tmp_path: Path) -> Path:
    return shutil.copytree(config.output, tmp_path / "out")


def found(output: Path, *, quick: bool = False) -> dict[str, list[str]]:
    """Kind -> the files it is said of."""
    problems: dict[str, list[str]] = {}
    for problem in report(output, quick=quick).problems:
        problems.setdefault(problem.kind.value, []).append(problem.file)
    return problems


def report(output: Path, *, quick: bool = False) -> Report:
    return verify(OutputPrefix(str(output)), quick=quick)


def said(output: Path, kind: str) -> str:
    return "\n".join(problem.message for problem in report(output).problems if problem.kind == kind)


def tokens(output: Path, shard: str) -> str:
    return f"tokens/{part_of(output, shard).name}"


def errors(output: Path, shard: str) -> str:
    return f"errors/{part_of(output, shard).name}"


def rerun(config: TokenizeConfig, output: Path) -> int:
    return tokenize_here(config.model_copy(update={"output": str(output)}))


@pytest.mark.parametrize("quick", [False, True])
def test_a_complete_run_is_said_to_be_complete_with_its_counts(output: Path, quick: bool) -> None:
    whole = report(output, quick=quick)
    assert whole.complete and not whole.running and whole.problems == ()
    assert (whole.num_done, whole.num_quarantined, whole.num_images, whole.num_failed) == (4, 0, 9, 2)
    assert whole.part_bytes == sum(path.stat().st_size for path in (output / "tokens").iterdir())
    assert whole.num_without_sha256 == 0


# One thing broken: what it is called, by a full look and by a quick one, and whether its remedy repairs it


def flip(path: Path) -> None:
    """A bit of a page, so that other rows are read, without an error where nobody asks for the checksums."""
    data, rows = path.read_bytes(), pq.read_table(path)
    for position in range(4, len(data) - 8 - pq.read_metadata(path).serialized_size):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        try:
            if not pq.read_table(path).equals(rows):
                return
        except (OSError, pa.ArrowException):
            continue
    raise AssertionError("no such bit")


def flip_first(path: Path) -> None:
    path.write_bytes(b"Q" + path.read_bytes()[1:])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def with_column(name: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[pa.Table], pa.Table]:
    def changed(rows: pa.Table) -> pa.Table:
        values = pa.array(change(rows[name].to_pylist()), rows.schema.field(name).type)
        return rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), values)

    return changed


def wider(rows: pa.Table) -> pa.Table:
    return rows.append_column("more", pa.array([1] * rows.num_rows))


def without_errors_rows(output: Path, num_left: int) -> None:
    path = output / errors(output, MIXED)
    pq.write_table(pq.read_table(path)[:num_left], path)


def errors_of(output: Path, **columns: Any) -> None:
    """Other values in the first row of the errors file."""
    path = output / errors(output, MIXED)
    rows = pq.read_table(path)
    values = [{**row, **(columns if number == 0 else {})} for number, row in enumerate(rows.to_pylist())]
    pq.write_table(pa.Table.from_pylist(values, schema=rows.schema), path)


PARTS = {
    "a flipped byte": lambda out: flip(part_of(out, GOOD)),
    "cut": lambda out: cut(part_of(out, GOOD)),
    "empty": lambda out: part_of(out, GOOD).write_bytes(b""),
    "no Parquet": lambda out: part_of(out, GOOD).write_bytes(b"x" * 1000),
    "a flipped byte of a part without sha256": lambda out: forget_sha(out) or flip(part_of(out, GOOD)),
    "a flipped first byte of a part without sha256": lambda out: forget_sha(out) or flip_first(part_of(out, GOOD)),
    "a footer field of another type": lambda out: rewrite_part(out, GOOD, shard_size="many"),
    "token too large": lambda out: rewrite_part(
        out, GOOD, with_column("tokens", lambda t: [*t[:-1], [64, *t[-1][1:]]])
    ),
    "token negative": lambda out: rewrite_part(out, GOOD, with_column("tokens", lambda t: [[-1, *t[0][1:]], *t[1:]])),
    "key twice": lambda out: rewrite_part(out, GOOD, with_column("key", lambda keys: [keys[1], *keys[1:]])),
    "order": lambda out: rewrite_part(out, GOOD, lambda rows: rows.take([1, 0, 2, 3])),
    "index twice": lambda out: rewrite_part(out, GOOD, with_column("index", lambda i: [0, 1, 1, 3])),
    "index missing": lambda out: rewrite_part(out, GOOD, with_column("index", lambda i: [0, 1, 3, 4])),
    "index of an error": lambda out: rewrite_part(out, MIXED, with_column("index", lambda i: [0, 1])),
    "another shard": lambda out: rewrite_part(out, GOOD, with_column("shard", lambda s: [*s[:-1], "/else.tar"])),
    "offset outside": lambda out: rewrite_part(out, GOOD, with_column("offset", lambda o: [*o[:-1], 10**9])),
    "offset negative": lambda out: rewrite_part(out, GOOD, with_column("offset", lambda o: [-1, *o[1:]])),
    "size negative": lambda out: rewrite_part(out, GOOD, with_column("size", lambda s: [-1, *s[1:]])),
    "a column more": lambda out: rewrite_part(out, GOOD, wider),
    "a column less": lambda out: rewrite_part(out, GOOD, lambda rows: rows.drop_columns(["caption"])),
    "another tokenizer": lambda out: rewrite_part(out, GOOD, tokenizer_id="other"),
    "another grid": lambda out: rewrite_part(out, GOOD, grid=[4, 1]),
    "another codebook": lambda out: rewrite_part(out, GOOD, codebook_size=65),
    "another image spec": lambda out: rewrite_part(out, GOOD, image_spec={"size": 8}),
    "other columns": lambda out: rewrite_part(out, GOOD, columns=[]),
    "another schema version": lambda out: rewrite_part(out, GOOD, schema_version=2),
    "another shard in the footer": lambda out: rewrite_part(out, GOOD, shard="/else.tar"),
    "footer counts other rows": lambda out: rewrite_part(out, GOOD, num_rows=5),
    "fewer rows than the ledger": lambda out: record_part(out, part_of(out, GOOD), num_rows=5),
    "other failures than the ledger": lambda out: record_part(out, part_of(out, GOOD), num_failed=1),
}
TORN = {
    "a flipped byte", "cut", "empty", "no Parquet", "a flipped byte of a part without sha256",
    "a flipped first byte of a part without sha256", "a footer field of another type",
}  # fmt: skip
QUICK_PASSES = {  # what only the bytes themselves can say
    "a flipped byte", "a flipped byte of a part without sha256", "a flipped first byte of a part without sha256",
    "token too large", "token negative", "key twice", "order", "index twice", "index missing", "index of an error",
    "another shard", "offset outside", "offset negative", "size negative",
}  # fmt: skip


def forget_sha(output: Path) -> None:
    ledger = Ledger(OutputPrefix(str(output)))
    ledger.append([replace(row, sha256=None) for row in ledger.read().values()])


@pytest.mark.parametrize("name", PARTS)
def test_a_broken_part_is_named_and_removing_it_and_running_again_repairs_it(
    config: TokenizeConfig, output: Path, name: str
) -> None:
    PARTS[name](output)
    kind = "torn" if name in TORN else "wrong"
    broken = tokens(output, MIXED if name == "index of an error" else GOOD)
    found_there = found(output)
    found_there.pop("manifest", None)  # where the ledger was made to agree with the broken part
    assert found_there == {kind: [broken]}, said(output, kind)
    assert (kind not in found(output, quick=True)) == (name in QUICK_PASSES)
    (output / broken).unlink()
    assert rerun(config, output) == 0
    assert report(output).complete
    assert folder_bytes(output / "tokens") == folder_bytes(Path(config.output) / "tokens")


def errors_file(output: Path) -> Path:
    return output / errors(output, MIXED)


def rewrite_errors(output: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    rows = pq.read_table(errors_file(output))
    pq.write_table(change(rows), errors_file(output))


def as_quarantine(rows: pa.Table) -> pa.Table:
    rows = with_column("stage", lambda stages: ["shard", *stages[1:]])(rows)
    return with_column("index", lambda index: [None, *index[1:]])(rows)


ERRORS = {
    "missing": lambda out: errors_file(out).unlink(),
    "a flipped byte": lambda out: flip(errors_file(out)),
    "cut": lambda out: cut(errors_file(out)),
    "another schema": lambda out: rewrite_errors(out, wider),
    "a row less": lambda out: rewrite_errors(out, lambda rows: rows[:1]),
    "a row more": lambda out: rewrite_errors(out, lambda rows: pa.concat_tables([rows, rows[:1]])),
    "another shard": lambda out: rewrite_errors(out, with_column("shard", lambda s: ["/else.tar", *s[1:]])),
    "a last row of another shard": lambda out: rewrite_errors(out, with_column("shard", lambda s: [s[0], "/else.tar"])),
    "all of another shard": lambda out: rewrite_errors(out, with_column("shard", lambda s: ["/else.tar"] * len(s))),
    "unknown stage": lambda out: rewrite_errors(out, with_column("stage", lambda s: ["guess", *s[1:]])),
    "unknown reason": lambda out: rewrite_errors(out, with_column("reason", lambda s: ["bad luck", *s[1:]])),
    "no index": lambda out: rewrite_errors(out, with_column("index", lambda i: [None, *i[1:]])),
    "given up beside a part": lambda out: rewrite_errors(out, as_quarantine),
}
ERRORS_KIND = {"missing": "missing", "a flipped byte": "torn", "cut": "torn", "another schema": "torn"}
ERRORS_QUICK = {"missing", "cut", "another schema", "a row less", "a row more"}


@pytest.mark.parametrize("name", ERRORS)
def test_a_broken_errors_file_is_named_and_removing_it_and_running_again_repairs_it(
    config: TokenizeConfig, output: Path, name: str
) -> None:
    ERRORS[name](output)
    kind, broken = ERRORS_KIND.get(name, "wrong"), errors(output, MIXED)
    assert found(output) == {kind: [broken]}, said(output, kind)
    assert (kind in found(output, quick=True)) == (name in ERRORS_QUICK)
    (output / broken).unlink(missing_ok=True)
    assert rerun(config, output) == 0
    assert report(output).complete


def test_an_index_in_the_errors_that_is_not_the_lost_ones_is_a_sample_without_a_row(output: Path) -> None:
    rewrite_errors(output, with_column("index", lambda index: [0, 17]))
    assert found(output) == {"wrong": [tokens(output, MIXED)]}
    assert "sample 3 of the shard has neither a row nor an error" in said(output, "wrong")


def test_a_sample_with_a_row_and_an_error_is_named(output: Path) -> None:
    """And none is without, so that the numbers alone would fit the indexes."""
    rewrite_errors(output, with_column("index", lambda index: [0, 2]))
    assert found(output) == {"wrong": [tokens(output, MIXED)]}
    assert said(output, "wrong") == "sample 2 has a row and an error (so have 1 in all)"


def test_one_error_that_gives_up_the_shard_is_wrong_beside_a_part(output: Path) -> None:
    rewrite_part(output, GOOD, num_failed=1)
    record_part(output, part_of(output, GOOD), num_failed=1)
    pq.write_table(as_quarantine(pq.read_table(errors_file(output))[:1]), output / errors(output, GOOD))
    (output / "manifest.json").unlink()
    rows = pq.read_table(output / errors(output, GOOD))
    shard = pq.read_table(part_of(output, GOOD))["shard"][0].as_py()
    pq.write_table(with_column("shard", lambda s: [shard])(rows), output / errors(output, GOOD))
    assert found(output) == {"wrong": [errors(output, GOOD)], "incomplete": ["manifest.json"]}


def test_a_stale_errors_file_is_named_and_removing_it_is_enough(output: Path) -> None:
    shutil.copy(errors_file(output), output / errors(output, GOOD))
    for quick in (False, True):
        assert found(output, quick=quick) == {"wrong": [errors(output, GOOD)]}
    assert "it is stale" in said(output, "wrong")


def test_a_part_of_other_bytes_is_torn_though_it_is_right_in_itself(output: Path) -> None:
    """A token is another one: only the ledger's sha256 knows, and a quick look only where the size tells."""
    path = part_of(output, GOOD)
    size, rows = path.stat().st_size, pq.read_table(path)
    for token in range(64):
        changed = with_column("tokens", lambda t, token=token: [[token, *t[0][1:]], *t[1:]])(rows)
        pq.write_table(changed, path, compression="zstd", write_page_checksum=True)
        if path.stat().st_size == size and not changed.equals(rows):
            break
    assert found(output) == {"torn": [tokens(output, GOOD)]} and "its sha256 is" in said(output, "torn")
    assert found(output, quick=True) == {}
    pq.write_table(rows, path, compression="none")
    assert found(output) == found(output, quick=True) == {"torn": [tokens(output, GOOD)]}
    assert f"bytes, the ledger says {size}" in said(output, "torn")
    forget_sha(output)
    assert found(output) == {"torn": [tokens(output, GOOD)]}


def test_a_footer_longer_than_one_request_is_read_in_two(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_access, "END_BYTES", 50)
    assert report(output, quick=True).complete


def test_two_parts_with_each_others_content_are_both_torn(output: Path) -> None:
    one, two = part_of(output, GOOD), part_of(output, "d")
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)
    assert found(output) == {"torn": sorted([tokens(output, GOOD), tokens(output, "d")])}
    forget_sha(output)
    for row_of in (one, two):  # and the ledger agrees with their sizes: the footers tell
        record_part(output, row_of)
    forget_sha(output)
    assert found(output, quick=True)["wrong"] == sorted([tokens(output, GOOD), tokens(output, "d")])


def test_a_missing_part_is_named_and_made_again_by_the_same_command(config: TokenizeConfig, output: Path) -> None:
    missing = tokens(output, GOOD)
    (output / missing).unlink()
    assert found(output) == found(output, quick=True) == {"missing": [missing]}
    assert rerun(config, output) == 0
    assert report(output).complete


def rewritten(output: Path) -> Path:
    """A copy where a part's footer has a field of another type."""
    copy = shutil.copytree(output, output.parent / "rewritten")
    rewrite_part(copy, "d", shard_size="many")
    return copy


def test_files_that_no_shard_accounts_for_are_foreign_and_not_read_whole_where_a_footer_tells(
    config: TokenizeConfig, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = output / "tokens" / "notes-12345678.parquet"
    pq.write_table(pa.table({"a": [1]}), plain)
    shutil.copy(part_of(output, GOOD), output / "tokens" / "copy-07b9ca0a.parquet")
    (output / "tokens" / "sub").mkdir()
    shutil.copy(part_of(output, GOOD), output / "tokens" / "sub" / part_of(output, GOOD).name)
    strange = part_of(rewritten(output), "d")
    shutil.copy(strange, output / "tokens" / "strange-12345678.parquet")
    shutil.rmtree(output.parent / "rewritten")
    shutil.copy(plain, output / "errors" / plain.name)
    shutil.copy(errors_file(output), output / "errors" / "copy-87654321.parquet")
    for folder in ("tokens", "errors"):
        (output / folder / "README.md").write_text("hello")
    (output / "tokens" / ".a.parquet.0123.tmp").write_bytes(b"half")
    expected = [
        "errors/README.md", "errors/copy-87654321.parquet", "errors/notes-12345678.parquet",
        "tokens/.a.parquet.0123.tmp", "tokens/README.md", "tokens/copy-07b9ca0a.parquet",
        "tokens/strange-12345678.parquet", "tokens/notes-12345678.parquet",
        f"tokens/sub/{part_of(output, GOOD).name}",
    ]  # fmt: skip
    whole: list[str] = []
    monkeypatch.setattr(storage, "read_bytes", lambda url, real=storage.read_bytes: whole.append(url) or real(url))
    assert sorted(found(output)["foreign"]) == sorted(expected) and set(found(output)) == {"foreign"}
    assert {url for url in whole if any(url.endswith(name) for name in expected)} == {
        str(output / "errors" / "copy-87654321.parquet")  # of which only the rows say so
    }
    assert sorted(found(output, quick=True)["foreign"]) == sorted(expected)


def test_a_part_of_another_run_is_foreign(config: TokenizeConfig, output: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "ck", seed=1)
    write_shard(tmp_path / "in" / "e.tar", 50, "++")
    assert tokenize_here(run_config(other, tmp_path / "in", tmp_path / "other")) == 0
    shutil.copy(part_of(tmp_path / "other", "e"), output / "tokens")
    assert found(output) == {"foreign": [tokens(output, "e")]}
    assert "it is of another run: its tokenizer is" in said(output, "foreign")


def test_a_part_that_the_ledger_does_not_know_is_recorded_by_the_next_run(config: TokenizeConfig, output: Path) -> None:
    """The driver was killed before it wrote a ledger."""
    shutil.rmtree(output / "ledger")
    (output / "manifest.json").unlink()
    names = sorted(tokens(output, shard) for shard in LETTERS)
    expected = {"unrecorded": names, "incomplete": ["plan.json", "manifest.json"]}
    assert found(output) == found(output, quick=True) == expected
    assert "the ledger accounts for 0 of the 4 shards" in said(output, "incomplete")
    assert rerun(config, output) == 0
    again = report(output)
    assert again.complete and again.num_without_sha256 == 4


def test_a_torn_part_that_the_ledger_does_not_know_is_torn_not_foreign(output: Path) -> None:
    shutil.rmtree(output / "ledger")
    cut(part_of(output, GOOD))
    assert found(output)["torn"] == [tokens(output, GOOD)]


def test_a_part_newer_than_its_ledger_row_is_not_torn(config: TokenizeConfig, output: Path, tmp_path: Path) -> None:
    """A shard changed, was tokenised anew, and the driver was killed before it wrote the ledger."""
    old = Ledger(OutputPrefix(str(output))).read()
    path = Path(str(config.shards[0])) / "a.tar"
    before, times = path.read_bytes(), path.stat()
    try:
        write_shard(path, 70, "+++++")
        assert rerun(config, output) == 0
    finally:
        path.write_bytes(before)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    Ledger(OutputPrefix(str(output))).rewrite(old.values())
    (output / "manifest.json").unlink()
    assert found(output) == {"unrecorded": [tokens(output, GOOD)], "incomplete": ["manifest.json"]}
    assert "of other bytes of its shard than the ledger knows" in said(output, "unrecorded")


def test_errors_without_their_part_say_that_the_driver_was_killed_in_between(
    config: TokenizeConfig, output: Path
) -> None:
    ledger = Ledger(OutputPrefix(str(output)))
    ledger.rewrite([row for row in ledger.read().values() if row.part != part_of(output, MIXED).name])
    (output / "manifest.json").unlink()
    name = errors(output, MIXED)
    part_of(output, MIXED).unlink()
    assert found(output) == {"incomplete": [name, "plan.json", "manifest.json"]}
    assert rerun(config, output) == 0
    assert report(output).complete


# Shards that were given up, or removed


@pytest.fixture
def quarantined(config: TokenizeConfig, tmp_path: Path) -> TokenizeConfig:
    """A run of two shards, one of them cut short."""
    for name in ("a", "bad"):
        write_shard(tmp_path / "in" / f"{name}.tar", 0, "+++")
    path = tmp_path / "in" / "bad.tar"
    path.write_bytes(path.read_bytes()[:1500])
    made = run_config(Path(config.checkpoint), tmp_path / "in", tmp_path / "out")
    assert tokenize_here(made) == 1
    return made


def lost_file(output: Path) -> str:
    (path,) = (output / "errors").glob("bad-*.parquet")
    return f"errors/{path.name}"


def test_a_quarantined_shard_is_named_with_its_reason_and_is_tried_again(quarantined: TokenizeConfig) -> None:
    output = Path(quarantined.output)
    lost = lost_file(output)
    expected = {"quarantined": [lost], "incomplete": ["manifest.json"]}
    assert found(output) == found(output, quick=True) == expected
    assert "bad.tar: shard_truncated: " in said(output, "quarantined")
    assert (report(output).num_done, report(output).num_quarantined) == (1, 1)
    write_shard(Path(quarantined.shards[0]) / "bad.tar", 0, "+++")
    assert tokenize_here(quarantined) == 0
    assert report(output).complete


def test_a_quarantined_shard_without_its_errors_file_is_named(quarantined: TokenizeConfig) -> None:
    output = Path(quarantined.output)
    lost = lost_file(output)
    (output / lost).unlink()
    assert found(output) == {"missing": [lost], "incomplete": ["manifest.json"]}


def test_a_quarantined_shard_with_other_errors_beside_is_wrong(quarantined: TokenizeConfig) -> None:
    output = Path(quarantined.output)
    path = output / lost_file(output)
    rows = pq.read_table(path)
    beside = pa.Table.from_pylist([{**rows.to_pylist()[0], "stage": "read", "index": 0}], schema=rows.schema)
    pq.write_table(pa.concat_tables([rows, beside]), path)
    assert found(output) == {"wrong": [lost_file(output)], "incomplete": ["manifest.json"]}


def test_a_quarantined_shard_that_the_ledger_does_not_know_is_named_twice(quarantined: TokenizeConfig) -> None:
    output = Path(quarantined.output)
    lost, ledger = lost_file(output), Ledger(OutputPrefix(quarantined.output))
    ledger.rewrite([row for row in ledger.read().values() if row.state is ShardState.DONE])
    names = {kind: files for kind, files in found(output).items() if kind != "incomplete"}
    assert names == {"quarantined": [lost], "unrecorded": [lost]}


def test_a_part_of_a_shard_that_the_ledger_calls_quarantined_is_not_recorded(quarantined: TokenizeConfig) -> None:
    """It was tried again, with success, and the driver killed before it said so."""
    output, ledger = Path(quarantined.output), Ledger(OutputPrefix(quarantined.output))
    rows = ledger.read()
    write_shard(Path(quarantined.shards[0]) / "bad.tar", 0, "+++")
    assert tokenize_here(quarantined) == 0
    ledger.rewrite(rows.values())
    (output / "manifest.json").unlink()
    assert found(output) == {"unrecorded": [tokens(output, "bad")], "incomplete": ["manifest.json"]}
    assert said(output, "unrecorded") == "the ledger says that its shard is quarantined"
    assert tokenize_here(quarantined) == 0
    assert report(output).complete


def test_of_a_removed_shard_nothing_may_be_left(config: TokenizeConfig, output: Path) -> None:
    ledger = Ledger(OutputPrefix(str(output)))
    (row,) = (row for row in ledger.read().values() if row.part == part_of(output, MIXED).name)
    ledger.append([replace(row, state=ShardState.REMOVED, part=None, num_rows=0, num_failed=0, part_bytes=0)])
    part, lost = tokens(output, MIXED), errors(output, MIXED)
    (output / "manifest.json").unlink()
    (output / "plan.json").unlink()
    assert found(output) == {"foreign": [part, lost], "incomplete": ["manifest.json"]}
    (output / part).unlink()
    assert found(output) == {"foreign": [lost], "incomplete": ["manifest.json"]}
    (output / lost).unlink()
    assert found(output) == {"incomplete": ["manifest.json"]}


def test_a_pruned_run_is_complete_and_an_unpruned_one_says_how_to_drop_what_is_broken(
    config: TokenizeConfig, tmp_path: Path
) -> None:
    shards = shutil.copytree(config.shards[0], tmp_path / "in")
    made = run_config(Path(config.checkpoint), shards, tmp_path / "out", max_failed_samples=0.5)
    assert tokenize_here(made) == 0
    (shards / "b.tar").unlink()
    assert tokenize_here(made) == 0
    output = Path(made.output)
    assert report(output).complete
    rows = Ledger(OutputPrefix(str(output))).read()
    Ledger(OutputPrefix(str(output))).rewrite(row for row in rows.values() if row.part != part_of(output, GOOD).name)
    assert "the ledger accounts for 2 of the 3 shards" in said(output, "incomplete")
    Ledger(OutputPrefix(str(output))).rewrite(rows.values())
    gone = tokens(output, MIXED)
    (output / gone).unlink()
    assert found(output) == {"missing": [gone]}
    assert "--prune drops" in said(output, "missing")
    assert run_tokenize(made, "dvae", prune=True) == 0
    assert report(output).complete


# The run as a whole


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def manifest_part(output: Path, **changes: Any) -> None:
    parts = json.loads((output / "manifest.json").read_text())["parts"]
    edit_json(output / "manifest.json", parts=[{**parts[0], **changes}, *parts[1:]])


def forget_in_manifest(output: Path) -> None:
    """One part less, and totals that fit."""
    manifest = json.loads((output / "manifest.json").read_text())
    part, *others = manifest["parts"]
    totals = {name: manifest[name] - part[name] for name in ("num_rows", "num_failed")}
    edit_json(output / "manifest.json", parts=others, num_done=len(others), **totals)


MANIFESTS = {
    "a part less and all that fits": forget_in_manifest,
    "no sha256 of these bytes": lambda out: manifest_part(out, sha256="0" * 64),
    "other bytes": lambda out: manifest_part(out, bytes=1),
    "another part": lambda out: manifest_part(out, part="x.parquet"),
    "other rows": lambda out: manifest_part(out, num_rows=5),
    "an unknown shard": lambda out: manifest_part(out, shard="/else.tar"),
    "a part less": lambda out: edit_json(
        out / "manifest.json", parts=json.loads((out / "manifest.json").read_text())["parts"][1:]
    ),
    "another total": lambda out: edit_json(out / "manifest.json", num_rows=10),
    "another tokenizer": lambda out: edit_json(out / "manifest.json", tokenizer_id="other"),
    "a shard given up": lambda out: edit_json(
        out / "manifest.json", quarantined=[{"shard": "/else.tar", "reason": "r"}], num_quarantined=1
    ),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_disagrees_is_named_and_written_anew_by_the_same_command(
    config: TokenizeConfig, output: Path, name: str
) -> None:
    MANIFESTS[name](output)
    assert set(found(output)) == {"manifest"}
    assert rerun(config, output) == 0
    assert report(output).complete


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"parts": 3}'])
def test_a_torn_manifest_is_named_and_written_anew(config: TokenizeConfig, output: Path, content: str) -> None:
    (output / "manifest.json").write_text(content)
    assert found(output).get("torn", []) + found(output).get("manifest", []), found(output)
    (output / "manifest.json").unlink()
    assert rerun(config, output) == 0
    assert report(output).complete


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"num_shards": 4, "more": 1}'])
def test_a_torn_plan_is_named_and_written_anew(config: TokenizeConfig, output: Path, content: str) -> None:
    (output / "plan.json").write_text(content)
    assert found(output) == {"torn": ["plan.json"]}
    (output / "plan.json").unlink()
    assert rerun(config, output) == 0
    assert report(output).complete and (output / "plan.json").exists()


def test_a_run_that_was_stopped_half_way_says_what_is_left(config: TokenizeConfig, output: Path) -> None:
    ledger = Ledger(OutputPrefix(str(output)))
    ledger.rewrite([row for row in ledger.read().values() if row.part != part_of(output, GOOD).name])
    part_of(output, GOOD).unlink()
    (output / "manifest.json").unlink()
    assert found(output) == {"incomplete": ["plan.json", "manifest.json"]}
    assert "accounts for 3 of the 4 shards" in said(output, "incomplete")


def test_beside_a_driver_at_work_it_says_so_and_its_half_files_are_not_foreign(output: Path) -> None:
    with Lease(OutputPrefix(str(output))):
        (output / "tokens" / ".a.parquet.0123.tmp").write_bytes(b"half")
        beside = report(output)
    assert beside.running and beside.complete


def test_a_torn_ledger_is_named_once_and_the_parts_are_looked_at_all_the_same(output: Path) -> None:
    (segment, *_) = (output / "ledger").iterdir()
    cut(segment)
    flip(part_of(output, GOOD))
    assert found(output) == {"torn": ["ledger", tokens(output, GOOD)]}
    assert segment.name in said(output, "torn") and "--rebuild-ledger" in said(output, "torn")


def test_bytes_that_come_damaged_once_are_read_again_before_a_part_is_called_torn(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, damaged = storage.read_bytes, set[str]()

    def read_bytes(url: str) -> bytes:
        data = real(url)
        if "/tokens/" not in url or url in damaged:
            return data
        damaged.add(url)
        return data[:50] + bytes([data[50] ^ 1]) + data[51:]

    monkeypatch.setattr(storage, "read_bytes", read_bytes)
    assert report(output).complete and len(damaged) == 4
