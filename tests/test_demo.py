"""The demo: held-out tiles are kept apart, odd files are what they claim, and it checks what it made."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import demo_checks, demo_images, demo_sites
from jobs.checkpoints import TokenizerSource, read_head
from jobs.demo import DemoError, open_folder, run_demo
from jobs.demo_damage import ODD_FILES, bomb_png, make_odd_files
from jobs.demo_images import MARGIN_PX, PHOTOS, TILE_PX, Photo, make_tiles, photograph_folder, tiles_of
from jobs.report_pieces import back_into_pictures, reading_lines
from jobs.tokenize_config import TokenizeConfig
from jobs.train_config import TrainConfig
from model.config import DVAEConfig
from pipeline import storage
from pipeline.images import MAX_PIXELS, ImageSpec, SampleError, decode_image
from pipeline.output import OutputPrefix, RunDescription, claim, part_name
from pipeline.pictures import Box
from pipeline.plan import ShardTask
from pipeline.shard_patterns import expand
from pipeline.token_table import TableSpec
from pipeline.tokenize_shard import TokenizeJob, TokenizeWorker

FEW_PHOTOS = tuple(photo for photo in PHOTOS if photo.name in ("chelsea", "retina"))


@pytest.fixture
def few_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_images, "PHOTOS", FEW_PHOTOS)
    monkeypatch.setattr(demo_images, "STRIDE_PX", 64)


def size_of(photo: Photo) -> tuple[int, int]:
    with Image.open(photograph_folder() / photo.file) as image:
        return image.size


def metadata(folder: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))]


def box_of(tile: dict[str, object]) -> Box:
    x, y, side = (int(str(tile[name])) for name in ("x", "y", "region_px"))
    return x, y, x + side, y + side


def distance(one: Box, other: Box) -> int:
    """Pixels between two boxes along the axis that parts them most; 0 or less where they touch or overlap."""
    return max(one[0] - other[2], other[0] - one[2], one[1] - other[3], other[1] - one[3])


def inside(one: Box, other: Box) -> bool:
    return one[0] >= other[0] and one[1] >= other[1] and one[2] <= other[2] and one[3] <= other[3]


@pytest.mark.parametrize("photo", PHOTOS, ids=lambda photo: photo.name)
def test_no_training_tile_comes_near_a_held_out_one(photo: Photo) -> None:
    width, height = size_of(photo)
    tiles = list(tiles_of(photo, width, height))
    held_out = [tile.box for tile in tiles if tile.split == "heldout"]
    train = [tile.box for tile in tiles if tile.split == "train"]
    assert min(distance(a, b) for a in held_out for b in train) >= MARGIN_PX
    assert all(inside(box, photo.held_out) for box in held_out)
    assert all(inside(box, (0, 0, width, height)) for box in [*train, photo.held_out])
    assert len(held_out) >= 9 and len(train) >= 40


def test_there_are_a_few_thousand_tiles_of_14_photographs() -> None:
    tiles = [tile for photo in PHOTOS for tile in tiles_of(photo, *size_of(photo))]
    assert len(PHOTOS) == 14
    assert 2000 <= len(tiles) <= 6000
    assert len({tile.name for tile in tiles}) == len(tiles)


def test_the_stereo_twin_of_a_photograph_is_not_among_them() -> None:
    assert "motorcycle_right.png" not in {photo.file for photo in PHOTOS}


@pytest.mark.usefixtures("few_tiles")
def test_tiles_on_disk_are_apart_too_by_their_own_metadata(tmp_path: Path) -> None:
    counts = make_tiles(tmp_path)
    held_out, train = metadata(tmp_path / "heldout"), metadata(tmp_path / "train")
    assert (len(train), len(held_out)) == (counts.train, counts.heldout)
    pairs = [(a, b) for a in held_out for b in train if a["source"] == b["source"]]
    assert min(distance(box_of(a), box_of(b)) for a, b in pairs) >= MARGIN_PX


@pytest.mark.usefixtures("few_tiles")
def test_a_tile_is_the_region_that_its_metadata_names_with_a_caption(tmp_path: Path) -> None:
    make_tiles(tmp_path)
    path = next((tmp_path / "heldout" / "chelsea").glob("*.jpg"))
    left, top, right, bottom = box_of(json.loads(path.with_suffix(".json").read_text()))
    region = np.asarray(Image.open(photograph_folder() / "chelsea.png").convert("RGB"))[top:bottom, left:right]
    tile = np.asarray(Image.open(path))
    assert tile.shape == (TILE_PX, TILE_PX, 3)
    assert np.abs(tile.astype(int) - region).mean() < 3  # JPEG
    assert path.with_suffix(".txt").read_text().startswith("a tabby cat: ")


@pytest.mark.usefixtures("few_tiles")
def test_making_the_tiles_again_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_tiles(tmp_path / name)
        make_odd_files(tmp_path / name / "damaged")
    one, two = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("one", "two")
    )
    assert one == two and len(one) > 100


def test_each_odd_file_fails_for_its_own_reason_and_the_cmyk_one_is_a_good_picture(tmp_path: Path) -> None:
    make_odd_files(tmp_path)
    reasons = {}
    for odd in ODD_FILES:
        try:
            decode_image((tmp_path / odd.name).read_bytes(), ImageSpec(size=TILE_PX))
        except SampleError as error:
            reasons[odd.name] = error.reason
    assert reasons == {odd.name: odd.reason for odd in ODD_FILES if odd.reason is not None}
    assert len(set(reasons.values())) == len(reasons)
    assert Image.open(tmp_path / "cmyk.jpg").mode == "CMYK"
    assert (tmp_path / "text.jpg").read_text() == "I am not a picture.\n"


def test_the_bomb_is_tiny_and_declares_more_pixels_than_are_decoded() -> None:
    data = bomb_png()
    assert len(data) < 200
    width, height = (int.from_bytes(data[n : n + 4], "big") for n in (16, 20))
    assert width * height > MAX_PIXELS
    small = Image.open(io.BytesIO(bomb_png(4)))
    small.load()  # the same file with an honest size is a good PNG
    assert small.size == (4, 4)


def test_a_folder_that_is_no_demos_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DemoError, match="no demo's"):
        run_demo(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(DemoError, match="no demo's"):
        open_folder(str(tmp_path / "thesis.txt"))


def test_a_folder_with_someone_elses_demo_json_is_refused(tmp_path: Path) -> None:
    for content in ("not json", '{"kind": "another"}'):
        (tmp_path / "demo.json").write_text(content)
        with pytest.raises(DemoError):
            open_folder(str(tmp_path))
        assert (tmp_path / "demo.json").read_text() == content


def test_a_folder_of_another_version_of_the_demo_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_folder(str(tmp_path / "demo"))
    open_folder(str(tmp_path / "demo"))
    monkeypatch.setattr(demo_images, "STRIDE_PX", 99)
    with pytest.raises(DemoError, match="another version"):
        open_folder(str(tmp_path / "demo"))


def test_a_moved_demo_and_a_folder_that_reads_as_a_pattern_are_refused(tmp_path: Path) -> None:
    open_folder(str(tmp_path / "demo"))
    (tmp_path / "demo").rename(tmp_path / "moved")
    with pytest.raises(DemoError, match="was moved"):
        open_folder(str(tmp_path / "moved"))
    with pytest.raises(DemoError, match="pattern"):
        open_folder(str(tmp_path / "demo{1}"))


def train_nothing(config: TrainConfig, command: str) -> int:
    """Stands in for the training: an untrained model, and a line of metrics."""
    import torch

    from model.checkpoint import checkpoint_files
    from model.dvae import DVAE

    if storage.exists(storage.join(config.output, "metrics.jsonl")):
        return 0
    torch.manual_seed(0)
    small = DVAEConfig(codebook_size=64, width=16, decoder_init=16, blocks_per_group=1, stem="strided")
    spec = replace(config.image).to_json()
    files = checkpoint_files(
        weights=DVAE(small).state_dict(), dvae_config=small, image_spec=spec, step=1, training_state=None, extra={}
    )
    for name, data in files.items():
        storage.publish(storage.join(config.output, "model", name), data)
    line = {"kind": "eval", "step": 1, "psnr_soft": 10.0, "psnr_hard": 9.5}
    storage.publish(storage.join(config.output, "metrics.jsonl"), json.dumps(line).encode())
    return 0


def tokenize_here(config: TokenizeConfig, command: str) -> int:
    """Stands in for the actors: the same shards, worker and output, in this process."""
    head = read_head(config.checkpoint)
    table = TableSpec(head.tokenizer_id, head.grid, head.codebook_size, head.image_spec, config.columns())
    output = OutputPrefix(storage.normalize(config.output))
    claim(output, RunDescription(table, config.options(), {}), accept_numerics=False)
    tokenizer = TokenizerSource(head.url, "cpu", "fp32", batch_size=64, threads=1).load()
    worker = TokenizeWorker(tokenizer, TokenizeJob(output, table, batch_size=64, decode_threads=1))
    for info in expand(config.shards):
        worker.tokenize(ShardTask(info, part_name(info.url)))
    worker.close()
    storage.publish(output.file("manifest.json"), b"{}")
    return 0


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_sites, "run_training", train_nothing)
    monkeypatch.setattr(demo_sites, "run_tokenize", tokenize_here)


@pytest.mark.usefixtures("few_tiles", "without_ray")
def test_the_demo_accounts_for_every_image_and_fails_for_what_does_not_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path / "demo")
    assert run_demo(folder) == 1  # an untrained model does not reach 20 dB
    said = capsys.readouterr().out
    assert "passed  token rows + error rows = images packed" in said
    assert "passed  every damaged file has its own reason, and cmyk is tokenised" in said
    assert "passed  no training tile comes within 16 pixels of a held-out tile: 0 such pairs" in said
    assert "FAILED  held-out tiles come back with at least 20 dB" in said
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "checks failed" in page and "a tabby cat: " in page
    assert Image.open(tmp_path / "demo" / "heldout.png").width > 500
    tiles = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo" / "images").rglob("*.jpg")}
    for name, value in {"LEAST_PSNR_DB": 0, "LEAST_USED_SHARE": 0, "LARGEST_DRIFT_DB": 99}.items():
        monkeypatch.setattr(demo_checks, name, value)
    assert run_demo(folder) == 0
    said = capsys.readouterr().out
    assert said.count("reusing what is there") == 4 and "there already" in said
    assert {path: path.stat().st_mtime_ns for path in tiles} == tiles
    snippets = [*reading_lines(f"{folder}/tokenised"), back_into_pictures(f"{folder}/tokenised", f"{folder}/training")]
    for snippet in snippets[:3]:
        assert snippet.code in said
    for snippet in snippets:
        exec(snippet.code, {})  # a person pastes it as it is


@pytest.mark.usefixtures("few_tiles", "without_ray")
def test_a_lost_row_makes_the_demo_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "demo"
    run_demo(str(folder))
    lost = next((folder / "tokenised" / "tokens").glob("damaged-*"))
    lost.unlink()
    capsys.readouterr()
    monkeypatch.setattr(demo_sites, "run_tokenize", lambda config, command: 0)
    assert run_demo(str(folder)) == 1
    said = capsys.readouterr().out
    assert "FAILED  token rows + error rows = images packed" in said
    assert "FAILED  every damaged file has its own reason" in said


@pytest.mark.usefixtures("few_tiles", "without_ray")
def test_a_half_finished_demo_goes_on(tmp_path: Path) -> None:
    folder, whole = tmp_path / "half", tmp_path / "whole"
    run_demo(str(whole))
    open_folder(str(folder))
    shutil.copytree(whole / "images" / "train", folder / "images" / "train")  # killed among the tiles
    run_demo(str(folder))
    names = [path.name for path in (whole / "shards").glob("*.tar")]
    assert [(folder / "shards" / n).read_bytes() == (whole / "shards" / n).read_bytes() for n in names] == [True] * 3


def test_a_job_that_ends_badly_ends_the_demo_with_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_images, "PHOTOS", FEW_PHOTOS)
    monkeypatch.setattr(demo_images, "STRIDE_PX", 64)
    monkeypatch.setattr(demo_sites, "run_training", lambda config, command: 130)
    assert run_demo(str(tmp_path / "demo")) == 130
    assert not (tmp_path / "demo" / "tokenised").exists()
