"""Tokens depend on the image alone: not on its neighbours, their number, or the batch they came in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from model import losses, quantizer
from model.checkpoint import Checkpoint, checkpoint_files, read_checkpoint
from model.config import DVAEConfig, ModelError
from model.dvae import seeded_dvae
from model.tokenizer import DVAETokenizer

SPEC = {"size": 32, "version": 1}
SMALL = DVAEConfig(codebook_size=64, width=16, blocks_per_group=1, decoder_init=16, code_dim=8)


def _checkpoint(config: DVAEConfig = SMALL) -> Checkpoint:
    weights = dict(seeded_dvae(config, 0).state_dict())
    files = checkpoint_files(
        weights=weights, dvae_config=config, image_spec=SPEC, step=0, training_state=None, extra={}
    )
    return read_checkpoint(files.__getitem__)


def _pixels(num_images: int, size: int = 32) -> NDArray[np.uint8]:
    """Blocks of one colour under some noise: random weights give such images several codes."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 2, (num_images, size // 8, size // 8, 3)).repeat(8, axis=1).repeat(8, axis=2)
    noise = rng.integers(0, 40, (num_images, size, size, 3))
    return (blocks * 215 + noise).astype(np.uint8)


@pytest.mark.parametrize("head", ["conv", "inner_product"])
@pytest.mark.parametrize("stem", ["full", "strided"])
def test_tokens_are_the_argmax_of_the_encoders_logits(head, stem):
    config = DVAEConfig(64, 8, 16, 1, 16, head, 8, stem)
    model, pixels_BHWC = seeded_dvae(config, 0), _pixels(5)
    with torch.no_grad():
        out_BCHW = model.encoder(losses.map_pixels(torch.from_numpy(pixels_BHWC)))
        if head == "inner_product":
            out_BCHW = torch.einsum("bdhw,kd->bkhw", out_BCHW, model.codebook)
    tokens_BHW = DVAETokenizer(_checkpoint(config), batch_size=2).encode(pixels_BHWC)
    assert tokens_BHW.dtype == np.int32 and tokens_BHW.shape == (5, 4, 4)
    assert np.array_equal(tokens_BHW, out_BCHW.argmax(dim=1).numpy())
    assert len(np.unique(tokens_BHW)) > 1


@pytest.mark.parametrize("head", ["conv", "inner_product"])
def test_margins_are_by_how_much_the_best_logit_beats_that_of_a_token(head):
    config = DVAEConfig(64, 8, 16, 1, 16, head, 8)
    model, pixels_BHWC = seeded_dvae(config, 0), _pixels(5)
    tokenizer = DVAETokenizer(_checkpoint(config), batch_size=2)
    tokens_BHW = tokenizer.encode(pixels_BHWC)
    assert not tokenizer.margins(pixels_BHWC, tokens_BHW).any()
    others_BHW = np.random.default_rng(0).integers(0, 64, tokens_BHW.shape)
    with torch.no_grad():
        logits_NK = quantizer.logits(model.encode(losses.map_pixels(torch.from_numpy(pixels_BHWC))), model.tables())
    others_N = logits_NK[torch.arange(len(logits_NK)), torch.from_numpy(others_BHW.reshape(-1))]
    expected_BHW = (logits_NK.amax(dim=1) - others_N).numpy().reshape(tokens_BHW.shape)
    margins_BHW = tokenizer.margins(pixels_BHWC, others_BHW.astype(np.int16))
    assert margins_BHW.dtype == np.float32
    np.testing.assert_allclose(margins_BHW, expected_BHW, atol=1e-5)
    assert (margins_BHW[others_BHW != tokens_BHW] > 0).all() and margins_BHW.max() > 1e-3


def test_an_images_tokens_do_not_depend_on_its_neighbours_their_order_or_their_number():
    tokenizer, pixels_BHWC = DVAETokenizer(_checkpoint(), batch_size=4), _pixels(11)
    together = tokenizer.encode(pixels_BHWC)
    assert np.array_equal(tokenizer.encode(pixels_BHWC[::-1])[::-1], together)
    assert np.array_equal(np.concatenate([tokenizer.encode(each[None]) for each in pixels_BHWC]), together)
    assert np.array_equal(tokenizer.encode(pixels_BHWC[:7]), together[:7])


@pytest.mark.parametrize("position", range(4))
def test_even_the_logits_do_not_depend_on_the_position_in_a_batch(position, monkeypatch):
    """Bit for bit, so that no near-tie can hang on it."""
    seen: list[NDArray[np.float32]] = []
    plain = quantizer.logits

    def recorded(z_NC: torch.Tensor, tables: quantizer.CodeTables, *, out: torch.Tensor) -> torch.Tensor:
        logits_NK = plain(z_NC, tables, out=out)
        seen.append(logits_NK.numpy().copy())
        return logits_NK

    monkeypatch.setattr(quantizer, "logits", recorded)
    tokenizer, pixels_BHWC = DVAETokenizer(_checkpoint(), batch_size=4), _pixels(5)
    tokenizer.encode(pixels_BHWC[:1])
    tokenizer.encode(np.insert(pixels_BHWC[1:4], position, pixels_BHWC[0], axis=0))
    assert np.array_equal(seen[1].reshape(4, 16, -1)[position], seen[0].reshape(4, 16, -1)[0])


def test_no_image_gives_an_empty_array_of_the_right_shape():
    tokenizer = DVAETokenizer(_checkpoint())
    assert tokenizer.encode(_pixels(0)).shape == (0, 4, 4)
    assert tokenizer.decode(np.zeros((0, 4, 4), np.int32)).shape == (0, 32, 32, 3)


