"""What training minimises: −ln p(x|z) + β·KL(q(z|x) ‖ uniform), per image, divided by its number of values.

Optionally + γ·KL(q̄(z) ‖ uniform), where q̄ is the mean posterior of the global batch: that part of the KL which
is about codes left unused (the mean KL is I(x; z) + KL(q̄ ‖ uniform)). Off in the paper's recipe.

Everything is in fp32, and a mean over images: the loss depends on neither batch, world size nor resolution. `l2` and
`l1` are of pixels as the architecture maps them, so their size is comparable within an architecture only. The mapping
here is the paper's: 0.8·x + 0.1 for x in [0, 1] (arXiv 2102.12092, appendix A.3).
"""
# B batch, C channels, H W rows and columns of pixels, N positions, K codes

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import LossConfig

LOG_SCALE_RANGE = (-7.0, 3.0)
FIGURES = {"logit_laplace": "nats_per_value", "l2": "squared_error", "l1": "absolute_error"}
"""What −ln p(x|z), divided by the number of values, is called for each likelihood: only a density gives nats."""


def map_pixels(pixels_BHWC: Tensor, out: Tensor | None = None) -> Tensor:
    """uint8 → (B, 3, H, W) in [0.1, 0.9], fp32, laid out channels-last; in `out` (B, H, W, 3) if it is given."""
    return torch.div(pixels_BHWC, 255.0, out=out).mul_(0.8).add_(0.1).permute(0, 3, 1, 2)


def unmap_pixels(x: Tensor) -> Tensor:
    """[0.1, 0.9] → [0, 1], clamped."""
    return ((x - 0.1) / 0.8).clamp(0.0, 1.0)


def expected_pixels(stats_BCHW: Tensor) -> Tensor:
    """Six channels, three means and three log-scales of the logit-Laplace → mapped pixels (B, 3, H, W)."""
    return torch.sigmoid(stats_BCHW[:, :3])


def to_uint8(x_BCHW: Tensor) -> Tensor:
    """[0, 1] → uint8 (B, H, W, 3), to the nearest level."""
    return (x_BCHW * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class LossParts(NamedTuple):
    """Each a mean over the batch; `loss` = `reconstruction` + β·`kl` + γ·`usage_kl`, the last two per value."""

    loss: Tensor
    reconstruction: Tensor  # per value: nats for logit_laplace, squared or absolute error otherwise
    kl: Tensor  # nats per position
    usage_kl: Tensor | None = None  # nats; None where it has no weight


Expected = Callable[[Tensor], Tensor]  # pixel statistics → the mapped pixels that they describe


def loss_parts(
    stats_BCHW: Tensor,
    x_BCHW: Tensor,
    kl_N: Tensor,
    kl_weight: float,
    config: LossConfig,
    expected: Expected = expected_pixels,
) -> LossParts:
    """`kl_N`: KL(q(z|x) ‖ uniform) of each position, in nats, from the noiseless logits."""
    reconstruction = negative_log_likelihood(stats_BCHW, x_BCHW, config, expected).mean() / x_BCHW[0].numel()
    kl = kl_N.mean()
    if not kl_weight:  # no gradient of zeros, for the bottleneck computes whatever it is asked for
        return LossParts(reconstruction, reconstruction, kl.detach())
    return LossParts(reconstruction + kl_weight * kl * _positions_per_value(x_BCHW, len(kl_N)), reconstruction, kl)


def with_usage(
    parts: LossParts,
    x_BCHW: Tensor,
    posterior_K: Tensor,
    num_positions: int,
    weight: float,
    mean_over_ranks: Callable[[Tensor], Tensor],
) -> LossParts:
    """`posterior_K`: the mean noiseless posterior of these positions."""
    usage = usage_kl(posterior_K, mean_over_ranks)
    loss = parts.loss + weight * usage * _positions_per_value(x_BCHW, num_positions)
    return parts._replace(loss=loss, usage_kl=usage)


def _positions_per_value(x_BCHW: Tensor, num_positions: int) -> float:
    """1/192 at downsampling 8: how a mean over positions enters a mean over values."""
    return num_positions / x_BCHW.numel()


def negative_log_likelihood(
    stats_BCHW: Tensor, x_BCHW: Tensor, config: LossConfig, expected: Expected = expected_pixels
) -> Tensor:
    """(B,): summed over an image's values. `l2` and `l1` have neither constants nor log-scales."""
    if config.likelihood == "logit_laplace":
        return logit_laplace_nats(x_BCHW, *stats_BCHW.chunk(2, dim=1)).flatten(1).sum(dim=1)
    error_BCHW = x_BCHW - expected(stats_BCHW)
    penalty_BCHW = error_BCHW.square() if config.likelihood == "l2" else error_BCHW.abs()
    return penalty_BCHW.flatten(1).sum(dim=1)


def logit_laplace_nats(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """−ln of f(x | μ, b) = exp(−|logit x − μ| / b) / (2 b x (1 − x)). No term is dropped: nats are real."""
    log_scale = log_scale.clamp(*LOG_SCALE_RANGE)
    distance = (torch.logit(x) - mean).abs() * torch.exp(-log_scale)
    return math.log(2.0) + log_scale + torch.log(x * (1.0 - x)) + distance


def usage_kl(posterior_K: Tensor, mean_over_ranks: Callable[[Tensor], Tensor]) -> Tensor:
    """KL of the mean posterior to uniform. Exact over all ranks once DDP has averaged their gradients:
    d/dθ Σ q̄ ln q̄ is the mean over ranks of Σ (ln q̄ + 1) dq̄_rank/dθ, so q̄ itself needs no gradient."""
    mean_K = mean_over_ranks(posterior_K.detach())
    log_mean_K = mean_K.clamp_min(torch.finfo(mean_K.dtype).tiny).log()
    value = (mean_K * log_mean_K).sum() + math.log(len(posterior_K))
    slope = ((log_mean_K + 1.0) * posterior_K).sum()
    return value + slope - slope.detach()
