"""`dvae verify --sample`: images fetched by their byte ranges and tokenised again say whether the tokens are right."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs.checkpoints import TokenizerSource, file_reader
from jobs.sample_report import SampleReport, SampleSettings
from jobs.tokenize_config import TokenizeConfig
from jobs.verify import Report, verify
from make_data import image_bytes, write_checkpoint
from make_run import part_of, rewrite_part, run_config, tokenize_here, write_shard
from model import losses, quantizer
from model.checkpoint import read_checkpoint
from model.dvae import DVAE
from pipeline import resample, storage, token_table
from pipeline.images import ImageSpec, decode_image
from pipeline.output import OutputPrefix
from pipeline.records import ShardResult, ShardState
from pipeline.resample import Choice, choose

LETTERS = {"a": "++++-+", "b": "+++++++++++", "c": "", "d": "+"}  # 17 images and one that is none
BATCH = 4


def made_run(folder: Path, checkpoint: Path) -> TokenizeConfig:
    config = run_config(checkpoint, folder / "in", folder / "out", max_failed_samples=0.5, batch_size=BATCH)
    source = TokenizerSource(str(checkpoint), "cpu", "fp32", BATCH, 1)
    assert tokenize_here(config, source.load()) == 0
    return config


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TokenizeConfig:
    folder = tmp_path_factory.mktemp("sample")
    for number, (name, good) in enumerate(LETTERS.items()):
        write_shard(folder / "in" / f"{name}.tar", 20 * number, good)
    return made_run(folder, write_checkpoint(folder / "ck"))


@pytest.fixture
def output(made: TokenizeConfig, tmp_path: Path) -> Path:
    return shutil.copytree(made.output, tmp_path / "out")


@pytest.fixture
def own(made: TokenizeConfig, tmp_path: Path) -> TokenizeConfig:
    """A run with shards of its own, which a test may change."""
    for number, name in enumerate("ab"):
        write_shard(tmp_path / "in" / f"{name}.tar", 20 * number, "+++")
    return made_run(tmp_path, Path(made.checkpoint))


def sampled(output: Path | str, checkpoint: str, share: float = 1.0, seed: int = 0) -> Report:
    return verify(OutputPrefix(str(output)), quick=True, sample=SampleSettings(share, checkpoint, seed))


def sample_of(report: Report) -> SampleReport:
    assert report.sample is not None
    return report.sample


def dvae_verify(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "jobs.cli", "verify", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=240, check=False)


def test_right_tokens_are_the_same_in_every_image(made: TokenizeConfig, output: Path) -> None:
    report = sampled(output, made.checkpoint)
    sample = sample_of(report)
    assert (sample.num_chosen, sample.num_compared, sample.num_equal) == (18, 17, 17)
    assert (sample.num_tokens, sample.num_equal_tokens) == (17 * 4, 17 * 4)
    assert (sample.skipped, sample.margins, sample.differing) == ({"failed": 1}, None, ())
    assert report.complete and report.exit_code == 0
    assert sample.numerics == json.loads((output / "run.json").read_text())["numerics"][-1]
    assert sample.numerics["batch_size"] == BATCH


def test_the_command_says_so_with_0_as_a_table_and_as_json(made: TokenizeConfig, output: Path) -> None:
    done = dvae_verify(output, "--sample", "1", "--checkpoint", made.checkpoint)
    assert done.returncode == 0, done.stderr
    assert "17 of 17 compared are the same: 100.0000%" in done.stdout
    assert "68 of 68 compared are the same: 100.0000%" in done.stdout
    assert "1 failed then" in done.stdout
    done = dvae_verify(output, "--sample", "1e-3", "--checkpoint", made.checkpoint, "--json")
    sample = json.loads(done.stdout)["sample"]
    assert done.returncode == 0 and sample["num_compared"] == sample["num_equal"] >= 1 and sample["margins"] is None


def plant(output: Path, shard: str, row: int, position: int) -> tuple[int, int]:
    """Change one token in a part that is right in all else; (the right one, the wrong one)."""
    made: list[tuple[int, int]] = []

    def change(rows: pa.Table) -> pa.Table:
        tokens = rows["tokens"].to_pylist()
        right = tokens[row][position]
        made.append((right, (right + 7) % 64))
        tokens[row][position] = made[0][1]
        column = pa.array(tokens, rows.schema.field("tokens").type)
        return rows.set_column(rows.schema.get_field_index("tokens"), rows.schema.field("tokens"), column)

    rewrite_part(output, shard, change)
    return made[0]


def logits_of(checkpoint: str, seed: int) -> torch.Tensor:
    """(positions, codes) of one image, by the model itself."""
    stored = read_checkpoint(file_reader(checkpoint))
    model = DVAE(stored.dvae_config)
    model.load_state_dict(stored.weights)
    pixels_HWC = decode_image(image_bytes(seed), ImageSpec.from_json(stored.image_spec)).pixels_HWC
    with torch.no_grad():
        z_NC = model.encode(losses.map_pixels(torch.from_numpy(pixels_HWC[None].copy())))
        return quantizer.logits(z_NC, model.tables())


def test_one_wrong_token_is_found_and_how_far_from_a_tie_it_is(made: TokenizeConfig, output: Path) -> None:
    right, wrong = plant(output, "b", row=5, position=3)
    report = sampled(output, made.checkpoint)
    sample = sample_of(report)
    assert (sample.num_compared, sample.num_equal, sample.num_equal_tokens) == (17, 16, 67)
    logits_K = logits_of(made.checkpoint, 25)[3]
    assert int(logits_K.argmax()) == right
    margin = float(logits_K[right] - logits_K[wrong])
    assert sample.margins == pytest.approx((margin,) * 3, abs=1e-4) and margin > 1e-3
    (one,) = sample.differing
    assert (one["key"], one["index"], one["num_tokens"]) == ("img00025", 5, 1)
    assert not [p for p in report.problems if p.kind != "manifest"] and report.exit_code == 1


def test_the_command_names_the_image_with_1(made: TokenizeConfig, output: Path) -> None:
    plant(output, "b", row=5, position=3)
    plant(output, "b", row=6, position=0)
    (output / "manifest.json").unlink()
    done = dvae_verify(output, "--sample", "1", "--checkpoint", made.checkpoint)
    assert done.returncode == 1
    assert "15 of 17 compared are the same" in done.stdout and "66 of 68" in done.stdout
    assert "b.tar img00025: 1 tokens differ, margin up to" in done.stdout and "margin      of differing" in done.stdout


def test_another_models_tokens_differ_with_least_median_and_largest_margin(
    made: TokenizeConfig, output: Path, tmp_path: Path
) -> None:
    """The weights are another model's, and its record claims to be the run's."""
    other = write_checkpoint(tmp_path / "other", seed=1)
    one, two = (read_checkpoint(file_reader(str(path))) for path in (made.checkpoint, other))
    from jobs import verify_sample
    from model.tokenizer import DVAETokenizer

    liar = DVAETokenizer(replace(two, tokenizer_id=one.tokenizer_id), batch_size=BATCH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_sample.TokenizerSource, "load", lambda _: liar)
        sample = sample_of(sampled(output, made.checkpoint))
    assert sample.num_equal < 17 and sample.margins is not None
    least, median, most = sample.margins
    assert 0 < least <= median <= most and most > least


def test_the_checkpoint_of_another_run_is_2_naming_both(made: TokenizeConfig, output: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", seed=1)
    before = storage.list_files(str(output / "ledger"))
    done = dvae_verify(output, "--sample", "1", "--checkpoint", other, "--rebuild-ledger")
    assert storage.list_files(str(output / "ledger")) == before, "it is said before anything is done"
    ids = [read_checkpoint(file_reader(str(path))).tokenizer_id for path in (made.checkpoint, other)]
    assert done.returncode == 2 and all(one in done.stderr for one in ids) and not done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sample", "0.5"], "belong together"),
        (["--checkpoint", "x"], "belong together"),
        (["--sample", "2", "--checkpoint", "x"], "less than or equal to 1"),
        (["--sample", "1", "--checkpoint", "/nothing"], "no checkpoint at /nothing"),
        (["--sample", "1", "--checkpoint", "{ck}", "--device", "abacus"], "device 'abacus' must be"),
    ],
)
def test_what_cannot_be_sampled_is_2(made: TokenizeConfig, output: Path, arguments: list[str], said: str) -> None:
    done = dvae_verify(output, *(one.replace("{ck}", made.checkpoint) for one in arguments))
    assert done.returncode == 2 and said in done.stderr.replace("\n", " "), done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_does_not_say_how_it_computed_is_2(made: TokenizeConfig, output: Path) -> None:
    run = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps({**run, "numerics": [{}]}))
    done = dvae_verify(output, "--sample", "1", "--checkpoint", made.checkpoint)
    assert done.returncode == 2 and "run.json does not say how the tokens were computed" in done.stderr


# What is fetched


def test_only_byte_ranges_and_the_columns_that_are_needed_are_read(
    made: TokenizeConfig, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges: list[tuple[str, int, int]] = []
    columns: list[Any] = []
    real_range, real_table = storage.read_range, token_table.read_table
    monkeypatch.setattr(storage, "read_range", lambda *a: ranges.append(a) or real_range(*a))
    monkeypatch.setattr(storage, "open_read", lambda url: pytest.fail(f"{url} was opened"))
    monkeypatch.setattr(token_table, "read_table", lambda u, c, **o: columns.append(c) or real_table(u, c, **o))
    sampled(output, made.checkpoint)
    of_shards = [(url, start, size) for url, start, size in ranges if url.endswith(".tar")]
    stored = pa.concat_tables(pq.read_table(path) for path in (output / "tokens").iterdir())
    assert sorted(of_shards) == sorted(zip(*(stored[n].to_pylist() for n in ("shard", "offset", "size")), strict=True))
    assert {tuple(one) for one in columns} == {("key", "index", "offset", "size", "tokens")}
    columns.clear()
    one_part = next(seed for seed in range(1000) if len(choose(verify_rows(output), 1e-9, seed)) == 1)
    sampled(output, made.checkpoint, share=1e-9, seed=one_part)
    assert len(columns) == 1, "only parts with a chosen image are opened"


def test_a_compressed_shard_has_no_byte_ranges_and_is_counted(own: TokenizeConfig, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "c.tar.gz").write_bytes(gzip.compress((folder / "a.tar").read_bytes()))
    made_run(tmp_path, Path(own.checkpoint))
    sample = sample_of(sampled(own.output, own.checkpoint))
    assert (sample.num_compared, sample.num_equal, sample.skipped) == (6, 6, {"compressed": 3})


def test_where_nothing_can_be_compared_it_is_1(own: TokenizeConfig, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for path in list(folder.iterdir()):
        path.unlink()
    report = sampled(own.output, own.checkpoint)
    assert sample_of(report).skipped == {"gone": 6}
    assert report.complete and report.exit_code == 1
    done = dvae_verify(own.output, "--sample", "1", "--checkpoint", own.checkpoint)
    assert done.returncode == 1 and "6 in shards that are not there any more" in done.stdout


def test_a_shard_that_changed_since_is_said_and_its_images_are_not_compared(own: TokenizeConfig) -> None:
    path = Path(own.shards[0]) / "a.tar"
    os.utime(path, ns=(1, 1))
    sample = sample_of(sampled(own.output, own.checkpoint))
    assert (sample.num_compared, sample.num_equal, sample.skipped) == (3, 3, {"changed": 3})


def test_an_image_whose_bytes_give_no_pixels_now_is_one_that_differs(own: TokenizeConfig) -> None:
    """Rotten on the disk: the store sees no change."""
    path = Path(own.shards[0]) / "a.tar"
    row = pq.read_table(part_of(Path(own.output), "a")).to_pylist()[1]
    times, data = path.stat(), bytearray(path.read_bytes())
    data[row["offset"] : row["offset"] + row["size"]] = bytes(row["size"])
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    report = sampled(own.output, own.checkpoint)
    sample = sample_of(report)
    assert (sample.num_compared, sample.num_equal, sample.num_equal_tokens) == (6, 5, 20)
    assert sample.differing[0]["key"] == "img00001" and sample.differing[0]["problem"]
    assert report.exit_code == 1


@pytest.mark.server
def test_on_an_object_store_it_is_the_same(made: TokenizeConfig, s3: str) -> None:
    shards, output = f"{s3}/sampled/in", f"{s3}/sampled/out"
    for path in Path(made.shards[0]).iterdir():
        storage.publish(f"{shards}/{path.name}", path.read_bytes())
    config = run_config(Path(made.checkpoint), shards, output, max_failed_samples=0.5, batch_size=BATCH)
    source = TokenizerSource(made.checkpoint, "cpu", "fp32", BATCH, 1)
    assert tokenize_here(config, source.load()) == 0
    for quick in (True, False):
        report = verify(OutputPrefix(output), quick=quick, sample=SampleSettings(1.0, made.checkpoint))
        assert report.exit_code == 0, report.problems
        assert (sample_of(report).num_equal, sample_of(report).skipped) == (17, {"failed": 1})
    storage.publish(f"{shards}/a.tar", storage.read_bytes(f"{shards}/b.tar"))
    assert sample_of(sampled(output, made.checkpoint)).skipped == {"changed": 5, "failed": 1}


def test_of_a_part_that_is_not_right_no_image_is_compared(own: TokenizeConfig) -> None:
    part_of(Path(own.output), "a").write_bytes(b"")
    report = sampled(own.output, own.checkpoint)
    assert sample_of(report).num_compared == 3 and report.exit_code == 1


# The choice


def done_row(shard: str, num_rows: int = 1000, num_failed: int = 0) -> ShardResult:
    return ShardResult(shard, 1, "e", ShardState.DONE, "p.parquet", num_rows, num_failed)


def numbers(choices: list[Choice]) -> dict[str, tuple[int, ...]]:
    return {choice.row.shard: choice.indexes for choice in choices}


def test_the_choice_is_a_function_of_seed_shard_and_index() -> None:
    rows = [done_row(f"s3://b/{n}.tar") for n in range(20)]
    chosen = numbers(choose(rows, 0.05, 3))
    assert numbers(choose(rows[::-1], 0.05, 3)) == chosen
    assert numbers(choose(rows[7:8], 0.05, 3)) == {rows[7].shard: chosen[rows[7].shard]}
    assert numbers(choose(rows, 0.05, 4)) != chosen
    assert 800 < sum(map(len, chosen.values())) < 1200
    wider = numbers(choose([done_row(row.shard, 1500, 10) for row in rows], 0.1, 3))
    assert all(set(indexes) <= set(wider[shard]) for shard, indexes in chosen.items())


def test_the_choice_never_changes() -> None:
    """Who writes down a seed finds the same images again."""
    assert numbers(choose([done_row("s3://b/a.tar", 100)], 0.05, 0)) == {
        "s3://b/a.tar": (7, 14, 15, 46, 49, 82, 83, 94)
    }


def test_at_least_one_is_chosen_where_there_is_one() -> None:
    rows = [done_row("s3://b/a.tar", 0), done_row("s3://b/b.tar", 3)]
    for share in (0.0, 1e-12):
        (choice,) = choose(rows, share, 0)
        assert choice.row.shard == "s3://b/b.tar" and len(choice.indexes) >= 1
    assert choose(rows[:1], 1.0, 0) == []
    assert [len(choice.indexes) for choice in choose(rows, 1.0, 0)] == [3]


def test_one_with_tokens_is_chosen_however_many_failed() -> None:
    rows = [done_row(f"s3://b/{n}.tar", 1, 9) for n in range(4)]
    for seed in range(50):
        assert any(len(choice.indexes) > 9 for choice in choose(rows, 1e-9, seed)), seed


def test_many_images_are_fetched_at_once_and_come_in_order(
    made: TokenizeConfig, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resample, "FETCHERS", 3)
    rows = [row for row in verify_rows(output) if row.num_rows]
    spec = ImageSpec(size=16, small="upscale")
    images = list(resample.fetch(OutputPrefix(str(output)), spec, choose(rows, 1.0, 0)))
    assert [(image.shard, image.index) for image in images] == [
        (row.shard, index) for row in rows for index in range(row.num_rows + row.num_failed)
    ]
    assert all(np.array_equal(image.pixels_HWC.shape, (16, 16, 3)) for image in images if image.pixels_HWC is not None)


def verify_rows(output: Path) -> list[ShardResult]:
    from pipeline.ledger import Ledger

    return sorted(Ledger(OutputPrefix(str(output))).read().values(), key=lambda row: row.shard)
