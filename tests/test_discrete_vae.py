"""DALLE-pytorch's DiscreteVAE gives here what it gives there, and lives behind the same protocol as DALL·E's dVAE.

With DVAE_TEST_PEERS=FOLDER, made by `pip install --no-deps --target FOLDER dalle-pytorch==1.6.6 einops`, the real class
is asked too; without it, formulas that were held against it.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import plain_discrete_vae as plain
from jobs.export_vae import FileIsThere, run_export_vae
from model import losses, quantizer
from model.checkpoint import Checkpoint, CheckpointError, checkpoint_files, read_checkpoint, tokenizer_id
from model.config import DiscreteVAEConfig, DVAEConfig, LossConfig, ModelError, model_config
from model.discrete_vae import DiscreteVAE, from_hparams, to_hparams, vae_pt
from model.tokenizer import DVAETokenizer
from plain_discrete_vae import SHAPES, Hparams
from test_golden_tokens import GOLDEN, IMAGES, LEAST_MARGIN

pytestmark = pytest.mark.usefixtures("one_thread")

PEERS = os.environ.get("DVAE_TEST_PEERS")
needs_peer = pytest.mark.skipif(PEERS is None, reason="DVAE_TEST_PEERS names no folder with dalle-pytorch 1.6.6")
shapes = pytest.mark.parametrize("shape", SHAPES)
LEVEL = 1 / 255
TOKENIZER_ID = "23b65382102a353cb5d65c13e5250e72"
TOKENS = "80a019af9ca08d8e"  # the beginning of their sha256


def made(shape: str) -> tuple[DiscreteVAE, dict[str, Tensor], Hparams]:
    hparams = SHAPES[shape]
    config, weights, _ = from_hparams(hparams, plain.drawn_weights(hparams))
    model = DiscreteVAE(config)
    model.load_state_dict(weights)
    return model.requires_grad_(False), weights, hparams


def checkpoint_of(shape: str, **spec: Any) -> Checkpoint:
    hparams = SHAPES[shape]
    config, weights, size = from_hparams(hparams, plain.drawn_weights(hparams))
    return read_checkpoint(files_of(config, weights, {"size": size, **spec}).__getitem__)


def files_of(config: Any, weights: dict[str, Tensor], spec: dict[str, Any]) -> dict[str, bytes]:
    return checkpoint_files(weights=weights, dvae_config=config, image_spec=spec, step=0, training_state=None, extra={})


def pixels(size: int, num: int = 6) -> NDArray[np.uint8]:
    """Noise, coarse and fine, and what is all black and all white."""
    rng = np.random.default_rng(size)
    fine = rng.integers(0, 256, (num - 4, size, size, 3), dtype=np.uint8)
    coarse = rng.integers(0, 256, (2, size // 8, size // 8, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    flat = np.stack([np.zeros_like(fine[0]), np.full_like(fine[0], 255)])
    return np.concatenate([fine, coarse, flat])


def as_images(pixels_BHWC: NDArray[np.uint8]) -> Tensor:
    """As torchvision's ToTensor."""
    return torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).contiguous().float().div(255)


