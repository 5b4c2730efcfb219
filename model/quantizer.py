"""The bottleneck: logits over the codes, the Gumbel-softmax relaxation, the latent.

All of it is fp32; the caller turns autocast off. Both heads are one form: logits = z·keysᵀ + bias, latent =
Σ y·codes + bias. Noise is a hash of (seed, step, slot, position, code), so it depends neither on how the
global batch is split over ranks nor on the device.
"""
# B batch, N positions (B·H·W), K codes, C channels of the keys, D channels of the codes

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


class CodeTables(NamedTuple):
    keys_KC: Tensor
    key_bias_K: Tensor | None
    codes_KD: Tensor
    code_bias_D: Tensor | None


def logits(z_NC: Tensor, tables: CodeTables, *, out: Tensor | None = None) -> Tensor:
    """(N, K), in `out` if it is given."""
    if out is None:
        return F.linear(z_NC, tables.keys_KC, tables.key_bias_K)
    if tables.key_bias_K is None:
        return torch.mm(z_NC, tables.keys_KC.T, out=out)
    return torch.addmm(tables.key_bias_K, z_NC, tables.keys_KC.T, out=out)


def relax(logits_NK: Tensor, noise_NK: Tensor, temperature: float) -> Tensor:
    """softmax((log π + g) / τ); the softmax doesn't see the difference between logits and log π."""
    return torch.softmax((logits_NK + noise_NK) / temperature, dim=-1)


def soft_latent(soft_NK: Tensor, tables: CodeTables) -> Tensor:
    return F.linear(soft_NK, tables.codes_KD.T, tables.code_bias_D)


def hard_latent(tokens_N: Tensor, tables: CodeTables) -> Tensor:
    """The latent of one-hot codes, as a lookup."""
    latent_ND = F.embedding(tokens_N, tables.codes_KD)
    return latent_ND if tables.code_bias_D is None else latent_ND + tables.code_bias_D


def noise_keys(seed: int, step: int, slots_B: NDArray[np.int64]) -> Tensor:
    """Two 32-bit keys for each sample, from (seed, step, its slot in the global batch)."""
    step_key = _mix64(np.uint64(step) ^ _mix64(np.uint64(seed % 2**64)))
    key_B = _mix64(np.asarray(slots_B).astype(np.uint64) ^ step_key)
    return torch.from_numpy(key_B.view(np.int32).reshape(-1, 2).copy())


def _mix64(x: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    """splitmix64's output function (Steele, Lea, Flood 2014), after one step of its counter."""
    with np.errstate(over="ignore"):
        z = np.asarray(x, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))


def gumbel_noise(keys_B2: Tensor, num_positions: int, num_codes: int) -> Tensor:
    """Standard Gumbel noise (B·positions, K) in fp32.

    −ln(−ln u) with u in the middle of one of 2^23 cells of (0, 1), never 0 or 1: noise lies in (−2.9, 16.7).
    """
    counter = torch.arange(num_positions * num_codes, dtype=torch.int32, device=keys_B2.device)
    bits = _hash32(counter ^ keys_B2[:, :1]).add_(keys_B2[:, 1:])
    cells = _shift_right_(_hash32(bits), 9)
    uniform = cells.to(torch.float32).add_(0.5).mul_(2.0**-23)
    return uniform.log_().neg_().log_().neg_().view(-1, num_codes)


def _hash32(x: Tensor) -> Tensor:
    """lowbias32 (C. Wellons, "Prospecting for hash functions"), a bijection; changes x in place."""
    x ^= _shift_right_(x.clone(), 16)
    x *= 0x7FEB352D
    x ^= _shift_right_(x.clone(), 15)
    x *= 0x846CA68B - 2**32
    x ^= _shift_right_(x.clone(), 16)
    return x


def _shift_right_(x: Tensor, bits: int) -> Tensor:
    """Logical shift of an int32 tensor in place; torch's own shift keeps the sign."""
    x >>= bits
    x &= (1 << (32 - bits)) - 1
    return x
