"""One output prefix, one run: what run.json promises, what is refused, and names of parts that last."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pytest

from make_data import Killed, MortalStore, fake_table
from pipeline import storage
from pipeline.errors import RunMismatch, StorageError
from pipeline.images import ImageSpec
from pipeline.metadata import MetadataColumn
from pipeline.output import OutputPrefix, RunDescription, claim, part_name, read_run
from pipeline.token_table import TableSpec

OPTIONS = {"image_extensions": ["jpg", "png"], "require_end_marker": True}
NUMERICS = {"device": "cpu", "precision": "fp32", "batch_size": 64, "threads": 1}


def run(table: TableSpec | None = None, **changes: Any) -> RunDescription:
    values = {"options": OPTIONS, "numerics": NUMERICS, **changes}
    return RunDescription(table or fake_table(), **values)


def claimed(folder: Path, first: RunDescription | None = None) -> OutputPrefix:
    output = OutputPrefix(str(folder))
    claim(output, first or run(), accept_numerics=False)
    storage.publish(output.part("made.parquet"), b"a run.json with nothing beside it binds nobody")
    return output


def refusal(output: OutputPrefix, other: RunDescription, *, accept_numerics: bool = False) -> str:
    before = storage.read_bytes(output.file("run.json"))
    with pytest.raises(RunMismatch) as raised:
        claim(output, other, accept_numerics=accept_numerics)
    assert storage.read_bytes(output.file("run.json")) == before
    return str(raised.value)


# Names


@pytest.mark.parametrize(
    ("url", "stem"),
    [
        ("s3://bucket/path/images-000017.tar", "images-000017"),
        ("/local/images-000017.tar.gz", "images-000017"),
        ("/local/a.tgz", "a"),
        ("/local/a.b.c.tar", "a.b.c"),
        ("/local/no suffix", "no_suffix"),
        ("/local/ü%3F?.tar", "3F_"),  # a leading underscore would hide it
        ("/local/_hidden.tar", "hidden"),
        ("/local/a.TAR", "a"),
        ("/local/a.Tar.gz", "a"),
        ("/local/.hidden.tar", "hidden"),
        ("/local/日本.tar", "shard"),
        ("/local/.tar", "shard"),
        ("/local/" + "x" * 240 + ".tar", "x" * 100),
        ("https://user:secret@host/a.tar?sig=abc", "a"),
    ],
)
def test_part_names_are_the_shards_own_and_safe_everywhere(url: str, stem: str) -> None:
    name = part_name(url)
    assert re.fullmatch(re.escape(stem) + r"-[0-9a-f]{8}\.parquet", name)
    assert re.fullmatch(r"[A-Za-z0-9-][A-Za-z0-9._-]*", name), "readers of a folder pass over . and _"


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("s3://bucket/a/b.tar", "b.tar"),
        ("https://me:secret@host/a/b.tar?sig=x/y#z/w", "b.tar"),
        ("s3://bucket/a/", "a"),
        ("s3://bucket", ""),
        ("https://host?x=/y", ""),
        ("/local/a#b?c.tar", "a#b?c.tar"),
        ("relative.tar", "relative.tar"),
        ("/", ""),
    ],
)
def test_the_base_name_of_a_url_is_the_last_of_its_path(url: str, name: str) -> None:
    assert storage.base_name(url) == name
    assert PurePosixPath(urlsplit(url).path if "://" in url else url).name == name


def test_part_names_never_change() -> None:
    """They are how a run finds its work again: this test may not be edited."""
    assert part_name("s3://bucket/images-000017.tar") == "images-000017-164446ff.parquet"
    assert part_name("/data/a.tar") == "a-a8509843.parquet"


def test_the_same_name_in_two_folders_gives_two_parts() -> None:
    urls = [f"s3://bucket/{folder}/000.tar" for folder in range(1000)]
    assert len({part_name(url) for url in urls}) == 1000


def test_a_signature_that_changes_does_not_change_the_part() -> None:
    assert (
        part_name("https://h/a.tar?sig=1") == part_name("https://me:pw@h/a.tar?sig=2") == part_name("https://h/a.tar")
    )


# run.json


def test_the_first_claim_writes_what_the_run_is(tmp_path: Path) -> None:
    output = claimed(tmp_path, run(fake_table(columns=(MetadataColumn("caption", "txt"),))))
    assert read_run(output) == {
        "format": 1, "schema_version": 1, "tokenizer_id": "fake", "grid": [2, 2], "codebook_size": 256,
        "image_spec": ImageSpec(size=16).to_json(), "columns": [{"name": "caption", "from": "txt", "type": "string"}],
        "options": OPTIONS, "numerics": [NUMERICS],
    }  # fmt: skip


def test_the_same_run_may_come_back_and_writes_nothing(tmp_path: Path) -> None:
    output = claimed(tmp_path)
    before = (tmp_path / "run.json").stat().st_mtime_ns
    claim(output, run(), accept_numerics=False)
    claim(output, run(), accept_numerics=True)
    assert (tmp_path / "run.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer_id": "other"}, "tokenizer_id is 'fake' there and 'other' here"),
        ({"grid": (4, 1)}, r"grid is \[2, 2\] there and \[4, 1\] here"),
        ({"codebook_size": 512}, "codebook_size is 256 there and 512 here"),
        ({"image_spec": ImageSpec(size=32).to_json()}, "image_spec.size is 16 there and 32 here"),
        ({"image_spec": ImageSpec(16, small="upscale").to_json()}, "image_spec.small is 'refuse' there and 'upscale'"),
        ({"columns": (MetadataColumn("caption", "txt"),)}, r"columns is \[\] there and .*'caption'"),
    ],
)  # fmt: skip
def test_another_model_spec_or_schema_is_refused_naming_field_and_both_values(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    output = claimed(tmp_path)
    for accept_numerics in (False, True):
        message = refusal(output, run(fake_table(**change)), accept_numerics=accept_numerics)
        assert re.search(f"{tmp_path} holds another run: {said}.*choose another output", message)


def test_columns_in_another_order_or_of_another_type_are_another_schema(tmp_path: Path) -> None:
    caption, score = MetadataColumn("caption", "txt"), MetadataColumn("score", "json.s", "float32")
    output = claimed(tmp_path, run(fake_table(columns=(caption, score))))
    for columns in ((score, caption), (caption, MetadataColumn("score", "json.s", "float64")), (caption,)):
        assert "columns is" in refusal(output, run(fake_table(columns=columns)))


def test_other_options_are_refused_by_their_own_name(tmp_path: Path) -> None:
    output = claimed(tmp_path)
    said = refusal(output, run(options={**OPTIONS, "require_end_marker": False}))
    assert "options.require_end_marker is True there and False here" in said
    assert "options.new is None there and 1 here" in refusal(output, run(options={**OPTIONS, "new": 1}))


def test_other_numerics_are_refused_or_accepted_and_recorded(tmp_path: Path) -> None:
    output = claimed(tmp_path)
    other = run(numerics={**NUMERICS, "batch_size": 32})
    message = refusal(output, other)
    assert "numerics.batch_size 64, here it is 32" in message and "accept_numerics=true" in message
    claim(output, other, accept_numerics=True)
    assert (read_run(output) or {})["numerics"] == [NUMERICS, other.numerics]
    claim(output, other, accept_numerics=False)  # both were used: neither is news
    claim(output, run(), accept_numerics=False)
    assert (read_run(output) or {})["numerics"] == [NUMERICS, other.numerics]


def test_parts_that_nobody_knows_the_maker_of_are_not_added_to(tmp_path: Path) -> None:
    storage.publish(str(tmp_path / "tokens" / "a.parquet"), b"x")
    with pytest.raises(RunMismatch, match=r"has parts but no run\.json"):
        claimed(tmp_path)
    assert not (tmp_path / "run.json").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"3", b"null", b"\xff", b'"text"'])
def test_a_damaged_run_json_is_said_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(StorageError, match=r"run\.json is damaged"):
        claimed(tmp_path)


@pytest.mark.parametrize("folder", ["tokens", "errors", "ledger"])
def test_a_start_that_came_to_nothing_binds_nobody_and_one_result_does(tmp_path: Path, folder: str) -> None:
    output = OutputPrefix(str(tmp_path))
    claim(output, run(numerics={**NUMERICS, "device": "cuda"}), accept_numerics=False)
    claim(output, run(fake_table(tokenizer_id="other")), accept_numerics=False)
    assert (read_run(output) or {})["numerics"] == [NUMERICS]
    storage.publish(storage.join(output.url, folder, "x.parquet"), b"x")
    assert "tokenizer_id is 'other' there and 'fake' here" in refusal(output, run())


def test_run_json_of_a_later_format_is_another_run(tmp_path: Path) -> None:
    output = claimed(tmp_path)
    stored = read_run(output) or {}
    (tmp_path / "run.json").write_text(json.dumps({**stored, "format": 2}))
    assert "format is 2 there and 1 here" in refusal(output, run())
    (tmp_path / "run.json").write_text(json.dumps({k: v for k, v in stored.items() if k != "numerics"}))
    claim(output, run(), accept_numerics=True)
    assert (read_run(output) or {})["numerics"] == [NUMERICS]


def test_a_claim_killed_at_any_step_is_made_whole_by_the_next() -> None:
    for kill_before in range(2):
        MortalStore.fresh()
        output = OutputPrefix("mortal://out")
        if kill_before:
            claim(output, run(), accept_numerics=False)
        MortalStore.alive(kill_before=0)
        other = run(numerics={**NUMERICS, "threads": 2})
        with pytest.raises(Killed):
            claim(output, other, accept_numerics=True)
        MortalStore.alive()
        claim(output, other, accept_numerics=True)
        assert other.numerics in (read_run(output) or {})["numerics"]


def test_messages_hold_no_credentials_of_the_output() -> None:
    output = OutputPrefix("memory://user:secret@output-test/out")
    claim(output, run(), accept_numerics=False)
    storage.publish(output.part("made.parquet"), b"x")
    assert "secret" not in refusal(output, run(fake_table(tokenizer_id="other")))
    assert "secret" not in refusal(output, run(numerics={}))


def test_there_is_no_run_until_one_is_claimed(tmp_path: Path) -> None:
    assert read_run(OutputPrefix(str(tmp_path))) is None
    assert read_run(OutputPrefix("memory://output-test/nothing")) is None


@pytest.mark.parametrize("there_before", [True, False])
def test_a_run_json_that_another_driver_writes_at_that_moment_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there_before: bool
) -> None:
    output, real = OutputPrefix(str(tmp_path)), storage.read_bytes
    if there_before:
        storage.publish(output.file("run.json"), b"{}")

    reads: list[str] = []

    def read_bytes(url: str) -> bytes:
        reads.append(url)
        try:
            return real(url)
        finally:
            if len(reads) == 1:  # what was checked is no longer what is there
                storage.publish(url, b'{"of": "the other driver"}')

    with monkeypatch.context() as patch:
        patch.setattr(storage, "read_bytes", read_bytes)
        with pytest.raises(RunMismatch, match="at the same moment; run again"):
            claim(output, run(), accept_numerics=False)
    assert real(output.file("run.json")) == b'{"of": "the other driver"}'
