"""ONNX files compute what the checkpoint does, for any number of images, and say whose tokens they make."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jobs import export_onnx
from jobs.api import load_tokenizer
from jobs.export_onnx import run_export_onnx
from make_data import write_checkpoint
from model import onnx_export
from model.config import ModelError

pytestmark = pytest.mark.training  # the exporter takes seconds


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("onnx")
    write_checkpoint(folder / "model", size=32)
    assert run_export_onnx(str(folder / "model"), str(folder / "onnx"), as_json=False) == 0
    return folder


def test_tokens_and_pixels_are_ours_for_any_number_of_images(made: Path) -> None:
    import onnxruntime

    tokenizer = load_tokenizer(str(made / "model"), device="cpu")
    encoder, decoder = (onnxruntime.InferenceSession(made / "onnx" / name) for name in ("encoder.onnx", "decoder.onnx"))
    for num_images in (1, 7):
        pixels_BHWC = np.random.default_rng(num_images).integers(0, 256, (num_images, 32, 32, 3), dtype=np.uint8)
        (tokens_BHW,) = encoder.run(None, {"pixels": pixels_BHWC})
        assert tokens_BHW.dtype == np.int32 and len(np.unique(tokens_BHW)) > 1
        assert np.array_equal(tokens_BHW, tokenizer.encode(pixels_BHWC))
        (made_BHWC,) = decoder.run(None, {"tokens": tokens_BHW})
        assert made_BHWC.dtype == np.uint8 and made_BHWC.shape == pixels_BHWC.shape
        assert np.abs(made_BHWC.astype(int) - tokenizer.decode(tokens_BHW)).max() <= 1


def test_each_file_says_whose_tokens_it_makes(made: Path) -> None:
    import onnxruntime

    tokenizer = load_tokenizer(str(made / "model"), device="cpu")
    for path in (made / "onnx").iterdir():
        facts = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
        assert (facts["tokenizer_id"], facts["codebook_size"]) == (tokenizer.tokenizer_id, "64")
        assert json.loads(facts["image_spec"]) == tokenizer.image_spec.to_json()


def test_what_computes_something_else_is_told_with_exit_code_1(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {name: (made / "onnx" / name).read_bytes() for name in ("encoder.onnx", "decoder.onnx")}
    monkeypatch.setattr(export_onnx, "onnx_files", lambda checkpoint: other)
    write_checkpoint(tmp_path / "model", seed=1, size=32)
    assert run_export_onnx(str(tmp_path / "model"), str(tmp_path / "onnx"), as_json=False) == 1
    assert "not the same, so nothing was written" in capsys.readouterr().out
    assert not (tmp_path / "onnx").exists()


def test_without_an_exporter_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_there(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'onnxscript'")

    monkeypatch.setattr(onnx_export.torch.onnx, "export", nothing_there)
    with pytest.raises(ModelError, match=r"'onnxscript'.*pip install 'dvae-ray\[onnx\]'"):
        run_export_onnx(str(write_checkpoint(tmp_path / "model")), str(tmp_path / "onnx"), as_json=False)
    assert not (tmp_path / "onnx").exists()