@pytest.mark.parametrize("codebook_size", [8192, 32_768, 32_769, 65_536, 70_000])
def test_tokens_of_large_codebooks_are_in_range_and_reach_beyond_int16(codebook_size):
    config = DVAEConfig(codebook_size, 8, 8, 1, 8, "inner_product", 4, "strided")
    tokenizer = DVAETokenizer(_checkpoint(config), batch_size=3)
    tokens_BHW = tokenizer.encode(_pixels(7))
    assert tokens_BHW.min() >= 0 and tokens_BHW.max() < codebook_size
    assert tokens_BHW.max() > min(codebook_size, 32_768) // 2
    assert tokenizer.decode(tokens_BHW).shape == (7, 32, 32, 3)


def test_argmax_in_chunks_finds_what_one_product_finds(monkeypatch):
    pixels_BHWC = _pixels(6)
    expected = DVAETokenizer(_checkpoint(), batch_size=6).encode(pixels_BHWC)
    monkeypatch.setattr("model.code_search.CPU_CHUNK_BYTES", 4 * 64 * 7)  # seven rows: no divisor of 96
    assert np.array_equal(DVAETokenizer(_checkpoint(), batch_size=6).encode(pixels_BHWC), expected)


@pytest.mark.parametrize("head", ["conv", "inner_product"])
def test_decoding_equals_the_one_hot_product(head):
    config = DVAEConfig(64, 8, 16, 1, 16, head, 8)
    model = seeded_dvae(config, 0)
    tokens_BHW = np.random.default_rng(1).integers(0, 64, (3, 4, 4))
    one_hot_BKHW = F.one_hot(torch.from_numpy(tokens_BHW), 64).float().permute(0, 3, 1, 2)
    with torch.no_grad():
        if head == "inner_product":
            one_hot_BKHW = torch.einsum("bkhw,kd->bdhw", one_hot_BKHW, model.codebook)
        expected = losses.to_uint8(model.reconstruction(model.decoder(one_hot_BKHW))).numpy()
    found = DVAETokenizer(_checkpoint(config), batch_size=2).decode(tokens_BHW.astype(np.int16))
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1  # another summation may round another way
    assert (found == expected).mean() > 0.99


def test_any_grid_decodes():
    tokens_BHW = np.zeros((1, 2, 5), np.int64)
    assert DVAETokenizer(_checkpoint()).decode(tokens_BHW).shape == (1, 16, 40, 3)


@pytest.mark.parametrize(
    ("pixels_BHWC", "words"),
    [
        (_pixels(1, size=64), r"uint8 \(1, 64, 64, 3\); this tokenizer takes uint8 \(B, 32, 32, 3\)"),
        (_pixels(1).astype(np.float32), "pixels are float32"),
        (_pixels(1)[0], r"uint8 \(32, 32, 3\)"),
        (_pixels(1)[..., :1], r"\(1, 32, 32, 1\)"),
    ],
)
def test_other_pixels_are_refused_with_what_they_are(pixels_BHWC, words):
    with pytest.raises(ModelError, match=words):
        DVAETokenizer(_checkpoint()).encode(pixels_BHWC)


@pytest.mark.parametrize(
    ("tokens_BHW", "words"),
    [
        (np.full((1, 4, 4), 64), r"tokens lie in \[64, 64\]; this codebook has \[0, 63\]"),
        (np.full((1, 4, 4), -1), r"tokens lie in \[-1, -1\]"),
        (np.zeros((4, 4), np.int32), r"int32 \(4, 4\)"),
        (np.zeros((1, 4, 4)), "float64"),
    ],
)
def test_other_tokens_are_refused_with_what_they_are(tokens_BHW, words):
    with pytest.raises(ModelError, match=words):
        DVAETokenizer(_checkpoint()).decode(tokens_BHW)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "int8"}, "precision 'int8' must be one of fp32, tf32, bf16, fp16"),
        ({"precision": "fp16", "device": "cpu"}, "precision 'fp16' needs a CUDA device"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"threads": 0}, "threads 0"),
        ({"device": "abacus"}, "device 'abacus'"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ModelError, match=words):
        DVAETokenizer(_checkpoint(), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_cuda_device_is_refused_and_auto_takes_the_cpu():
    with pytest.raises(ModelError, match="torch sees no CUDA device"):
        DVAETokenizer(_checkpoint(), device="cuda")
    assert DVAETokenizer(_checkpoint(), device="auto").numerics["device"] == "cpu"


def test_the_numerics_name_all_that_may_move_a_near_tie():
    tokenizer = DVAETokenizer(_checkpoint(), device="cpu", precision="bf16", batch_size=5, threads=2)
    assert tokenizer.numerics == {
        "device": "cpu",
        "precision": "bf16",
        "compiled": False,
        "batch_size": 5,
        "threads": 2,
    }
    assert tokenizer.encode(_pixels(3)).shape == (3, 4, 4)


def test_identity_comes_from_the_checkpoint():
    checkpoint = _checkpoint()
    tokenizer = DVAETokenizer(checkpoint)
    assert (tokenizer.grid, tokenizer.codebook_size) == ((4, 4), 64)
    assert (tokenizer.tokenizer_id, tokenizer.image_spec) == (checkpoint.tokenizer_id, SPEC)


def test_the_processs_own_number_of_threads_is_restored():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        DVAETokenizer(_checkpoint(), threads=1).encode(_pixels(1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
