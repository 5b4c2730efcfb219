"""`dvae parity`: what each variant costs and moves, on the images of real shards; and two checkpoints side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.api import load_tokenizer
from jobs.parity import NotComparable, ParitySettings, Variant, measure
from jobs.parity_images import NoImages, choose_images
from jobs.parity_report import run_parity
from make_data import image_bytes, tar_bytes, write_checkpoint, write_shards
from model.checkpoint import checkpoint_files, read_checkpoint
from model.config import ModelError
from pipeline.errors import NoShardsMatched
from pipeline.images import ImageSpec
from pipeline.shard_patterns import expand

SPEC = ImageSpec(size=16, small="upscale")
SETTINGS = ParitySettings(num_images=12, batch_size=4, device="cpu", compile=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("parity")
    write_shards(folder / "shards", (9, 9))
    return str(write_checkpoint(folder / "model")), str(folder / "shards")


def test_fp32_agrees_with_itself_and_bf16_differs_by_small_margins_only(made):
    report = measure(made[0], [made[1]], SETTINGS)
    fp32, bf16 = (variant.agreement for variant in report.variants)
    assert report.num_images == 12 and report.device.startswith("cpu: ")
    assert (fp32.num_tokens, fp32.num_differing, fp32.share, fp32.margins) == (48, 0, 1.0, None)
    assert (fp32.num_same_images, fp32.images) == (12, ())
    assert bf16.share == pytest.approx(1 - bf16.num_differing / 48) and bf16.share > 0.5
    assert (bf16.margins is None) == (bf16.num_differing == 0)
    assert all(variant.images_per_s > 0 for variant in report.variants)


def with_swapped_codes(made, folder, one, other):
    """The same model, but for two codes that have each other's number."""
    found = read_checkpoint(lambda name: (Path(made[0]) / name).read_bytes())
    weights, rows = dict(found.weights), torch.arange(64)
    rows[[one, other]] = rows[[other, one]]
    for name in ("encoder.blocks.output.conv.w", "encoder.blocks.output.conv.b"):
        weights[name] = weights[name][rows]
    kept = {"dvae_config": found.dvae_config, "image_spec": found.image_spec, "extra": {}}
    files = checkpoint_files(weights=weights, step=0, training_state=None, **kept)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return str(folder)


def test_another_checkpoint_is_compared_image_by_image(made, tmp_path):
    images = choose_images(expand([made[1]]), [SPEC], SETTINGS.num_images)
    tokens_BN = load_tokenizer(made[0], device="cpu").encode(images.pixels[SPEC]).reshape(12, -1)
    often, seldom = int(np.bincount(tokens_BN.ravel()).argmax()), min(set(range(64)) - set(tokens_BN.ravel().tolist()))
    other = with_swapped_codes(made, tmp_path, often, seldom)
    report = measure(made[0], [made[1]], replace(SETTINGS, against=other))
    assert report.against.url == other and report.against.tokenizer_id != report.head.tokenizer_id
    found, differing_B = report.variants[0].agreement, (tokens_BN == often).sum(axis=1)
    assert (found.num_differing, found.num_same_images) == (differing_B.sum(), (differing_B == 0).sum())
    expected = {name: count for name, count in zip(images.names, differing_B, strict=True) if count}
    assert {(image.shard, image.key): image.num_differing for image in found.images} == expected
    assert found.images[0].num_differing == max(differing_B) and found.margins[0] > 0
    assert measure(made[0], [made[1]], replace(SETTINGS, against=made[0])).variants[0].agreement.share == 1.0


def test_the_worst_images_are_named(made, tmp_path, capsys):
    pixels_BHWC = choose_images(expand([made[1]]), [SPEC], 1).pixels[SPEC]
    token = int(load_tokenizer(made[0], device="cpu").encode(pixels_BHWC)[0, 0, 0])
    other = with_swapped_codes(made, tmp_path, token, (token + 1) % 64)
    assert run_parity(made[0], [made[1]], replace(SETTINGS, against=other), as_json=False) == 0
    said = capsys.readouterr().out
    assert f"({other})" in said and "of 4 tokens otherwise, by margins of up to" in said


def test_checkpoints_with_other_grids_or_codes_are_not_compared(made, tmp_path):
    wider = str(write_checkpoint(tmp_path, size=32))
    with pytest.raises(NotComparable, match=r"2×2 tokens of 64 codes, .* makes 4×4 tokens of 64 codes"):
        measure(made[0], [made[1]], replace(SETTINGS, against=wider))


def test_the_table_and_the_json_tell_the_same(made, capsys):
    assert run_parity(made[0], [made[1]], SETTINGS, as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert [variant["precision"] for variant in told["variants"]] == ["fp32", "bf16"]
    assert told["variants"][0]["agreement"]["share"] == 1.0 and told["against"] is None
    assert run_parity(made[0], [made[1]], SETTINGS, as_json=False) == 0
    out = capsys.readouterr().out
    assert told["tokenizer_id"] in out and told["device"] in out and "100.0000%" in out and "12 of 12" in out


def test_a_variant_that_cannot_be_had_is_named_and_the_others_are_told(made, monkeypatch, capsys):
    def no_compiler(*_: object, **__: object) -> object:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr("torch.compile", lambda *_, **__: no_compiler)
    settings = ParitySettings(num_images=4, batch_size=4, device="cpu")
    report = measure(made[0], [made[1]], settings)
    assert [v.problem is None for v in report.variants] == [True, True, False, False]
    assert report.variants[2] == Variant("fp32", True, problem=report.variants[2].problem)
    assert "C++ compiler" in report.variants[2].problem and "compile=false" in report.variants[2].problem
    run_parity(made[0], [made[1]], settings, as_json=False)
    assert "not here" in capsys.readouterr().out


def test_images_come_from_several_shards_and_bad_ones_are_passed_over(tmp_path):
    for number in range(3):
        members = [("bad.jpg", b"no image"), *((f"{n}.jpg", image_bytes(10 * number + n)) for n in range(5 - number))]
        (tmp_path / f"{number}.tar").write_bytes(tar_bytes(members))
    small, shards = ImageSpec(size=16), expand([str(tmp_path)])
    found = choose_images(shards, [small], 6)
    assert len(found.names) == len(set(found.names)) == 6 and not any(key == "bad" for _, key in found.names)
    assert len(np.unique(found.pixels[small].reshape(6, -1), axis=0)) == 6
    assert len(choose_images(shards, [small, ImageSpec(size=8)], 100).pixels[ImageSpec(size=8)]) == 12
    with pytest.raises(NoImages, match="name other shards"):
        choose_images(shards, [small, ImageSpec(size=64)], 6)


@pytest.mark.parametrize(
    ("shards", "device", "error", "words"),
    [("nowhere/*.tar", "cpu", NoShardsMatched, "nowhere"), (None, "abacus", ModelError, "abacus")],
)
def test_what_is_not_there_is_said(made, shards, device, error, words):
    with pytest.raises(error, match=words):
        measure(made[0], [shards or made[1]], ParitySettings(num_images=4, device=device))