def expect_same(model: DiscreteVAE, size: int, logits_BKHW: Tensor, decoded_BCHW: Tensor) -> None:
    """Logits to 1e-5 of the largest, tokens all equal, decoded pixels to rounding."""
    f = model.config.downsample
    x_BCHW = model.map_pixels(torch.from_numpy(pixels(size)))
    found_NK = quantizer.logits(model.encode(x_BCHW), model.tables())
    expected_NK = logits_BKHW.permute(0, 2, 3, 1).flatten(0, 2)
    assert float((found_NK - expected_NK).abs().max()) < 1e-5 * float(expected_NK.abs().max())
    tokens_N = expected_NK.argmax(dim=1)
    assert torch.equal(found_NK.argmax(dim=1), tokens_N) and len(tokens_N.unique()) >= 8
    stats_BCHW = model.decode_tokens(tokens_N, (len(x_BCHW), size // f, size // f))
    assert torch.allclose(stats_BCHW, decoded_BCHW, rtol=1e-5, atol=1e-5)


# What it computes


@shapes
def test_it_gives_the_logits_tokens_and_pixels_of_the_formulas(shape: str) -> None:
    model, weights, hparams = made(shape)
    logits_BKHW = plain.logits(weights, hparams, as_images(pixels(hparams["image_size"])))
    decoded_BCHW = plain.decoded(weights, hparams, logits_BKHW.argmax(dim=1))
    expect_same(model, hparams["image_size"], logits_BKHW, decoded_BCHW)


@needs_peer
@shapes
def test_it_gives_the_logits_tokens_and_pixels_of_the_real_class(shape: str) -> None:
    from peer_dalle_pytorch import discrete_vae

    model, weights, hparams = made(shape)
    theirs: Any = discrete_vae(PEERS)(**hparams)
    theirs.load_state_dict(weights)
    assert list(theirs.state_dict()) == list(model.state_dict()) == list(weights)
    images_BCHW = as_images(pixels(hparams["image_size"]))
    with torch.no_grad():
        assert torch.equal(theirs.norm(images_BCHW), model.map_pixels(torch.from_numpy(pixels(hparams["image_size"]))))
        logits_BKHW, tokens_BN = theirs(images_BCHW, return_logits=True), theirs.get_codebook_indices(images_BCHW)
        expect_same(model, hparams["image_size"], logits_BKHW, theirs.decode(tokens_BN))
    tokenizer = DVAETokenizer(checkpoint_of(shape), device="cpu", batch_size=4)
    tokens_BHW = tokenizer.encode(pixels(hparams["image_size"]))
    assert np.array_equal(tokens_BHW.reshape(len(tokens_BHW), -1), tokens_BN.numpy())


@needs_peer
def test_its_normalisation_is_that_of_the_real_class_for_each_colour_too() -> None:
    from peer_dalle_pytorch import discrete_vae

    hparams = {**SHAPES["no blocks"], "normalization": ((0.485, 0.456, 0.406, 0), (0.229, 0.224, 0.225, 1))}
    theirs: Any = discrete_vae(PEERS)(**hparams)
    config, weights, _ = from_hparams(hparams, theirs.state_dict())
    x_BCHW = DiscreteVAE(config).map_pixels(torch.from_numpy(pixels(16)))
    assert torch.equal(x_BCHW, theirs.norm(as_images(pixels(16))))
    again: Any = discrete_vae(PEERS)(**to_hparams(config, 16))
    again.load_state_dict(weights)
    assert again.normalization == config.normalization


@shapes
def test_a_checkpoint_tokenises_and_decodes_whatever_the_batch(shape: str) -> None:
    _, weights, hparams = made(shape)
    checkpoint, size = checkpoint_of(shape), hparams["image_size"]
    tokenizer, alone = (DVAETokenizer(checkpoint, device="cpu", batch_size=each) for each in (4, 1))
    tokens_BHW = tokenizer.encode(pixels(size))
    expected_BHW = plain.logits(weights, hparams, as_images(pixels(size))).argmax(dim=1)
    side = size // 2 ** hparams["num_layers"]
    assert (tokenizer.grid, tokenizer.codebook_size) == ((side, side), hparams["num_tokens"])
    assert np.array_equal(tokens_BHW, expected_BHW.numpy())
    assert np.array_equal(tokens_BHW, alone.encode(pixels(size)))
    assert not tokenizer.margins(pixels(size), tokens_BHW).any()
    wanted_BCHW = (plain.decoded(weights, hparams, expected_BHW) * 0.5 + 0.5).clamp(0, 1)
    made_BHWC = torch.from_numpy(tokenizer.decode(tokens_BHW)).float() / 255
    assert float((made_BHWC.permute(0, 3, 1, 2) - wanted_BCHW).abs().max()) <= 0.51 * LEVEL


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_encoder_gives_nearly_the_same_tokens(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from functools import partial

    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="aot_eager"))
    checkpoint = checkpoint_of("two blocks")
    plainly, compiled = (
        DVAETokenizer(checkpoint, device="cpu", batch_size=4, precision=each, compile=each == precision).encode(
            pixels(32)
        )
        for each in ("fp32", precision)
    )
    assert (plainly == compiled).mean() > 0.9


def test_every_pixel_level_survives_mapping_and_unmapping() -> None:
    levels_BHWC = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    for normalization in (DiscreteVAEConfig.normalization, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))):
        model = DiscreteVAE(DiscreteVAEConfig(num_layers=1, hidden_dim=1, codebook_dim=1, normalization=normalization))
        x_BCHW = model.map_pixels(levels_BHWC)
        assert torch.equal(losses.to_uint8(model.unmap_pixels(x_BCHW)), levels_BHWC)
        assert torch.equal(model.map_pixels(levels_BHWC, out=torch.empty(1, 16, 16, 3)), x_BCHW)


