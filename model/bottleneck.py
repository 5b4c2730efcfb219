"""The bottleneck, fused: z → relaxed latent, KL, mean posterior and tokens, forward and backward.

softmax((z·keysᵀ + bias + g)/τ)·codes is attention with noise. As in flash attention (arXiv 2205.14135) no (N, K) tensor
is ever whole: positions pass in chunks that stay in the cache, through buffers that are made once, and the backward
pass computes the logits and the noise of each chunk anew. Between the passes one number is kept for each position. But
where the keys are wide (OpenAI's head), logits cost more than all else together: then they are kept, once.
All of it is in z's type, fp32 when training, whatever autocast says.
"""
# N positions, n of one chunk, K codes, C channels of the keys, D channels of the codes; d_x: the loss's gradient in x

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model import quantizer
from model.code_search import best_codes
from model.quantizer import CodeTables, GumbelNoise

CHUNK_BYTES = 4 << 20  # of one (n, K) buffer: three of them stay in the cache of a CPU
WIDE_CHUNK_BYTES = 16 << 20  # products with wide keys gain more from many rows than they lose
CUDA_CHUNK_BYTES = 128 << 20
WIDE = 1024  # channels of keys from which on logits are kept for the backward pass


class CodeFigures(NamedTuple):
    """Of the noiseless posteriors π. The first two are differentiable."""

    kl_N: Tensor  # nats, KL(π ‖ uniform)
    posterior_K: Tensor  # the mean π of these positions
    tokens_N: Tensor  # the code of the largest π, int64


def relaxed_latent(
    z_NC: Tensor, tables: CodeTables, noise: GumbelNoise, temperature: float
) -> tuple[Tensor, CodeFigures]:
    """softmax((log π + g)/τ)·codes + bias, (N, D), differentiable in z and in the tables; and the figures."""
    keep = torch.is_grad_enabled() and z_NC.shape[1] >= WIDE
    with torch.autocast(z_NC.device.type, enabled=False):
        latent_ND, *figures = _Bottleneck.apply(z_NC, *tables, noise, temperature, keep)  # type: ignore[no-untyped-call]
    return latent_ND, CodeFigures(*figures)


