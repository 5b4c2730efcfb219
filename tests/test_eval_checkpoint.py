"""`dvae eval`: training's own figures again, from the shards alone; what is reported, and what cannot start."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from jobs.api import load_tokenizer
from jobs.checkpoints import CheckpointNotFound
from jobs.eval_checkpoint import EvalSettings, NothingToEvaluate, WeightsMissing, evaluate
from jobs.eval_report import run_eval, to_json, to_markdown
from jobs.train_dvae import run_training
from jobs.train_output import TrainOutput
from make_data import image_bytes, tar_bytes
from make_training import config, metric_lines, write_training_data
from model.checkpoint import checkpoint_files, read_checkpoint
from model.config import DVAEConfig, ModelError
from model.dvae import seeded_dvae
from pipeline.errors import NoShardsMatched, ShardError

pytestmark = pytest.mark.training
SPEC = {"size": 16, "resample": "lanczos", "small": "upscale", "version": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    write_training_data(folder)
    assert run_training(config(folder, license="cc-by-4.0"), "dvae train") == 0
    return folder


@pytest.fixture(scope="module")
def untold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that does not say how it was trained."""
    folder = tmp_path_factory.mktemp("untold")
    shape = DVAEConfig(codebook_size=32, width=8, decoder_init=8, blocks_per_group=1, stem="strided")
    files = checkpoint_files(
        weights=seeded_dvae(shape, 0).state_dict(),
        dvae_config=shape,
        image_spec=SPEC,
        step=0,
        training_state=None,
        extra={},
    )
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_its_figures_are_those_of_the_last_evaluation_of_training(folder: Path) -> None:
    last = next(line for line in reversed(metric_lines(folder / "out")) if line["kind"] == "eval")
    found = evaluate(str(folder / "out"), [str(folder / "val")], EvalSettings(num_images=6, batch_size=4))
    assert (found.num_images, found.temperature) == (6, 0.5)
    for name, value in found.figures.items():
        if name in last:
            assert value == pytest.approx(last[name], rel=1e-9), name
    assert {"psnr_hard", "ssim_hard", "psnr_soft", "used_share"} <= found.figures.keys() & last.keys()


def test_bits_are_of_the_tokens_that_the_tokenizer_makes(folder: Path) -> None:
    found = evaluate(str(folder / "out"), [str(folder / "val")], EvalSettings())
    assert (found.num_images, found.num_bad_images) == (7, 0)
    tokens_BHW = load_tokenizer(str(folder / "out")).encode([image_bytes_of(folder, n) for n in range(7)])
    counts_K = np.bincount(tokens_BHW.ravel(), minlength=32)
    assert np.array_equal(found.histogram_K, counts_K)
    shares = counts_K[counts_K > 0] / counts_K.sum()
    assert found.figures["bits_per_image"] == pytest.approx(-4 * (shares * np.log2(shares)).sum())
    assert found.figures["raw_bits_per_image"] == 4 * 5


def image_bytes_of(folder: Path, number: int) -> bytes:
    from pipeline.records import ObjectInfo
    from pipeline.shards import read_samples

    (shard,) = (folder / "val").iterdir()
    samples = list(read_samples(ObjectInfo(str(shard), shard.stat().st_size, "")))
    image = samples[number].image
    assert image is not None
    return image