def test_its_squared_error_is_that_of_its_authors() -> None:
    """F.mse_loss(normalised pixels, what the decoder gives), and no nats where there are no log-scales."""
    model, x_BCHW, stats_BCHW = made("no blocks")[0], torch.rand(3, 3, 16, 16) * 2 - 1, torch.randn(3, 3, 16, 16)
    parts = losses.loss_parts(stats_BCHW, x_BCHW, torch.zeros(48), 0.0, LossConfig("l2"), model.expected)
    assert float(parts.loss) == pytest.approx(float(F.mse_loss(x_BCHW, stats_BCHW)), rel=1e-5)
    parts = losses.loss_parts(stats_BCHW, x_BCHW, torch.zeros(48), 0.0, LossConfig("l1"), model.expected)
    assert float(parts.loss) == pytest.approx(float(F.l1_loss(x_BCHW, stats_BCHW)), rel=1e-5)


def test_new_weights_begin_as_torchs_layers_do_and_depend_on_the_seed_alone() -> None:
    config = DiscreteVAEConfig(codebook_size=512, hidden_dim=32, codebook_dim=64)
    one, same, other = (DiscreteVAE(config) for _ in range(3))
    torch.manual_seed(1)
    usual = DiscreteVAE(config)
    for model, seed in ((one, 1), (same, 1), (other, 2)):
        model.reset_parameters(seed)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name])
        assert not torch.equal(tensor, other.state_dict()[name])
        if name.endswith("weight"):
            assert float(tensor.std()) == pytest.approx(float(usual.state_dict()[name].std()), rel=0.15)


# Its identity


def _id(change: str | None = None, **fields: Any) -> str:
    config, weights, _ = from_hparams(SHAPES["two blocks"], plain.drawn_weights(SHAPES["two blocks"]))
    if change is not None:
        weights[change] = weights[change] + 1e-6
    return tokenizer_id(weights, model_config(config.to_json() | fields), {"size": 32})


def test_the_tokenizer_id_is_of_what_decides_tokens() -> None:
    assert _id(change="codebook.weight") == _id(change="decoder.6.weight") == _id()
    changed = {
        _id(change="encoder.5.bias"),
        _id(change="encoder.3.net.2.weight"),
        _id(normalization=((0.5,) * 3, (0.25,) * 3)),
    }
    assert len(changed | {_id()}) == 4


def test_the_tokenizer_id_and_the_tokens_are_the_same_on_every_machine() -> None:
    """Checked in: a change of either would orphan every stored token. No token here hangs on a near-tie."""
    from pipeline.images import ImageSpec, decode_image

    hparams, spec = SHAPES["two blocks"], ImageSpec(size=64)
    config, weights, _ = from_hparams(hparams, plain.drawn_weights(hparams, seed=6))
    counted = {name: (torch.arange(each.numel()) / 4096).reshape(each.shape) for name, each in weights.items()}
    assert tokenizer_id(counted, config, spec.to_json()) == TOKENIZER_ID
    pixels_BHWC = np.stack([decode_image((GOLDEN / name).read_bytes(), spec).pixels_HWC for name in IMAGES])
    tokenizer = DVAETokenizer(
        read_checkpoint(files_of(config, weights, spec.to_json()).__getitem__), device="cpu", batch_size=2
    )
    tokens_BHW = tokenizer.encode(pixels_BHWC)
    best_B2HW = plain.logits(weights, hparams, as_images(pixels_BHWC)).topk(2, dim=1).values
    assert float((best_B2HW[:, 0] - best_B2HW[:, 1]).min()) > LEAST_MARGIN and len(np.unique(tokens_BHW)) >= 20
    assert hashlib.sha256(tokens_BHW.astype("<i4").tobytes()).hexdigest()[:16] == TOKENS


# vae.pt


