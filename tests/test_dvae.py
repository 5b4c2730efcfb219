"""The layers are DALL·E's: names, counts and arithmetic; and whatever the config varies still fits together."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import quantizer
from model.config import DVAEConfig, ModelError
from model.dvae import DVAE, seeded_dvae
from plain_bottleneck import plain_figures

# B batch, C channels, H W rows and columns, N positions, K codes

SMALL = DVAEConfig(codebook_size=32, width=8, blocks_per_group=1, decoder_init=8, code_dim=8)


def _published_names(widening_groups: tuple[int, ...]) -> Iterator[str]:
    """The keys of OpenAI's state dicts, written out as in their repository."""
    for part in ("w", "b"):
        yield f"blocks.input.{part}"
        yield f"blocks.output.conv.{part}"
        for group in (1, 2, 3, 4):
            if group in widening_groups:
                yield f"blocks.group_{group}.block_1.id_path.{part}"
            for block in (1, 2):
                for conv in (1, 2, 3, 4):
                    yield f"blocks.group_{group}.block_{block}.res_path.conv_{conv}.{part}"


@pytest.mark.parametrize(
    ("side", "widening_groups", "num_tensors", "num_parameters"),
    [("encoder", (2, 3, 4), 74, 53_786_240), ("decoder", (1, 2, 3, 4), 76, 43_829_766)],
)
def test_the_openai_size_has_openais_names_and_counts(side, widening_groups, num_tensors, num_parameters):
    """The mapping to the published names is the prefix `encoder.` or `decoder.`."""
    with torch.device("meta"):
        state = DVAE(DVAEConfig()).state_dict()
    mine = {name.removeprefix(f"{side}."): each for name, each in state.items() if name.startswith(f"{side}.")}
    assert set(mine) == set(_published_names(widening_groups))
    assert len(mine) == num_tensors
    assert sum(tensor.numel() for tensor in mine.values()) == num_parameters
    assert len(state) == 74 + 76