def test_a_folder_gets_json_markdown_and_pictures_and_the_checkpoint_its_card(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, shards = tmp_path / "report", [str(folder / "val")]
    TrainOutput(str(folder / "out")).write_metrics(
        {"kind": "health", "step": step, "findings": [{"name": "x", "text": words}]}
        for step, words in ((9, "the codes are dying"), (99, "of later steps"))
    )
    assert run_eval(str(folder / "out"), shards, EvalSettings(), output=str(out), card=True) == 0
    said = capsys.readouterr().out
    report = json.loads((out / "eval.json").read_text())
    assert report["num_images"] == 7 and f"{report['figures']['psnr_hard']:.2f} dB" in said
    assert f"| PSNR from tokens | {report['figures']['psnr_hard']:.2f} dB |" in (out / "eval.md").read_text()
    assert np.asarray(Image.open(out / "reconstructions.png")).shape == (7 * 20, 3 * 20, 3)
    assert Image.open(out / "codes.png").format == "PNG"
    card = (folder / "out" / "model" / "MODEL_CARD.md").read_text()
    assert f"{report['figures']['psnr_hard']:.2f} dB" in card and "cc-by-4.0" in card
    assert "At the last evaluation: the codes are dying" in card and "of later steps" not in card
    for missing in ("no LPIPS", "--lpips-weights", "no rFID", "--fid-weights", "nothing is downloaded"):
        assert missing in said
    read_checkpoint(lambda name: (folder / "out" / "model" / name).read_bytes())


def test_one_file_is_written_by_its_ending_and_json_is_printed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = [str(folder / "val")]
    assert run_eval(str(folder / "out"), shards, EvalSettings(num_images=2), output=str(tmp_path / "a.md")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.md"]
    capsys.readouterr()
    assert run_eval(str(folder / "out"), shards, EvalSettings(num_images=2), as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 2


def test_a_checkpoint_that_does_not_say_its_temperature_has_no_soft_figures(untold: Path, folder: Path) -> None:
    found = evaluate(str(untold), [str(folder / "val")], EvalSettings())
    assert not {"psnr_soft", "ssim_soft", "nats_per_value"} & found.figures.keys()
    assert found.figures["psnr_hard"] > 0 and found.picture_HWC.shape == (7 * 20, 2 * 20, 3)
    assert "does not say its temperature" in to_markdown(found)


def test_bad_images_are_counted_by_reason_and_a_cut_shard_is_an_error(untold: Path, tmp_path: Path) -> None:
    members = [("a.jpg", image_bytes(1)), ("b.jpg", b"no image"), ("c.jpg", image_bytes(2))]
    whole = tmp_path / "mixed.tar"
    whole.write_bytes(tar_bytes(members))
    found = evaluate(str(untold), [str(whole)], EvalSettings())
    assert (found.num_images, found.num_bad_images, dict(found.bad_by_reason)) == (2, 1, {"not_an_image": 1})
    assert "1 images could not be used and are in no figure: 1 not_an_image" in " ".join(to_json(found)["notes"])
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:1024])
    with pytest.raises(ShardError, match=r"cut\.tar"):
        evaluate(str(untold), [str(tmp_path / "cut.tar")], EvalSettings())


def test_what_cannot_start_is_said_with_exit_code_2(untold: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(tar_bytes([("a.jpg", b"no image")]))
    shards, weights = [str(folder / "val")], tmp_path / "other.safetensors"
    save_file({"w": seeded_dvae(DVAEConfig(width=8), 0).encoder.output.w.data}, weights)
    cases: list[tuple[type[Exception], str, str, list[str], dict[str, Any]]] = [
        (CheckpointNotFound, "no checkpoint", str(tmp_path), shards, {}),
        (NoShardsMatched, "nowhere", str(untold), [str(tmp_path / "nowhere-*.tar")], {}),
        (NothingToEvaluate, "not one of 1 images", str(untold), [str(tmp_path / "bad.tar")], {}),
        (WeightsMissing, "none.pth", str(untold), shards, {"lpips_weights": str(tmp_path / "none.pth")}),
        (ModelError, "neither torchvision's AlexNet", str(untold), shards, {"lpips_weights": str(weights)}),
        (ModelError, "Conv2d_1a_3x3.*pytorch-fid", str(untold), shards, {"fid_weights": str(weights)}),
        (ModelError, "not a file of weights", str(untold), shards, {"fid_weights": str(tmp_path / "bad.tar")}),
        (ModelError, "precision 'fp8'", str(untold), shards, {"precision": "fp8"}),
    ]  # fmt: skip
    for kind, words, checkpoint, patterns, settings in cases:
        with pytest.raises(kind, match=words) as error:
            evaluate(checkpoint, patterns, EvalSettings(**settings))
        assert getattr(error.value, "exit_code", 2) == 2


def test_perplexity_and_bits_agree(untold: Path, folder: Path) -> None:
    figures = evaluate(str(untold), [str(folder / "val")], EvalSettings()).figures
    assert figures["code_entropy_bits"] == pytest.approx(math.log2(figures["perplexity"]))