@shapes
def test_an_exported_file_is_safe_to_load_and_comes_back_as_it_was(shape: str) -> None:
    _, weights, hparams = made(shape)
    config, ours, size = from_hparams(hparams, weights)
    loaded = torch.load(io.BytesIO(vae_pt(config, ours, size)), weights_only=True)
    assert loaded["hparams"] == hparams
    assert list(loaded["weights"]) == list(weights)
    assert all(torch.equal(loaded["weights"][name], each) for name, each in weights.items())
    assert from_hparams(loaded["hparams"], loaded["weights"])[0] == config


@needs_peer
@shapes
def test_an_exported_file_loads_into_the_real_class(shape: str) -> None:
    from peer_dalle_pytorch import discrete_vae

    model, weights, hparams = made(shape)
    loaded = torch.load(io.BytesIO(vae_pt(model.config, weights, hparams["image_size"])), weights_only=True)
    theirs = discrete_vae(PEERS)(**loaded["hparams"])
    theirs.load_state_dict(loaded["weights"])
    assert all(torch.equal(each, weights[name]) for name, each in theirs.state_dict().items())


def test_files_of_before_and_with_what_only_training_needs_are_read_too() -> None:
    """What hparams do not say is as the constructor has it."""
    hparams = dict(SHAPES["no blocks"])
    del hparams["channels"], hparams["num_resnet_blocks"]
    of_training = {"temperature": 0.9, "straight_through": False, "smooth_l1_loss": True, "kl_div_loss_weight": 0.1}
    normal = {"normalization": ((0.5, 0.5, 0.5, 0), (0.5, 0.5, 0.5, 1))}
    halves = {name: each.half() for name, each in plain.drawn_weights(SHAPES["no blocks"]).items()}
    config, weights, size = from_hparams(hparams | of_training | normal, halves)
    assert (config, size) == (made("no blocks")[0].config, 16)
    assert all(each.dtype == torch.float32 and torch.equal(each, halves[name]) for name, each in weights.items())


