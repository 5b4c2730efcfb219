"""Showing tokens: the right originals beside the decoded pictures, and a refusal when the model is another."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs import show
from jobs.checkpoints import CheckpointHead, TokenizerSource
from jobs.contact_sheet import contact_sheet_png, psnr_db
from pipeline.errors import PipelineError, RunMismatch
from pipeline.images import ImageSpec
from pipeline.metadata import MetadataColumn
from pipeline.output import OutputPrefix, RunDescription, claim, part_name
from pipeline.pack import pack
from pipeline.pictures import encode_png
from pipeline.plan import ShardTask
from pipeline.shard_patterns import expand
from pipeline.token_table import TableSpec
from pipeline.tokenize_shard import TokenizeJob, TokenizeWorker

SPEC = ImageSpec(size=16)
COLOURS = {"a": (250, 10, 10), "b": (10, 250, 10), "c": (10, 10, 250), "d": (200, 200, 0)}
GRID = (2, 2)


class QuarterColours:
    """Tokens are the red channel of each quarter, over 8; decoding paints the quarters red."""

    grid, codebook_size, tokenizer_id = GRID, 32, "fake-1"

    def encode(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        return pixels_BHWC[:, 4::8, 4::8, 0] // 8

    def decode(self, tokens_BHW: np.ndarray) -> np.ndarray:
        red = np.repeat(np.repeat(tokens_BHW * 8 + 2, 8, axis=1), 8, axis=2).astype(np.uint8)
        return np.stack([red, 0 * red, 0 * red], axis=-1)


@pytest.fixture
def output(tmp_path: Path) -> str:
    """A finished run over four plain squares and one text file named .png, in shards of three."""
    for name, colour in COLOURS.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.png").write_bytes(encode_png(np.full((16, 16, 3), colour, np.uint8)))
        (tmp_path / "in" / f"{name}.txt").write_text(f"square {name}")
    (tmp_path / "in" / "broken.png").write_text("no image")
    summary = pack(tmp_path / "in", str(tmp_path / "shards"), shard_samples=3)
    table = TableSpec("fake-1", GRID, 32, SPEC.to_json(), (MetadataColumn("caption", "txt", "string"),))
    out = OutputPrefix(str(tmp_path / "out"))
    claim(out, RunDescription(table, {}, {}), accept_numerics=False)
    worker = TokenizeWorker(QuarterColours(), TokenizeJob(out, table, batch_size=2, decode_threads=1))
    for info in expand(summary.shard_urls):
        worker.tokenize(ShardTask(info, part_name(info.url)))
    worker.close()
    return out.url


@pytest.fixture(autouse=True)
def checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    def head(url: str) -> CheckpointHead:
        return CheckpointHead(url, url.removeprefix("checkpoint:"), GRID, 32, SPEC.to_json(), 1)

    monkeypatch.setattr(show, "read_head", head)
    monkeypatch.setattr(TokenizerSource, "load", lambda self: QuarterColours())


def run_show(output: str, png: Path, **options: Any) -> int:
    return show.run_show(output, checkpoint="checkpoint:fake-1", png=str(png), **options)


def picture(png: Path) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png.read_bytes())).convert("RGB"))


def has_colour(pixels_HWC: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((pixels_HWC == np.array(colour, np.uint8)).all(axis=-1).any())


def test_the_sheet_holds_every_original_and_what_its_tokens_decode_to(output: str, tmp_path: Path) -> None:
    assert run_show(output, tmp_path / "sheet.png") == 0
    sheet = picture(tmp_path / "sheet.png")
    for colour in COLOURS.values():
        assert has_colour(sheet, colour)
        assert has_colour(sheet, (colour[0] // 8 * 8 + 2, 0, 0))


def test_only_the_keys_asked_for_are_shown_and_in_that_order(output: str, tmp_path: Path) -> None:
    rows = show.rows_to_show(OutputPrefix(output), ["d", "a"], 16)
    assert [row["key"] for row in rows] == ["d", "a"]
    assert run_show(output, tmp_path / "sheet.png", keys=["d", "a"]) == 0
    assert not has_colour(picture(tmp_path / "sheet.png"), COLOURS["b"])


def test_limit_takes_the_first_rows(output: str) -> None:
    assert [row["key"] for row in show.rows_to_show(OutputPrefix(output), None, 3)] == ["a", "b", "c"]


def test_a_key_without_a_row_is_named_with_its_reason_and_the_exit_code_is_1(
    output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_show(output, tmp_path / "sheet.png", keys=["a", "broken", "nowhere"]) == 1
    said = capsys.readouterr().out
    assert "broken: not_an_image" in said
    assert "nowhere: neither a row nor an error has this key" in said


def test_no_row_at_all_is_an_error_naming_the_keys(output: str, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="no row has the key nowhere"):
        run_show(output, tmp_path / "sheet.png", keys=["nowhere"])


def test_another_model_is_refused_naming_both_ids(output: str, tmp_path: Path) -> None:
    with pytest.raises(RunMismatch, match=r"fake-1, but checkpoint:fake-2 is fake-2"):
        show.run_show(output, checkpoint="checkpoint:fake-2", png=str(tmp_path / "sheet.png"))
    assert not (tmp_path / "sheet.png").exists()


def test_an_output_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"holds no run \(no run\.json\)"):
        run_show(str(tmp_path / "nothing"), tmp_path / "sheet.png")


def test_originals_that_are_gone_are_said_so_and_the_tokens_are_still_shown(
    output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shards" / "images-000000.tar").unlink()
    assert run_show(output, tmp_path / "sheet.png") == 0
    assert "original not reachable" in capsys.readouterr().out
    sheet = picture(tmp_path / "sheet.png")
    assert not has_colour(sheet, COLOURS["a"])
    assert has_colour(sheet, (250, 0, 0))


def test_a_shard_that_changed_is_not_shown_as_the_original(
    output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = tmp_path / "shards" / "images-000000.tar"
    shard.write_bytes(shard.read_bytes() + bytes(512))
    run_show(output, tmp_path / "sheet.png")
    assert "has changed since it was tokenised" in capsys.readouterr().out.replace("\n", " ")


def test_psnr_of_equal_pictures_is_infinite_and_of_opposites_zero() -> None:
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert psnr_db(black, black) == float("inf")
    assert psnr_db(black, white) == 0.0
    assert psnr_db(black, black + 1) == pytest.approx(48.13, abs=0.01)


def test_a_sheet_of_many_columns_and_long_labels_keeps_its_width() -> None:
    pictures = [np.zeros((64, 64, 3), np.uint8)] * 9
    columns = {"original": pictures, "soft": pictures, "from tokens": pictures}
    png = contact_sheet_png(columns, ["a very long caption " * 20] * 9, title="step 100")
    assert Image.open(io.BytesIO(png)).width < 1200
