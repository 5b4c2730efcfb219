"""The best code of each position: argmax of z · keysᵀ + bias, holding no more logits than a chunk of them.

Logits are fp32, from fp32 keys. Where z comes as bf16 or fp16 (on CUDA, with the conv head), fp32 products would cost
more than all convolutions together: an H100 multiplies fp32 at a tenth of bf16's speed, and the head is an eighth of
the FLOPs. So the keys are split into parts of z's own type that add up to them, and [z z z] · [k₁ k₂ k₃]ᵀ is one
product with fp32 sums: every product of two halves is exact in fp32, so only the order of the sum differs from fp32's.
Three parts of bf16 hold 24 bits, which is all of an fp32 key; two of fp16, scaled, hold 22.
"""
# N positions, n of one chunk, K codes, C channels of the keys, P parts

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from model import quantizer
from model.quantizer import CodeTables

CPU_CHUNK_BYTES = 8 << 20  # of logits: they stay in the cache between the product and its argmax
CUDA_CHUNK_BYTES = 128 << 20  # whole waves of tiles: 4096 positions of 8192 codes
PARTS = {torch.bfloat16: 3, torch.float16: 2}
ALIGNED = 64  # rows of a product end on whole tiles


def chunk_rows(num_codes: int, device_type: str) -> int:
    return max(1, (CUDA_CHUNK_BYTES if device_type == "cuda" else CPU_CHUNK_BYTES) // (4 * num_codes))


class CodeSearch:
    """z (N, C) → int32 (N,), in fp32. One buffer for all calls, made anew for none: on the CPU its page faults would
    cost half as much as the product. Not for several threads at once."""

    def __init__(self, tables: CodeTables, num_rows: int) -> None:
        device = tables.keys_KC.device
        self.rows = min(num_rows, chunk_rows(len(tables.keys_KC), device.type))
        self._tables = tables
        self._logits_nK = torch.empty((self.rows, len(tables.keys_KC)), device=device)

    def __call__(self, z_NC: Tensor) -> Tensor:
        return torch.cat([self._best(z_nC) for z_nC in torch.split(z_NC, self.rows)])

    def logits(self, z_NC: Tensor) -> Tensor:
        """All of them, to compare."""
        return torch.cat([self._logits(z_nC).clone() for z_nC in torch.split(z_NC, self.rows)])

    def _best(self, z_nC: Tensor) -> Tensor:
        return best_codes(self._logits(z_nC))

    def _logits(self, z_nC: Tensor) -> Tensor:
        return quantizer.logits(z_nC.float(), self._tables, out=self._logits_nK[: len(z_nC)])


class SplitCodeSearch:
    """z (N, C) in bf16 or fp16 → int32 (N,), as if all were fp32. Not for several threads at once."""

    def __init__(self, tables: CodeTables, num_rows: int, dtype: torch.dtype) -> None:
        keys_KC, num_codes = tables.keys_KC, len(tables.keys_KC)
        rows = min(num_rows, chunk_rows(num_codes, keys_KC.device.type))
        parts_PKC, bias_PK = split_keys(tables, dtype)
        self._width = keys_KC.shape[1]
        columns = [*parts_PKC.unbind(), bias_PK.T]
        self._keys_KX = _padded(torch.cat(columns, dim=1))
        self._z_nX = torch.zeros((rows, self._keys_KX.shape[1]), dtype=dtype, device=keys_KC.device)
        self._num_parts = len(parts_PKC)
        begin = self._num_parts * self._width
        self._z_nX[:, begin : begin + self._num_parts] = 1  # what the parts of the bias are multiplied with
        self._logits_nK = torch.empty((rows, num_codes), device=keys_KC.device)

    def __call__(self, z_NC: Tensor) -> Tensor:
        return torch.cat([self._best(z_nC) for z_nC in torch.split(z_NC, len(self._logits_nK))])

    def _best(self, z_nC: Tensor) -> Tensor:
        z_nX, logits_nK = self._z_nX[: len(z_nC)], self._logits_nK[: len(z_nC)]
        repeated_nPC = z_nX[:, : self._num_parts * self._width].view(len(z_nC), self._num_parts, self._width)
        repeated_nPC.copy_(z_nC[:, None, :])
        return best_codes(_fp32_product(z_nX, self._keys_KX.T, logits_nK))


def split_keys(tables: CodeTables, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(P, K, C) and (P, K): parts that add up to the keys and to their bias, times one power of two."""
    keys_KC, bias_K = tables.keys_KC.float(), tables.key_bias_K
    bias_K = keys_KC.new_zeros(len(keys_KC)) if bias_K is None else bias_K.float()
    rest_KC = torch.cat([keys_KC, bias_K[:, None]], dim=1) * _scale(keys_KC, bias_K, dtype)
    parts = []
    for _ in range(PARTS[dtype]):
        parts.append(rest_KC.to(dtype))
        rest_KC = rest_KC - parts[-1].float()
    parts_PKC = torch.stack(parts)
    return parts_PKC[..., :-1], parts_PKC[..., -1]


def _scale(keys_KC: Tensor, bias_K: Tensor, dtype: torch.dtype) -> float:
    """bf16 reaches as far as fp32; fp16 does not, so that the largest key comes to lie near the top of its range."""
    largest = max(float(keys_KC.abs().max()), float(bias_K.abs().max()))
    if dtype is torch.bfloat16 or largest == 0.0:
        return 1.0
    return float(2.0 ** (14 - math.frexp(largest)[1]))


def _padded(keys_KX: Tensor) -> Tensor:
    return torch.nn.functional.pad(keys_KX, (0, -keys_KX.shape[1] % ALIGNED))


def _fp32_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Of two bf16 or fp16 matrices, every product and sum in fp32."""
    if a.device.type == "cuda":
        return torch.mm(a, b, torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def best_codes(logits_NK: Tensor) -> Tensor:
    """int32. On the CPU by numpy: 16 times faster there than torch (2.13) at 8192 codes."""
    if logits_NK.device.type == "cpu":
        return torch.from_numpy(logits_NK.numpy().argmax(axis=1).astype(np.int32))
    return logits_NK.argmax(dim=1).to(torch.int32)