def test_the_openai_size_has_openais_shapes_where_they_differ_from_block_to_block():
    with torch.device("meta"):
        state = DVAE(DVAEConfig()).state_dict()
    shapes = {
        "encoder.blocks.input.w": (256, 3, 7, 7),
        "encoder.blocks.group_1.block_1.res_path.conv_1.w": (64, 256, 3, 3),
        "encoder.blocks.group_4.block_1.id_path.w": (2048, 1024, 1, 1),
        "encoder.blocks.group_4.block_2.res_path.conv_4.w": (2048, 512, 1, 1),
        "encoder.blocks.output.conv.w": (8192, 2048, 1, 1),
        "decoder.blocks.input.w": (128, 8192, 1, 1),
        "decoder.blocks.group_1.block_1.id_path.w": (2048, 128, 1, 1),
        "decoder.blocks.group_1.block_1.res_path.conv_1.w": (512, 128, 1, 1),
        "decoder.blocks.group_4.block_2.res_path.conv_4.w": (256, 64, 3, 3),
        "decoder.blocks.output.conv.w": (6, 256, 1, 1),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def _published_forward(state: dict[str, Tensor], x: Tensor, resize: str, num_blocks: int) -> Tensor:
    """OpenAI's encoder (pool) or decoder (upsample), straight from its description and a state dict."""

    def conv(name: str, x: Tensor) -> Tensor:
        weight = state[f"{name}.w"]
        return F.conv2d(x, weight, state[f"{name}.b"], padding=(weight.shape[-1] - 1) // 2)

    x = conv("blocks.input", x)
    for group in (1, 2, 3, 4):
        for block in range(1, num_blocks + 1):
            name = f"blocks.group_{group}.block_{block}"
            residual = x
            for i in (1, 2, 3, 4):
                residual = conv(f"{name}.res_path.conv_{i}", F.relu(residual))
            same_width = f"{name}.id_path.w" not in state
            x = (x if same_width else conv(f"{name}.id_path", x)) + residual / (4 * num_blocks) ** 2
        if group < 4:
            x = F.max_pool2d(x, 2) if resize == "pool" else F.interpolate(x, scale_factor=2, mode="nearest")
    return conv("blocks.output.conv", F.relu(x))


@torch.no_grad()
def test_encoder_and_decoder_compute_what_openai_published():
    model = _with_random_biases(DVAEConfig(codebook_size=64, width=16, blocks_per_group=2, decoder_init=8))
    x_BCHW, codes_BKHW = torch.rand(2, 3, 32, 48), torch.softmax(torch.randn(2, 64, 4, 6), dim=1)
    logits_BKHW = _published_forward(model.encoder.state_dict(), x_BCHW, "pool", 2)
    stats_BCHW = _published_forward(model.decoder.state_dict(), codes_BKHW, "upsample", 2)
    assert torch.allclose(model.encoder(x_BCHW), logits_BKHW, rtol=1e-5, atol=1e-5)
    assert torch.allclose(model.decoder(codes_BKHW), stats_BCHW, rtol=1e-5, atol=1e-5)


def _with_random_biases(config: DVAEConfig) -> DVAE:
    model = seeded_dvae(config, 1)
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


@torch.no_grad()
@pytest.mark.parametrize("head", ["conv", "inner_product"])
@pytest.mark.parametrize("stem", ["full", "strided"])
@pytest.mark.parametrize("downsample", [4, 8, 16])
def test_every_head_stem_and_downsampling_makes_its_grid_and_its_pixels(head, stem, downsample):
    config = DVAEConfig(32, downsample, 8, 1, 8, head, 8, stem)
    model = seeded_dvae(config, 0)
    keys_B2 = quantizer.noise_keys(0, 0, np.arange(2))
    stats_BCHW, codes = model(torch.rand(2, 3, 32, 64), keys_B2, 1.0)
    assert stats_BCHW.shape == (2, 6, 32, 64)
    assert codes.kl_N.shape == codes.tokens_N.shape == (2 * (32 // downsample) * (64 // downsample),)
    assert codes.posterior_K.shape == (32,)


@torch.no_grad()
def test_the_rows_of_the_logits_are_the_encoders_in_raster_order():
    model, x_BCHW = _with_random_biases(SMALL), torch.rand(2, 3, 16, 24)
    logits_NK = quantizer.logits(model.encode(x_BCHW), model.tables())
    from_convolution_BHWK = model.encoder(x_BCHW).permute(0, 2, 3, 1)
    assert torch.allclose(logits_NK.view(2, 2, 3, 32), from_convolution_BHWK, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("head", ["conv", "inner_product"])
def test_decoding_by_lookup_equals_decoding_one_hot_codes(head):
    model = _with_random_biases(DVAEConfig(32, 8, 8, 1, 8, head, 8))
    tokens_BHW = torch.randint(0, 32, (2, 3, 4))
    one_hot_BKHW = F.one_hot(tokens_BHW, 32).float().permute(0, 3, 1, 2)
    if head == "inner_product":
        expected = model.decoder(torch.einsum("bkhw,kd->bdhw", one_hot_BKHW, model.codebook))
    else:
        expected = model.decoder(one_hot_BKHW)
    assert torch.allclose(model.decode_tokens(tokens_BHW.flatten(), (2, 3, 4)), expected, atol=1e-5)


def test_pixels_that_do_not_fit_the_grid_are_refused():
    with pytest.raises(ModelError, match=r"pixels of \(20, 16\) are not a multiple of downsample 8"):
        seeded_dvae(SMALL, 0)(torch.rand(1, 3, 20, 16), torch.zeros(1, 2, dtype=torch.int32), 1.0)


@torch.no_grad()
def test_under_bf16_autocast_the_bottleneck_stays_in_fp32():
    model, x_BCHW = seeded_dvae(SMALL, 0), torch.rand(1, 3, 16, 16)
    assert model.encoder.output.fp32 and model.decoder.input.fp32
    with torch.autocast("cpu", torch.bfloat16):
        body_BCHW = model.encoder.body(x_BCHW)
        stats_BCHW, codes = model(x_BCHW, quantizer.noise_keys(0, 0, np.arange(1)), 1.0)
        logits_BKHW = model.encoder(x_BCHW)
    assert body_BCHW.dtype == torch.bfloat16
    assert {stats_BCHW.dtype, codes.kl_N.dtype, logits_BKHW.dtype} == {torch.float32}
    exact_NK = F.linear(body_BCHW.float().permute(0, 2, 3, 1).flatten(0, 2), *model.tables()[:2])
    assert torch.allclose(codes.kl_N, plain_figures(exact_NK).kl_N, rtol=0, atol=1e-6)


def test_a_seed_gives_the_same_weights_again_and_another_seed_others():
    one, same, other = (seeded_dvae(SMALL, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["encoder.blocks.input.w"], other["encoder.blocks.input.w"])


def test_weights_start_with_variance_one_over_fan_in_and_no_bias():
    state = seeded_dvae(DVAEConfig(codebook_size=512, width=64, blocks_per_group=1, decoder_init=64), 0).state_dict()
    for name in ("encoder.blocks.group_4.block_1.res_path.conv_2.w", "decoder.blocks.input.w"):
        fan_in = state[name][0].numel()
        assert float(state[name].var() * fan_in) == pytest.approx(1.0, rel=0.05)
    assert not any(state[name].any() for name in state if name.endswith(".b"))
