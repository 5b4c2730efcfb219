"""What training minimises: −ln p(x|z) + β·KL(q(z|x) ‖ uniform), per image, divided by its number of values.

Everything is in fp32, and a mean over images: the loss depends on neither batch, world size nor resolution.
Pixels are the paper's mapped ones: 0.8·x + 0.1 for x in [0, 1] (arXiv 2102.12092, appendix A.3).
"""
# B batch, C channels, H W rows and columns of pixels, N positions, K codes

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import LossConfig

LOG_SCALE_RANGE = (-7.0, 3.0)


def map_pixels(pixels_BHWC: Tensor) -> Tensor:
    """uint8 → (B, 3, H, W) in [0.1, 0.9], fp32, laid out channels-last."""
    return (pixels_BHWC.to(torch.float32) / 255.0).mul_(0.8).add_(0.1).permute(0, 3, 1, 2)


def unmap_pixels(x: Tensor) -> Tensor:
    """[0.1, 0.9] → [0, 1], clamped."""
    return ((x - 0.1) / 0.8).clamp(0.0, 1.0)


def reconstruction(stats_BCHW: Tensor) -> Tensor:
    """The decoder's six channels → (B, 3, H, W) in [0, 1]."""
    return unmap_pixels(torch.sigmoid(stats_BCHW[:, :3]))


def to_uint8(x_BCHW: Tensor) -> Tensor:
    """[0, 1] → uint8 (B, H, W, 3), to the nearest level."""
    return (x_BCHW * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class LossParts(NamedTuple):
    """Each a mean over the batch; `loss` = `reconstruction` + β · KL per value."""

    loss: Tensor
    reconstruction: Tensor  # per value: nats for logit_laplace, squared or absolute error otherwise
    kl: Tensor  # nats per position


def loss_parts(
    stats_BCHW: Tensor, x_BCHW: Tensor, logits_NK: Tensor, kl_weight: float, config: LossConfig
) -> LossParts:
    values_per_image = x_BCHW[0].numel()
    per_value = negative_log_likelihood(stats_BCHW, x_BCHW, config).mean() / values_per_image
    kl_per_position = kl_to_uniform(logits_NK).mean()
    positions_per_image = logits_NK.shape[0] // x_BCHW.shape[0]
    loss = per_value + kl_weight * kl_per_position * positions_per_image / values_per_image
    return LossParts(loss, per_value, kl_per_position)


def negative_log_likelihood(stats_BCHW: Tensor, x_BCHW: Tensor, config: LossConfig) -> Tensor:
    """(B,): summed over an image's values. `l2` and `l1` have neither constants nor log-scales."""
    mean_BCHW, log_scale_BCHW = stats_BCHW.chunk(2, dim=1)
    if config.likelihood == "logit_laplace":
        return logit_laplace_nats(x_BCHW, mean_BCHW, log_scale_BCHW).flatten(1).sum(dim=1)
    error_BCHW = x_BCHW - torch.sigmoid(mean_BCHW)
    penalty_BCHW = error_BCHW.square() if config.likelihood == "l2" else error_BCHW.abs()
    return penalty_BCHW.flatten(1).sum(dim=1)


def logit_laplace_nats(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """−ln of f(x | μ, b) = exp(−|logit x − μ| / b) / (2 b x (1 − x)). No term is dropped: nats are real."""
    log_scale = log_scale.clamp(*LOG_SCALE_RANGE)
    distance = (torch.logit(x) - mean).abs() * torch.exp(-log_scale)
    return math.log(2.0) + log_scale + torch.log(x * (1.0 - x)) + distance


def kl_to_uniform(logits_NK: Tensor) -> Tensor:
    """(N,): Σ π ln π + ln K, from the noiseless logits."""
    log_probs_NK = F.log_softmax(logits_NK, dim=-1)
    return (log_probs_NK.exp() * log_probs_NK).sum(dim=-1) + math.log(logits_NK.shape[-1])
