"""The bottleneck as a textbook has it, through tensors of (N, K): what the fused form is held against.

It is the code that trained before the fused form did, so that the bits of the noise are those of then.
"""
# B batch, N positions, K codes, C channels of the keys, D channels of the codes

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model.bottleneck import CodeFigures
from model.quantizer import CodeTables


def plain_latent(z_NC: Tensor, tables: CodeTables, keys_B2: Tensor, temperature: float) -> tuple[Tensor, CodeFigures]:
    """What `bottleneck.relaxed_latent` computes, differentiated by autograd."""
    logits_NK = F.linear(z_NC, tables.keys_KC, tables.key_bias_K)
    noise_NK = plain_noise(keys_B2, len(z_NC) // len(keys_B2), logits_NK.shape[1])
    soft_NK = torch.softmax((logits_NK + noise_NK) / temperature, dim=-1)
    latent_ND = F.linear(soft_NK, tables.codes_KD.T, tables.code_bias_D)
    return latent_ND, plain_figures(logits_NK)


def plain_figures(logits_NK: Tensor) -> CodeFigures:
    log_probs_NK = F.log_softmax(logits_NK, dim=-1)
    probs_NK = log_probs_NK.exp()
    kl_N = (probs_NK * log_probs_NK).sum(dim=-1) + math.log(logits_NK.shape[-1])
    return CodeFigures(kl_N, probs_NK.mean(dim=0), logits_NK.argmax(dim=-1))


def plain_noise(keys_B2: Tensor, num_positions: int, num_codes: int) -> Tensor:
    """(N, K) in fp32."""
    counter = torch.arange(num_positions * num_codes, dtype=torch.int32, device=keys_B2.device)
    bits = _hash32(counter ^ keys_B2[:, :1]).add_(keys_B2[:, 1:])
    cells = _shift_right_(_hash32(bits), 9)
    uniform = cells.to(torch.float32).add_(0.5).mul_(2.0**-23)
    return uniform.log_().neg_().log_().neg_().view(-1, num_codes)


def _hash32(x: Tensor) -> Tensor:
    x ^= _shift_right_(x.clone(), 16)
    x *= 0x7FEB352D
    x ^= _shift_right_(x.clone(), 15)
    x *= 0x846CA68B - 2**32
    x ^= _shift_right_(x.clone(), 16)
    return x


def _shift_right_(x: Tensor, bits: int) -> Tensor:
    x >>= bits
    x &= (1 << (32 - bits)) - 1
    return x
