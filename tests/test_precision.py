"""`dvae precision`: what each variant costs and moves, on the images of real shards."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jobs.precision import NoImages, PrecisionSettings, Variant, measure, run_precision, sample_pixels
from make_data import image_bytes, tar_bytes, write_checkpoint, write_shards
from model.config import ModelError
from pipeline.errors import NoShardsMatched
from pipeline.images import ImageSpec
from pipeline.shard_patterns import expand

SETTINGS = PrecisionSettings(num_images=12, batch_size=4, device="cpu", compile=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("precision")
    write_shards(folder / "shards", (9, 9))
    return str(write_checkpoint(folder / "model")), str(folder / "shards")


def test_fp32_agrees_with_itself_and_bf16_differs_by_small_margins_only(made):
    report = measure(made[0], [made[1]], SETTINGS)
    fp32, bf16 = report.variants
    assert (report.num_images, report.num_tokens) == (12, 48) and report.device.startswith("cpu: ")
    assert (fp32.precision, fp32.num_differing, fp32.agreement, fp32.margins) == ("fp32", 0, 1.0, None)
    assert (
        bf16.precision == "bf16"
        and bf16.agreement == pytest.approx(1 - bf16.num_differing / 48)
        and bf16.agreement > 0.5
    )
    assert (bf16.margins is None) == (bf16.num_differing == 0)
    assert fp32.images_per_s > 0 and bf16.images_per_s > 0


def test_the_table_and_the_json_tell_the_same(made, capsys):
    assert run_precision(made[0], [made[1]], SETTINGS, as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert [variant["precision"] for variant in told["variants"]] == ["fp32", "bf16"]
    assert run_precision(made[0], [made[1]], SETTINGS, as_json=False) == 0
    out = capsys.readouterr().out
    assert told["tokenizer_id"] in out and told["device"] in out and "100.0000%" in out


def test_a_variant_that_cannot_be_had_is_named_and_the_others_are_told(made, monkeypatch, capsys):
    def no_compiler(*_: object, **__: object) -> object:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr("torch.compile", lambda *_, **__: no_compiler)
    settings = PrecisionSettings(num_images=4, batch_size=4, device="cpu")
    report = measure(made[0], [made[1]], settings)
    assert [v.problem is None for v in report.variants] == [True, True, False, False]
    assert report.variants[2] == Variant("fp32", True, problem=report.variants[2].problem)
    assert "C++ compiler" in report.variants[2].problem and "compile=false" in report.variants[2].problem
    run_precision(made[0], [made[1]], settings, as_json=False)
    assert "not here" in capsys.readouterr().out


def test_images_come_from_several_shards_and_bad_ones_are_passed_over(tmp_path):
    for number in range(3):
        members = [("bad.jpg", b"no image"), *((f"{n}.jpg", image_bytes(10 * number + n)) for n in range(5 - number))]
        (tmp_path / f"{number}.tar").write_bytes(tar_bytes(members))
    spec, shards = ImageSpec(size=16), expand([str(tmp_path)])
    assert len(sample_pixels(shards, spec, 6)) == 6
    assert len(np.unique(sample_pixels(shards, spec, 6).reshape(6, -1), axis=0)) == 6
    assert len(sample_pixels(shards, spec, 100)) == 12
    with pytest.raises(NoImages, match="name other shards"):
        sample_pixels(shards, ImageSpec(size=64), 6)


@pytest.mark.parametrize(
    ("shards", "device", "error", "words"),
    [("nowhere/*.tar", "cpu", NoShardsMatched, "nowhere"), (None, "abacus", ModelError, "abacus")],
)
def test_what_is_not_there_is_said(made, shards, device, error, words):
    with pytest.raises(error, match=words):
        measure(made[0], [shards or made[1]], PrecisionSettings(num_images=4, device=device))
