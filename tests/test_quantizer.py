"""The bottleneck: exact gradients through the relaxation, noise that is a function, lookups that equal products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model import quantizer
from model.quantizer import CodeTables

# B batch, N positions, K codes, C channels of the keys, D channels of the codes


def _tables(num_codes: int, channels: int, code_channels: int, dtype: torch.dtype) -> CodeTables:
    g = torch.Generator().manual_seed(0)
    return CodeTables(
        torch.randn(num_codes, channels, generator=g, dtype=dtype),
        torch.randn(num_codes, generator=g, dtype=dtype),
        torch.randn(num_codes, code_channels, generator=g, dtype=dtype),
        torch.randn(code_channels, generator=g, dtype=dtype),
    )


def test_gradients_through_the_relaxation_are_exact_in_fp64():
    tables = CodeTables(*(each.requires_grad_() for each in _tables(7, 3, 4, torch.float64) if each is not None))
    z_NC = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    noise_NK = quantizer.gumbel_noise(quantizer.noise_keys(0, 0, np.arange(1)), 5, 7).double()

    def latent(z: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        given = CodeTables(*parts)
        return quantizer.soft_latent(quantizer.relax(quantizer.logits(z, given), noise_NK, 0.7), given)

    assert torch.autograd.gradcheck(latent, (z_NC, *tables))


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
    assert torch.allclose(quantizer.hard_latent(tokens_N, tables), quantizer.soft_latent(one_hot_NK, tables), atol=1e-6)
    bare = tables._replace(code_bias_D=None)
    assert torch.allclose(quantizer.hard_latent(tokens_N, bare), one_hot_NK @ tables.codes_KD, atol=1e-6)


def test_low_temperatures_give_one_hot_and_high_ones_uniform():
    logits_NK, noise_NK = torch.randn(20, 9), torch.zeros(20, 9)
    cold_NK, hot_NK = quantizer.relax(logits_NK, noise_NK, 1e-3), quantizer.relax(logits_NK, noise_NK, 1e3)
    assert torch.equal(cold_NK.argmax(dim=1), logits_NK.argmax(dim=1))
    assert float(cold_NK.max(dim=1).values.min()) > 0.9
    assert torch.allclose(hot_NK, torch.full_like(hot_NK, 1 / 9), atol=1e-2)


@pytest.mark.parametrize("num_codes", [37, 256])
def test_noise_does_not_depend_on_how_the_global_batch_is_split(num_codes):
    def noise(slots: list[int]) -> torch.Tensor:
        return quantizer.gumbel_noise(quantizer.noise_keys(3, 11, np.array(slots)), 9, num_codes)

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
    noises = torch.stack([quantizer.gumbel_noise(each, 64, 64).flatten() for each in keys])
    correlations = torch.corrcoef(noises) - torch.eye(len(keys))
    assert float(correlations.abs().max()) < 6 / 64  # six standard errors of 4,096 pairs


def test_noise_is_standard_gumbel_and_finite():
    noise = quantizer.gumbel_noise(quantizer.noise_keys(0, 5, np.arange(64)), 64, 256).double()
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
    noise_NK = quantizer.gumbel_noise(quantizer.noise_keys(1, 2, np.arange(400)), 500, 12)
    counts_K = torch.bincount((logits_K + noise_NK).argmax(dim=1), minlength=12).double()
    expected_K = torch.softmax(logits_K.double(), dim=0) * counts_K.sum()
    chi_squared = float(((counts_K - expected_K) ** 2 / expected_K).sum())
    assert chi_squared < 31.3  # 99.9% of 11 degrees of freedom


def test_the_extreme_cells_of_the_uniform_give_finite_noise(monkeypatch):
    for bits in (0, -1):
        monkeypatch.setattr(quantizer, "_hash32", lambda x, bits=bits: torch.full_like(x, bits))
        noise = quantizer.gumbel_noise(torch.zeros(1, 2, dtype=torch.int32), 1, 4)
        assert torch.isfinite(noise).all() and float(noise.abs().max()) < 16.7
