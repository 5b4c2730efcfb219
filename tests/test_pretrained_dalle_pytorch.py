"""DALLE-pytorch's vae.pt and dalle.pt become checkpoints that tokenise as its class does, or are refused by name."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import plain_discrete_vae as plain
from foreign_files import Calls, archive, decoder, encoder, pickled, saved
from jobs.api import load_tokenizer
from jobs.import_checkpoint import CannotImport, run_import
from model.foreign_file import read_foreign
from model.foreign_names import ForeignFileError
from model.pretrained import Pretrained, read_pretrained
from plain_discrete_vae import SHAPES, Hparams, drawn_weights

PEERS = os.environ.get("DVAE_TEST_PEERS")
SMALL = SHAPES["no blocks"]
WEIGHTS = drawn_weights(SMALL)


def vae_pt(hparams: Hparams = SMALL, weights: dict[str, Tensor] = WEIGHTS, **changes: Any) -> dict[str, Any]:
    return {"hparams": hparams | changes, "weights": weights}


def dalle_pt(hparams: Hparams | None = SMALL, weights: dict[str, Any] = WEIGHTS, **more: Any) -> dict[str, Any]:
    """As train_dalle.py saves it: the transformer, its optimiser and its schedule too."""
    moments = {"step": torch.tensor(5.0), "exp_avg": torch.ones(3).double()}
    return {
        "hparams": {"dim": 8, "depth": 1, "rotary_emb": True, "attn_types": ("full",), "loss_img_weight": 7},
        "vae_params": hparams,
        "epoch": 3,
        "version": "1.6.6",
        "weights": {f"vae.{name}": each for name, each in weights.items()} | {"text_emb.weight": torch.ones(5, 8)},
        "opt_state": {"state": {0: moments}, "param_groups": [{"lr": 3e-4, "betas": (0.9, 0.999), "params": [0]}]},
        "scheduler_state": {"best": float("inf"), "mode": "min", "patience": 10},
        **more,
    }


def read(value: Any, name: str = "my.pt") -> Pretrained:
    return read_pretrained([read_foreign(io.BytesIO(saved(value)), name)])


def doubled() -> list[Any]:
    """2^40 lists in a few hundred bytes."""
    value: list[Any] = []
    for _ in range(40):
        value = [value, value]
    return value


def nested() -> tuple[Any, ...]:
    value: tuple[Any, ...] = ()
    for _ in range(500):
        value = (value,)
    return value


def pixels(size: int) -> np.ndarray:
    random = np.random.default_rng(0)
    return random.integers(0, 256, (3, size // 4, size // 4, 3), dtype=np.uint8).repeat(4, axis=1).repeat(4, axis=2)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_imported_vae_pt_makes_the_tokens_of_its_class(shape: str, tmp_path: Path, one_thread: None) -> None:
    hparams, weights = SHAPES[shape], drawn_weights(SHAPES[shape])
    (tmp_path / "vae.pt").write_bytes(saved({"hparams": hparams, "weights": weights}))
    run_import([str(tmp_path / "vae.pt")], str(tmp_path / "out"), licence=None, as_json=False)
    tokenizer = load_tokenizer(str(tmp_path / "out"), device="cpu", batch_size=2)
    pixels_BHWC = pixels(hparams["image_size"])
    images_BCHW = torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).float() / 255
    tokens_BHW = tokenizer.encode(pixels_BHWC)
    assert np.array_equal(tokens_BHW, plain.logits(weights, hparams, images_BCHW).argmax(dim=1).numpy())
    assert tokenizer.decode(tokens_BHW).shape == pixels_BHWC.shape
    spec = {"size": hparams["image_size"], "resample": "bilinear", "small": "upscale", "version": 1}
    assert tokenizer.image_spec.to_json() == spec
    card = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    assert "DiscreteVAE" in card and "Not stated: the file has none" in card and "bilinear, centre crop" in card
    record = json.loads((tmp_path / "out" / "checkpoint.json").read_text())
    assert record["extra"]["source"]["kind"] == "dalle_pytorch" and "has_decoder" not in record


@pytest.mark.skipif(PEERS is None, reason="DVAE_TEST_PEERS names no folder with dalle-pytorch 1.6.6 and einops")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_file_of_the_real_class_is_imported_exactly(shape: str, tmp_path: Path, one_thread: None) -> None:
    from peer_dalle_pytorch import discrete_vae

    torch.manual_seed(0)
    hparams = {name: value for name, value in SHAPES[shape].items() if name != "channels"}  # as older files
    theirs: Any = discrete_vae(PEERS)(**hparams)
    torch.save({"hparams": hparams, "weights": theirs.state_dict()}, tmp_path / "vae.pt")
    run_import([str(tmp_path / "vae.pt")], str(tmp_path / "out"), licence=None, as_json=False)
    pixels_BHWC = pixels(hparams["image_size"])
    with torch.no_grad():
        expected_BN = theirs.get_codebook_indices(torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).float() / 255)
    tokens_BHW = load_tokenizer(str(tmp_path / "out"), device="cpu", batch_size=2).encode(pixels_BHWC)
    assert np.array_equal(tokens_BHW.reshape(len(pixels_BHWC), -1), expected_BN.numpy())


def test_a_dalle_pt_gives_the_model_of_its_vae_pt() -> None:
    alone, whole = read(vae_pt()), read(dalle_pt())
    assert (alone.config, alone.image_size, alone.kind) == (whole.config, whole.image_size, "dalle_pytorch")
    assert all(torch.equal(alone.weights[name], whole.weights[name]) for name in alone.weights)
    assert alone.weights.keys() == whole.weights.keys() == WEIGHTS.keys()


def test_a_dalle_pt_trained_on_openais_dvae_gives_that() -> None:
    dvae = {f"{side}.{name}": each for side, module in (("enc", encoder()), ("dec", decoder()))
            for name, each in module.state_dict().items()}  # fmt: skip
    found = read(dalle_pt(None, dvae, vae_class_name="OpenAIDiscreteVAE"))
    assert (found.kind, found.image_size, found.has_decoder) == ("openai", None, True)


BAD: dict[str, tuple[Any, str]] = {
    "a tensor is missing": (
        vae_pt(weights={name: each for name, each in WEIGHTS.items() if name != "encoder.1.0.bias"}),
        "the tensor 'encoder.1.0.bias' is missing"),
    "a tensor too many": (vae_pt(weights=WEIGHTS | {"encoder.9.w": torch.ones(1)}), "tensor 'encoder.9.w' is there"),
    "another shape": (vae_pt(hidden_dim=8), "'encoder.0.0.weight' is torch.float32 (12, 3, 4, 4)"),
    "whole numbers": (vae_pt(weights=WEIGHTS | {"codebook.weight": torch.ones(40, 20).int()}), "is int32; weights are"),
    "too many layers": (vae_pt(num_layers=10**9), "say num_layers 1000000000, which its weights cannot be of"),
    "too many blocks": (vae_pt(num_resnet_blocks=10**9), "say num_resnet_blocks 1000000000, which its weights"),
    "too many codes": (vae_pt(num_tokens=1 << 60), "say num_tokens 1152921504606846976, which its weights cannot"),
    "fewer than none": (vae_pt(num_resnet_blocks=-1), "say num_resnet_blocks -1, which its weights cannot be of"),
    "a name for a number": (vae_pt(num_tokens="many"), "codebook_size 'many' must be a whole number"),
    "a tensor for a number": (vae_pt(num_tokens=torch.ones(1)), "its hparams hold a TensorRef as num_tokens"),
    "a list that holds itself twice, and again": (vae_pt(num_tokens=doubled()), "hold a list as num_tokens, which no"),
    "a tuple without an end": (vae_pt(channels=nested()), "hold a tuple as channels, which no DiscreteVAE is made of"),
    "a text without an end": (vae_pt(num_tokens="x" * 5_000_000), "hold a str as num_tokens, which no DiscreteVAE"),
    "OpenAI's in it, but for its tensors": (
        dalle_pt(None, {"enc.blocks.input.w": 1}), "something among its weights is no tensor"),
    "a normalization that is none": (vae_pt(normalization=5), "my.pt: "),
    "hparams of something else": ({"hparams": [1], "weights": WEIGHTS}, "its hparams are no dict of names"),
    "weights that are none": ({"hparams": SMALL, "weights": {"a": 1}}, "something among its weights is no tensor"),
    "a VQGAN": (
        dalle_pt(None, {"model.quantize.w": torch.ones(1)}, vae_class_name="VQGanVAE"),
        "the image tokenizer in it is no DiscreteVAE but a VQGanVAE, which is not read here"),
    "a DALL·E without its tokenizer": (dalle_pt(None, {}), "the image tokenizer in it is no DiscreteVAE"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named(case: str) -> None:
    value, words = BAD[case]
    with pytest.raises(ForeignFileError, match=re.escape(words)) as refusal:
        read(value)
    assert str(refusal.value).startswith("my.pt")


def test_it_is_imported_by_itself() -> None:
    files = [read_foreign(io.BytesIO(saved(each)), f"{n}.pt") for n, each in enumerate((vae_pt(), vae_pt()))]
    with pytest.raises(ForeignFileError, match=r"0\.pt is a whole model of DALLE-pytorch: import it by itself"):
        read_pretrained(files)


def test_an_attack_among_the_hparams_is_refused() -> None:
    data = archive(pickled({"hparams": Calls(os.system, "true"), "weights": {}}))
    with pytest.raises(ForeignFileError, match=r"names '\w+\.system'"):
        read_foreign(io.BytesIO(data), "vae.pt")


def test_an_image_size_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vae.pt").write_bytes(saved(vae_pt(image_size=8192)))
    with pytest.raises(CannotImport, match="images of 8192 pixels cannot be tokenised: size 8192 is not between"):
        run_import([str(tmp_path / "vae.pt")], str(tmp_path / "out"), licence=None, as_json=False)
