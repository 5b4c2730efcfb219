"""Split keys add up to the keys, and their search finds what fp32 finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.code_search import CodeSearch, SplitCodeSearch, split_keys
from model.quantizer import CodeTables, logits

# N positions, K codes, C channels


def _tables(num_codes: int = 1000, channels: int = 96, spread: float = 1.0, *, bias: bool = True) -> CodeTables:
    generator = torch.Generator().manual_seed(0)
    keys_KC = torch.randn(num_codes, channels, generator=generator) * spread
    keys_KC *= 2.0 ** torch.randint(-12, 3, keys_KC.shape, generator=generator)  # large and small side by side
    bias_K = torch.randn(num_codes, generator=generator) if bias else None
    return CodeTables(keys_KC, bias_K, keys_KC, None)


def _z(dtype: torch.dtype, num: int = 300, channels: int = 96) -> torch.Tensor:
    return torch.relu(torch.randn(num, channels, generator=torch.Generator().manual_seed(1))).to(dtype)


def test_three_bf16_parts_add_up_to_every_bit_of_an_fp32_key():
    tables = _tables()
    parts_PKC, bias_PK = split_keys(tables, torch.bfloat16)
    assert parts_PKC.shape == (3, 1000, 96) and parts_PKC.dtype == torch.bfloat16
    assert torch.equal(parts_PKC.double().sum(dim=0), tables.keys_KC.double())
    assert torch.equal(bias_PK.double().sum(dim=0), tables.key_bias_K.double())


@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e6])
def test_two_fp16_parts_hold_a_key_to_the_rounding_of_fp32_or_to_a_tiny_share_of_the_largest(spread):
    tables = _tables(spread=spread, bias=False)
    parts_PKC, _ = split_keys(tables, torch.float16)
    assert parts_PKC.isfinite().all()
    whole_KC, keys_KC = parts_PKC.double().sum(dim=0), tables.keys_KC.double()
    scale = float(2.0 ** torch.log2((whole_KC / keys_KC).median()).round())
    error_KC = (whole_KC / scale - keys_KC).abs()
    assert (error_KC <= torch.maximum(keys_KC.abs() * 2.0**-22, keys_KC.abs().max() * 2.0**-36)).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_split_search_finds_the_codes_of_fp64_but_for_ties_of_fp32(dtype, bias):
    tables, z_NC = _tables(bias=bias), _z(dtype)
    found_N = SplitCodeSearch(tables, 128, dtype)(z_NC).long()  # three chunks, the last one short
    exact_NK = logits(z_NC.double(), CodeTables(*(t.double() if t is not None else None for t in tables)))
    best_N = exact_NK.amax(dim=1)
    lost_N = best_N - exact_NK.gather(1, found_N[:, None])[:, 0]
    assert found_N.shape == (300,) and float((lost_N / best_N).max()) < 1e-6
    assert float((found_N == exact_NK.argmax(dim=1)).float().mean()) > 0.99


@pytest.mark.parametrize("bias", [True, False])
def test_a_reused_buffer_gives_the_logits_of_a_fresh_one_bit_for_bit(bias):
    tables, z_NC = _tables(bias=bias), _z(torch.float32)
    assert torch.equal(logits(z_NC, tables, out=torch.empty(300, 1000)), logits(z_NC, tables))


def test_the_search_takes_the_first_of_equal_codes_and_any_number_of_rows():
    tables = _tables(bias=False)
    tables.keys_KC[500:] = tables.keys_KC[:500]
    search, z_NC = CodeSearch(tables, 64), _z(torch.float32)
    found_N = search(z_NC)
    assert found_N.dtype == torch.int32 and int(found_N.max()) < 500
    assert np.array_equal(found_N.numpy(), logits(z_NC, tables).numpy().argmax(axis=1))