def chunk_rows(num_codes: int, num_channels: int, device_type: str) -> int:
    num_bytes = CHUNK_BYTES if num_channels < WIDE else WIDE_CHUNK_BYTES
    return max(1, (CUDA_CHUNK_BYTES if device_type == "cuda" else num_bytes) // (4 * num_codes))


@torch.no_grad()
def mean_posterior(z_NC: Tensor, tables: CodeTables) -> Tensor:
    """`CodeFigures.posterior_K` alone, without gradients."""
    posterior_K = z_NC.new_zeros(len(tables.keys_KC))
    chunks = _Chunks(z_NC, tables)
    for rows, _, probs_nK, _ in chunks:
        posterior_K += torch.softmax(chunks.logits(rows), dim=-1, out=probs_nK).sum(dim=0)
    return posterior_K / len(z_NC)


class _Chunks:
    """The positions, chunk by chunk, through three buffers of (n, K)."""

    def __init__(self, z_NC: Tensor, tables: CodeTables) -> None:
        self._z_NC, self._tables = z_NC, tables
        num_codes, device = len(tables.keys_KC), z_NC.device
        self._num_rows = max(1, min(len(z_NC), chunk_rows(num_codes, z_NC.shape[1], device.type)))
        self._buffers = tuple(z_NC.new_empty(self._num_rows, num_codes) for _ in range(3))
        self._for_noise = self._buffers[1:]
        if z_NC.dtype != torch.float32:  # noise is fp32 always
            self._for_noise = tuple(torch.empty(self._num_rows, num_codes, device=device) for _ in range(2))

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Which positions, and the three buffers."""
        for begin in range(0, len(self._z_NC), self._num_rows):
            rows = slice(begin, min(begin + self._num_rows, len(self._z_NC)))
            first_nK, second_nK, third_nK = (each[: rows.stop - begin] for each in self._buffers)
            yield rows, first_nK, second_nK, third_nK

    def logits(self, rows: slice, kept_NK: Tensor | None = None) -> Tensor:
        """In the first buffer, or in their place among those that are kept."""
        out_nK = self._buffers[0][: rows.stop - rows.start] if kept_NK is None else kept_NK[rows]
        return quantizer.logits(self._z_NC[rows], self._tables, out=out_nK)

    def relaxed(self, rows: slice, logits_nK: Tensor, noise: GumbelNoise, temperature: float) -> Tensor:
        """softmax((logits + g)/τ) in the third buffer; what was in the second is lost. The logits may be short of a
        constant for each position: no softmax sees it."""
        n = rows.stop - rows.start
        noise_nK = noise.draw(rows, *(each[:n] for each in self._for_noise))
        mixed_nK = torch.add(logits_nK, noise_nK, out=self._buffers[1][:n]).div_(temperature)
        return torch.softmax(mixed_nK, dim=-1, out=self._buffers[2][:n])


class _Gradients:
    """Of z and of the tables, added up over the chunks; None where nobody asked."""

    def __init__(self, z_NC: Tensor, tables: CodeTables, needed: Sequence[bool]) -> None:
        self._z_NC, self._tables = z_NC, tables
        self.z_NC, self.keys_KC, self.key_bias_K, self.codes_KD, self.code_bias_D = (
            torch.zeros_like(each) if each is not None and wanted else None
            for each, wanted in zip((z_NC, *tables), needed, strict=False)
        )

    def add_codes(self, soft_nK: Tensor, d_latent_nD: Tensor) -> None:
        if self.codes_KD is not None:
            self.codes_KD.addmm_(soft_nK.T, d_latent_nD)
        if self.code_bias_D is not None:
            self.code_bias_D += d_latent_nD.sum(dim=0)

    def add_logits(self, rows: slice, d_logits_nK: Tensor) -> None:
        if self.z_NC is not None:
            torch.mm(d_logits_nK, self._tables.keys_KC, out=self.z_NC[rows])
        if self.keys_KC is not None:
            self.keys_KC.addmm_(d_logits_nK.T, self._z_NC[rows])
        if self.key_bias_K is not None:
            self.key_bias_K += d_logits_nK.sum(dim=0)

    def all(self) -> tuple[Tensor | None, ...]:
        return self.z_NC, self.keys_KC, self.key_bias_K, self.codes_KD, self.code_bias_D


class _Bottleneck(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z_NC: Tensor,
        keys_KC: Tensor,
        key_bias_K: Tensor | None,
        codes_KD: Tensor,
        code_bias_D: Tensor | None,
        noise: GumbelNoise,
        temperature: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tables = CodeTables(keys_KC, key_bias_K, codes_KD, code_bias_D)
        latent_ND, posterior_K = z_NC.new_empty(len(z_NC), codes_KD.shape[1]), z_NC.new_zeros(len(keys_KC))
        log_sum_N1, kl_N = z_NC.new_empty(len(z_NC), 1), z_NC.new_empty(len(z_NC))
        kept_NK = z_NC.new_empty(len(z_NC), len(keys_KC)) if keep else None
        tokens_N = torch.empty(len(z_NC), dtype=torch.int64, device=z_NC.device)
        chunks = _Chunks(z_NC, tables)
        for rows, _, product_nK, exp_nK in chunks:
            logits_nK = chunks.logits(rows, kept_NK)
            tokens_N[rows] = best_codes(logits_nK)
            largest_n1 = logits_nK.gather(1, tokens_N[rows, None])
            total_n = torch.exp(logits_nK.sub_(largest_n1), out=exp_nK).sum(dim=1)
            log_sum_N1[rows] = total_n.log()[:, None] + (0.0 if keep else largest_n1)
            weighted_n = torch.mul(logits_nK, exp_nK, out=product_nK).sum(dim=1)
            kl_N[rows] = weighted_n / total_n - total_n.log() + math.log(len(keys_KC))  # Σ π ln π + ln K
            posterior_K.addmv_(exp_nK.T, 1.0 / (total_n * len(z_NC)))
            torch.mm(chunks.relaxed(rows, logits_nK, noise, temperature), codes_KD, out=latent_ND[rows])
        if code_bias_D is not None:
            latent_ND += code_bias_D
        ctx.save_for_backward(z_NC, *tables, log_sum_N1, kept_NK)
        ctx.noise, ctx.temperature = noise, temperature
        ctx.mark_non_differentiable(tokens_N)
        ctx.set_materialize_grads(False)
        return latent_ND, kl_N, posterior_K, tokens_N

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_latent_ND: Tensor | None, d_kl_N: Tensor | None, d_posterior_K: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        z_NC, *saved, log_sum_N1, kept_NK = ctx.saved_tensors
        tables = CodeTables(*saved)
        gradients = _Gradients(z_NC, tables, ctx.needs_input_grad)
        d_mean_K = None if d_posterior_K is None else d_posterior_K / len(z_NC)
        chunks = _Chunks(z_NC, tables)
        for rows, log_probs_nK, d_logits_nK, probs_nK in chunks:
            logits_nK = chunks.logits(rows) if kept_NK is None else kept_NK[rows]
            if d_latent_ND is None:
                d_logits_nK.zero_()
            else:
                soft_nK = chunks.relaxed(rows, logits_nK, ctx.noise, ctx.temperature)
                gradients.add_codes(soft_nK, d_latent_ND[rows])
                torch.mm(d_latent_ND[rows] / ctx.temperature, tables.codes_KD.T, out=d_logits_nK)
                _through_softmax(d_logits_nK, soft_nK)
            if d_kl_N is not None or d_mean_K is not None:
                torch.sub(logits_nK, log_sum_N1[rows], out=log_probs_nK)
                torch.exp(log_probs_nK, out=probs_nK)
                d_kl_n1 = 0.0 if d_kl_N is None else d_kl_N[rows, None]
                d_probs_nK = _d_probs(log_probs_nK, d_kl_n1, d_mean_K)
                d_logits_nK += _through_softmax(d_probs_nK, probs_nK)
            gradients.add_logits(rows, d_logits_nK)
        return *gradients.all(), None, None, None


def _d_probs(log_probs_nK: Tensor, d_kl_n1: Tensor | float, d_mean_K: Tensor | None) -> Tensor:
    """In place: d(Σ π ln π)/dπ is ln π + 1, and the softmax behind it doesn't see the constant."""
    d_probs_nK = log_probs_nK.mul_(d_kl_n1)
    return d_probs_nK if d_mean_K is None else d_probs_nK.add_(d_mean_K)


def _through_softmax(d_probs_nK: Tensor, probs_nK: Tensor) -> Tensor:
    """y·(dy − Σ y·dy), in place: a softmax's input gets this of its output's gradient."""
    d_probs_nK.mul_(probs_nK)
    return d_probs_nK.addcmul_(probs_nK, d_probs_nK.sum(dim=1, keepdim=True), value=-1.0)
