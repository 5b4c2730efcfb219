"""The loss is the paper's: a density that is one, a KL with known ends, and a normalisation by values."""

from __future__ import annotations

import math

import pytest
import torch

from model import losses
from model.config import LossConfig

# B batch, N positions, K codes


@pytest.mark.parametrize(("mean", "log_scale"), [(0.0, 0.0), (1.5, -1.0), (-2.0, 0.5), (0.3, -2.0)])
def test_logit_laplace_integrates_to_one_on_the_unit_interval(mean, log_scale):
    """In t = logit x, where dx = x(1 − x) dt, so that the density's poles at 0 and 1 don't matter."""
    t = torch.linspace(-30, 30, 600_001, dtype=torch.float64)
    x = torch.sigmoid(t)
    nats = losses.logit_laplace_nats(x, torch.tensor(mean), torch.tensor(log_scale, dtype=torch.float64))
    inside = (x > 0) & (x < 1)
    mass = torch.trapezoid((torch.exp(-nats) * x * (1 - x))[inside], t[inside])
    assert float(mass) == pytest.approx(1.0, abs=1e-4)


def test_logit_laplace_keeps_its_log_scale_in_range():
    x, mean = torch.tensor(0.3), torch.tensor(0.2)
    for beyond, bound in ((-50.0, -7.0), (50.0, 3.0)):
        found = losses.logit_laplace_nats(x, mean, torch.tensor(beyond))
        assert torch.equal(found, losses.logit_laplace_nats(x, mean, torch.tensor(bound)))


def _alone(x: torch.Tensor) -> torch.Tensor:
    return x


def test_usage_kl_is_zero_when_every_code_has_its_share_however_sure_the_posteriors_are():
    sure_NK, one_code_NK = torch.eye(16), torch.eye(16)[[3] * 16]
    assert float(losses.usage_kl(sure_NK.mean(dim=0), _alone)) == pytest.approx(0.0, abs=1e-5)
    assert float(losses.usage_kl(torch.full((16,), 1 / 16), _alone)) == pytest.approx(0.0, abs=1e-5)
    assert float(losses.usage_kl(one_code_NK.mean(dim=0), _alone)) == pytest.approx(math.log(16))


def test_usage_kl_of_two_ranks_has_the_value_and_gradient_of_the_whole_batch():
    whole_NK = torch.randn(12, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    whole_NK.requires_grad_()
    mean_K = torch.softmax(whole_NK, dim=1).mean(dim=0)
    expected = (mean_K * mean_K.log()).sum() + math.log(9)
    (expected_gradient,) = torch.autograd.grad(expected, whole_NK)
    own = [torch.softmax(each, dim=1).mean(dim=0) for each in whole_NK.split(6)]
    shares = [losses.usage_kl(each, lambda _: mean_K.detach()) for each in own]
    (gradient,) = torch.autograd.grad(sum(shares) / 2, whole_NK)  # DDP's mean over ranks
    assert [each.item() for each in shares] == pytest.approx([expected.item()] * 2)
    assert torch.allclose(gradient, expected_gradient, atol=1e-12)


def test_the_usage_term_enters_like_the_kl():
    x_BCHW, stats_BCHW = torch.full((2, 3, 16, 16), 0.5), torch.zeros(2, 6, 16, 16)
    parts = losses.loss_parts(stats_BCHW, x_BCHW, torch.ones(2 * 2 * 2), 0.0, LossConfig())
    weighed = losses.with_usage(parts, x_BCHW, torch.randn(16).softmax(dim=0), 2 * 2 * 2, 2.0, _alone)
    assert weighed.usage_kl is not None
    assert float(weighed.loss - parts.loss) == pytest.approx(2.0 / 192 * float(weighed.usage_kl), rel=1e-3)


def test_beta_acts_as_one_192nd_on_the_mean_kl_at_downsampling_8():
    """The paper divides by 256·256·3 and sums the KL over 32·32 positions."""
    x_BCHW = torch.full((2, 3, 256, 256), 0.5)
    stats_BCHW, kl_N = torch.zeros(2, 6, 256, 256), torch.rand(2 * 32 * 32)
    parts = losses.loss_parts(stats_BCHW, x_BCHW, kl_N, 6.6, LossConfig("logit_laplace"))
    assert float(parts.kl) == pytest.approx(float(kl_N.mean()))
    assert float(parts.loss - parts.reconstruction) == pytest.approx(6.6 / 192 * float(parts.kl), rel=1e-4)


@pytest.mark.parametrize("likelihood", ["logit_laplace", "l2", "l1"])
def test_the_loss_depends_on_neither_batch_size_nor_resolution(likelihood):
    config = LossConfig(likelihood)

    def loss(batch: int, repeats: int) -> float:
        g = torch.Generator().manual_seed(1)
        x = torch.rand(1, 3, 16, 16, generator=g).mul(0.8).add(0.1).repeat(batch, 1, repeats, repeats)
        stats = torch.randn(1, 6, 16, 16, generator=g).repeat(batch, 1, repeats, repeats)
        kl_N = torch.rand(4, generator=g).repeat(batch * repeats * repeats)
        return float(losses.loss_parts(stats, x, kl_N, 2.0, config).loss)

    assert loss(4, 1) == pytest.approx(loss(1, 1), rel=1e-6)
    assert loss(1, 3) == pytest.approx(loss(1, 1), rel=1e-6)


def test_l2_and_l1_measure_mapped_pixels_against_the_means_alone():
    x_BCHW = torch.full((1, 3, 4, 4), 0.7)
    stats_BCHW = torch.cat([torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 9.0)], dim=1)  # sigmoid(0) = 0.5
    for likelihood, per_value in (("l2", 0.04), ("l1", 0.2)):
        found = losses.negative_log_likelihood(stats_BCHW, x_BCHW, LossConfig(likelihood))
        assert float(found) == pytest.approx(per_value * 48, rel=1e-5)


def test_every_pixel_level_survives_mapping_and_unmapping():
    levels_BHWC = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    mapped_BCHW = losses.map_pixels(levels_BHWC)
    assert (float(mapped_BCHW.min()), float(mapped_BCHW.max())) == pytest.approx((0.1, 0.9))
    assert torch.equal(losses.to_uint8(losses.unmap_pixels(mapped_BCHW)), levels_BHWC)


def test_mapping_into_a_buffer_gives_the_bits_of_mapping_step_by_step():
    levels_BHWC = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    expected_BCHW = (levels_BHWC.float() / 255.0 * 0.8 + 0.1).permute(0, 3, 1, 2)
    assert torch.equal(losses.map_pixels(levels_BHWC, out=torch.empty(1, 16, 16, 3)), expected_BCHW)
    assert torch.equal(losses.map_pixels(levels_BHWC), expected_BCHW)
