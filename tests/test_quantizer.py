"""Heads that are one form, noise that is a function of its place, lookups that equal products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model import quantizer
from model.quantizer import CodeTables, GumbelNoise
from plain_bottleneck import plain_noise

# B batch, N positions, K codes, C channels of the keys, D channels of the codes


def _tables(num_codes: int, channels: int, code_channels: int, dtype: torch.dtype) -> CodeTables:
    g = torch.Generator().manual_seed(0)
    return CodeTables(
        torch.randn(num_codes, channels, generator=g, dtype=dtype),
        torch.randn(num_codes, generator=g, dtype=dtype),
        torch.randn(num_codes, code_channels, generator=g, dtype=dtype),
        torch.randn(code_channels, generator=g, dtype=dtype),
    )


def test_the_conv_head_equals_an_inner_product_with_its_weights():
    tables = _tables(300, 16, 8, torch.float32)
    assert tables.key_bias_K is not None
    z_BCHW = torch.randn(2, 16, 5, 7)
    by_convolution_BKHW = F.conv2d(z_BCHW, tables.keys_KC[:, :, None, None], tables.key_bias_K)
    z_NC = z_BCHW.permute(0, 2, 3, 1).flatten(0, 2)
    by_inner_product_NK = (z_NC[:, None, :] * tables.keys_KC).sum(dim=-1) + tables.key_bias_K
    expected_NK = by_convolution_BKHW.permute(0, 2, 3, 1).flatten(0, 2)
    assert torch.allclose(by_inner_product_NK, expected_NK, atol=1e-5)
    assert torch.allclose(quantizer.logits(z_NC, tables), expected_NK, atol=1e-5)


def test_looking_codes_up_equals_the_one_hot_product():
    tables = _tables(50, 3, 6, torch.float32)
    tokens_N = torch.randint(0, 50, (200,))
    one_hot_NK = F.one_hot(tokens_N, 50).float()
    expected_ND = F.linear(one_hot_NK, tables.codes_KD.T, tables.code_bias_D)
    assert torch.allclose(quantizer.hard_latent(tokens_N, tables), expected_ND, atol=1e-6)
    bare = tables._replace(code_bias_D=None)
    assert torch.allclose(quantizer.hard_latent(tokens_N, bare), one_hot_NK @ tables.codes_KD, atol=1e-6)


def _noise(keys_B2: torch.Tensor, num_positions: int, num_codes: int) -> torch.Tensor:
    whole = torch.empty(len(keys_B2) * num_positions, num_codes)
    drawn = GumbelNoise(keys_B2, num_positions, num_codes)
    return drawn.draw(slice(0, len(whole)), whole, torch.empty_like(whole))


@pytest.mark.parametrize(("num_positions", "num_codes"), [(9, 37), (1, 256), (64, 2)])
def test_any_rows_of_the_noise_can_be_drawn_and_have_the_bits_of_always(num_positions, num_codes):
    keys_B2 = quantizer.noise_keys(5, 7, np.array([3, 0, 2**31]))
    expected_NK = plain_noise(keys_B2, num_positions, num_codes)
    assert torch.equal(_noise(keys_B2, num_positions, num_codes), expected_NK)
    noise = GumbelNoise(keys_B2, num_positions, num_codes)
    for begin, end in ((0, 1), (num_positions - 1, num_positions + 1), (3 * num_positions - 1, 3 * num_positions)):
        out_nK, spare_nK = torch.empty(2, end - begin, num_codes)
        assert noise.draw(slice(begin, end), out_nK, spare_nK) is out_nK
        assert torch.equal(out_nK, expected_NK[begin:end])


@pytest.mark.parametrize("num_codes", [37, 256])
def test_noise_does_not_depend_on_how_the_global_batch_is_split(num_codes):
    def noise(slots: list[int]) -> torch.Tensor:
        return _noise(quantizer.noise_keys(3, 11, np.array(slots)), 9, num_codes)

    whole = noise([0, 1, 2, 3, 4, 5])
    assert torch.equal(torch.cat([noise([0, 1]), noise([2, 3]), noise([4, 5])]), whole)
    strided = torch.cat([noise([0, 2, 4]), noise([1, 3, 5])])
    order = [0, 2, 4, 1, 3, 5]
    assert torch.equal(strided.view(6, 9, -1), whole.view(6, 9, -1)[order])


def test_noise_differs_with_seed_step_and_slot():
    keys = [
        quantizer.noise_keys(seed, step, np.array([slot]))
        for seed, step, slot in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**40, 0, 0), (-1, 0, 0)]
    ]
    noises = torch.stack([_noise(each, 64, 64).flatten() for each in keys])
    correlations = torch.corrcoef(noises) - torch.eye(len(keys))
    assert float(correlations.abs().max()) < 6 / 64  # six standard errors of 4,096 pairs


def test_noise_is_standard_gumbel_and_finite():
    noise = _noise(quantizer.noise_keys(0, 5, np.arange(64)), 64, 256).double()
    standard_error = (torch.pi / 6**0.5) / noise.numel() ** 0.5
    assert torch.isfinite(noise).all()
    assert float(noise.mean()) == pytest.approx(np.euler_gamma, abs=5 * standard_error)
    assert float(noise.var()) == pytest.approx(np.pi**2 / 6, rel=0.02)
    ordered = noise.flatten().sort().values
    exact = torch.exp(-torch.exp(-ordered))
    empirical = (torch.arange(ordered.numel()) + 0.5) / ordered.numel()
    assert float((exact - empirical).abs().max()) < 2 / noise.numel() ** 0.5  # Kolmogorov–Smirnov


def test_the_argmax_of_noisy_logits_is_a_sample_of_their_softmax():
    """Gumbel-max, over every code: catches correlation between the noises of one position."""
    logits_K = torch.linspace(-1.5, 1.5, 12)
    noise_NK = _noise(quantizer.noise_keys(1, 2, np.arange(400)), 500, 12)
    counts_K = torch.bincount((logits_K + noise_NK).argmax(dim=1), minlength=12).double()
    expected_K = torch.softmax(logits_K.double(), dim=0) * counts_K.sum()
    chi_squared = float(((counts_K - expected_K) ** 2 / expected_K).sum())
    assert chi_squared < 31.3  # 99.9% of 11 degrees of freedom


def test_the_extreme_cells_of_the_uniform_give_finite_noise(monkeypatch):
    for bits in (0, -1):
        monkeypatch.setattr(quantizer, "_hash32", lambda x, spare, bits=bits: x.fill_(bits))
        noise = _noise(torch.zeros(1, 2, dtype=torch.int32), 1, 4)
        assert torch.isfinite(noise).all() and float(noise.abs().max()) < 16.7
