"""What the bottleneck is made of: logits over the codes, Gumbel noise, the latent of hard codes.

Both heads are one form: logits = z·keysᵀ + bias, latent = Σ y·codes + bias. Noise is a hash of (seed, step, slot,
position, code), so it depends neither on how the global batch is split over ranks nor on the device, and any rows of
it can be drawn anew. bottleneck.py puts the parts together for training.
"""
# B batch, N positions (B·H·W), n some of them, K codes, C channels of the keys, D channels of the codes

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


class GumbelNoise:
    """Standard Gumbel noise (N, K) of a batch, in fp32, any rows of it at any time.

    −ln(−ln u) with u in the middle of one of 2^23 cells of (0, 1), never 0 or 1: noise lies in (−2.9, 16.7).
    """

    def __init__(self, keys_B2: Tensor, num_positions: int, num_codes: int) -> None:
        """`num_positions` of each sample."""
        positions = torch.arange(num_positions, dtype=torch.int32, device=keys_B2.device)
        self._first_N1 = (positions * num_codes).repeat(len(keys_B2))[:, None]  # counter of a position's first code
        self._keys_N2 = keys_B2.repeat_interleave(num_positions, dim=0)
        self._codes_K = torch.arange(num_codes, dtype=torch.int32, device=keys_B2.device)

    def draw(self, rows: slice, out_nK: Tensor, spare_nK: Tensor) -> Tensor:
        """Into the first buffer; what was in the second is lost. Both fp32 and contiguous."""
        bits_nK, spare = out_nK.view(torch.int32), spare_nK.view(torch.int32)
        torch.add(self._first_N1[rows], self._codes_K, out=bits_nK)
        bits_nK ^= self._keys_N2[rows, :1]
        _hash32(bits_nK, spare)
        bits_nK += self._keys_N2[rows, 1:]
        _hash32(bits_nK, spare)
        _shifted_right(bits_nK, 9, out=bits_nK)
        bits_nK |= 0x3F800000  # fp32 of 1 + cell·2^-23
        return out_nK.sub_(1 - 2.0**-24).log_().neg_().log_().neg_()  # the difference is exact: (cell + 0.5)·2^-23


def _hash32(x: Tensor, spare: Tensor) -> None:
    """lowbias32 (C. Wellons, "Prospecting for hash functions"), a bijection; changes x in place."""
    x ^= _shifted_right(x, 16, out=spare)
    x *= 0x7FEB352D
    x ^= _shifted_right(x, 15, out=spare)
    x *= 0x846CA68B - 2**32
    x ^= _shifted_right(x, 16, out=spare)


def _shifted_right(x: Tensor, bits: int, *, out: Tensor) -> Tensor:
    """Logical shift of an int32 tensor; torch's own keeps the sign."""
    return torch.bitwise_right_shift(x, bits, out=out).bitwise_and_((1 << (32 - bits)) - 1)