REFUSED: list[tuple[Hparams, str]] = [
    ({"image_size": None}, "image_size None: it must be a whole number"),
    ({"image_size": 20}, "image size 20 is not a multiple of downsample 8"),
    ({"channels": 1}, "channels 1: only models of three colours"),
    ({"num_tokens": 97}, r"'codebook.weight' is torch.float32 \(96, 24\); the hparams ask for \(97, 24\)"),
    ({"num_tokens": True}, "codebook_size True must be a whole number of at least 2"),
    ({"hidden_dim": 32}, r"'encoder.0.0.weight' is torch.float32 \(16, 3, 4, 4\)"),
    ({"hidden_dim": 2**60}, "tensors that no memory could hold"),
    ({"hidden_dim": 2**70}, "tensors that no memory could hold"),
    ({"num_layers": 2}, "the tensor 'encoder.2.net.0.weight' is missing"),
    ({"num_layers": 17}, "num_layers 17 must be at most 16"),
    ({"num_resnet_blocks": 257}, "num_resnet_blocks 257 must be at most 256"),
    ({"num_resnet_blocks": 1}, "the tensor 'encoder.4.weight' is missing"),
    ({"num_resnet_blocks": 0.5}, "num_resnet_blocks 0.5 must be a whole number"),
    ({"normalization": None}, r"normalization None \(pixels as they are\) is not read"),
    ({"normalization": ((0.5,), (0.5,))}, "must be three means and three standard deviations"),
    ({"normalization": ((0.5,) * 3, (0.0,) * 3)}, "standard deviation 0.0 must be a finite number above 0"),
    ({"attention": 3}, "unknown field 'attention'"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_hparams_that_do_not_fit_are_refused_by_the_first_mismatch(changes: Hparams, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        from_hparams(SHAPES["two blocks"] | changes, plain.drawn_weights(SHAPES["two blocks"]))


@pytest.mark.parametrize("fault", ["missing", "extra", "whole numbers"])
def test_weights_that_do_not_fit_are_refused_by_name(fault: str) -> None:
    hparams, name = SHAPES["two blocks"], "decoder.2.net.4.bias"
    weights = plain.drawn_weights(hparams)
    if fault == "missing":
        del weights[name]
    elif fault == "extra":
        weights[name + "2"] = torch.zeros(1)
    else:
        weights[name] = torch.zeros(16, dtype=torch.int64)
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        from_hparams(hparams, weights)


def test_what_its_class_cannot_hold_is_not_exported() -> None:
    config, weights, _ = from_hparams(SHAPES["no blocks"], plain.drawn_weights(SHAPES["no blocks"]))
    with pytest.raises(ModelError, match="images of a power of 2; this checkpoint's have 24 pixels"):
        vae_pt(config, weights, 24)
    with pytest.raises(ModelError, match=r"has DALL·E's architecture.*architecture=dalle_pytorch"):
        vae_pt(DVAEConfig(), {}, 256)


# Its config


def test_a_checkpoint_names_its_architecture_and_dalles_does_not() -> None:
    config = DiscreteVAEConfig(codebook_size=64, num_layers=2, normalization=((0.1, 0.2, 0.3), (1.0, 1.0, 1.0)))
    assert config.to_json()["architecture"] == "dalle_pytorch" and "architecture" not in DVAEConfig().to_json()
    assert model_config(config.to_json()) == config and model_config(DVAEConfig().to_json()) == DVAEConfig()
    assert hash(model_config({**config.to_json(), "normalization": [[0.1, 0.2, 0.3], [1, 1, 1]]})) == hash(config)
    assert (config.downsample, config.grid(64)) == (4, (16, 16))


def test_a_record_of_another_architecture_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"architecture 'vqgan' must be 'dalle_pytorch' \(leave it out for DALL·E's\)"):
        model_config({"architecture": "vqgan"})
    config, weights, _ = from_hparams(SHAPES["no blocks"], plain.drawn_weights(SHAPES["no blocks"]))
    with pytest.raises(CheckpointError, match=r"model\.safetensors has the tensor 'decoder\.0\.0\.bias'"):
        files_of(model_config(config.to_json() | {"num_resnet_blocks": 1}), weights, {"size": 16})


def test_the_names_are_those_of_its_class_at_three_layers_and_two_blocks() -> None:
    names = {name.rpartition(".")[0] for name in DiscreteVAE(DiscreteVAEConfig(hidden_dim=4)).state_dict()}
    blocks = {f"{side}.{n}.net.{at}" for side, n in (("encoder", 3), ("encoder", 4), ("decoder", 1), ("decoder", 2))
              for at in (0, 2, 4)}  # fmt: skip
    convolutions = {f"encoder.{n}.0" for n in range(3)} | {f"decoder.{n}.0" for n in (3, 4, 5)}
    assert names == {"codebook", "encoder.5", "decoder.0", "decoder.6"} | blocks | convolutions
    assert isinstance(DiscreteVAE(DiscreteVAEConfig(hidden_dim=4)).decoder[3][0], nn.ConvTranspose2d)  # type: ignore[index]


def test_the_ending_of_its_name_says_what_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from jobs.cli import main

    config, weights, size = from_hparams(SHAPES["no blocks"], plain.drawn_weights(SHAPES["no blocks"]))
    for name, data in files_of(config, weights, {"size": size}).items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(SystemExit) as done:
        main(["export", str(tmp_path), str(tmp_path / "out" / "vae.pt")])
    assert done.value.code == 0
    assert "DALLE-pytorch's DiscreteVAE for images of 16 × 16 pixels" in capsys.readouterr().out
    assert torch.load(tmp_path / "out" / "vae.pt", weights_only=True)["hparams"] == SHAPES["no blocks"]
    assert run_export_vae(str(tmp_path), str(tmp_path / "out" / "vae.pt"), as_json=False) == 0
    (tmp_path / "vae.pt").write_bytes(b"weeks of training")
    with pytest.raises(FileIsThere, match=r"vae\.pt is there already: give another name"):
        run_export_vae(str(tmp_path), str(tmp_path / "vae.pt"), as_json=False)
    assert (tmp_path / "vae.pt").read_bytes() == b"weeks of training"


@pytest.mark.training  # the exporter takes seconds
def test_its_onnx_files_give_its_tokens_and_pixels() -> None:
    pytest.importorskip("onnxruntime")
    from jobs.export_onnx import parity_of
    from model.onnx_export import onnx_files

    checkpoint = checkpoint_of("no blocks")
    parity = parity_of(checkpoint, onnx_files(checkpoint))
    assert parity.holds and parity.num_tokens == 8 * 4 * 4 and parity.num_differing <= 1
