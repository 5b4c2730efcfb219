"""The faster ways give the bits of the plain ones, or are not taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model import quantizer, same_bits
from model.checkpoint import Checkpoint, tokenizer_id
from model.code_search import CodeSearch
from model.config import DVAEConfig
from model.dvae import seeded_dvae
from model.quantizer import CodeTables
from model.tokenizer import DVAETokenizer

# N positions, K codes, C channels

CONFIG = DVAEConfig(codebook_size=4096, width=16, blocks_per_group=1, decoder_init=8, stem="strided")
SPEC = {"size": 64, "version": 1}


def _tokenizer() -> DVAETokenizer:
    weights = dict(seeded_dvae(CONFIG, 0).state_dict())
    checkpoint = Checkpoint(weights, CONFIG, SPEC, 0, tokenizer_id(weights, CONFIG, SPEC))
    return DVAETokenizer(checkpoint, device="cpu", batch_size=12)


def _tables(num_codes: int, *, bias: bool) -> CodeTables:
    generator = torch.Generator().manual_seed(0)
    keys_KC = torch.randn(num_codes, 32, generator=generator)
    return CodeTables(keys_KC, torch.randn(num_codes, generator=generator) if bias else None, keys_KC, None)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_codes", [2048, 3000, 8192, 70_000])
def test_the_packed_search_finds_the_same_codes_the_first_of_equals_too(num_codes, bias):
    tables = _tables(num_codes, bias=bias)
    tables.keys_KC[num_codes // 2 :] = tables.keys_KC[: num_codes - num_codes // 2]
    plain = CodeSearch(tables, 700)
    packed = same_bits.PackedSearch(tables, plain.rows)
    z_NC = torch.relu(torch.randn(700, 32, generator=torch.Generator().manual_seed(1)))
    assert packed(z_NC).dtype == torch.int32
    assert torch.equal(packed(z_NC), plain(z_NC))


def test_a_packed_search_that_differs_in_one_bit_is_not_taken(monkeypatch):
    tables, honest = _tables(2048, bias=True), same_bits.PackedSearch.logits
    plain = CodeSearch(tables, 300)
    ratios = iter([0.5, 2.0])
    monkeypatch.setattr(same_bits, "_time_ratio", lambda way, plain: next(ratios))
    assert same_bits.packed_search(tables, plain, 300) is not None
    assert same_bits.packed_search(tables, plain, 300) is None, "it was slower"
    monkeypatch.setattr(same_bits.PackedSearch, "logits", lambda self, z: honest(self, z) * (1 + 2**-23))
    assert same_bits.packed_search(tables, plain, 300) is None


def test_the_packed_search_is_compared_with_the_product_that_it_stands_for(monkeypatch):
    """`out=` is another way through torch than without."""
    tables, honest = _tables(2048, bias=True), quantizer.logits
    plain = CodeSearch(tables, 300)
    monkeypatch.setattr(
        quantizer, "logits", lambda z, tables, out=None: honest(z, tables) * (1 + 2**-23 if out is not None else 1)
    )
    monkeypatch.setattr(same_bits, "_time_ratio", lambda way, plain: 0.5)
    assert same_bits.packed_search(tables, plain, 300) is None


def test_a_torch_without_the_operators_searches_the_plain_way(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    tables = _tables(2048, bias=True)
    assert same_bits.packed_search(tables, CodeSearch(tables, 300), 300) is None


@pytest.mark.parametrize("bits_agree", [True, False])
def test_tokens_are_the_same_whether_a_batch_is_computed_whole_or_in_parts(bits_agree, monkeypatch):
    pixels_BHWC = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    expected = _tokenizer().encode(pixels_BHWC)
    monkeypatch.setattr(same_bits, "BLOCK_BYTES", 5 * 16 * 16 * 16 * 4)  # of five images: four divide the batch
    monkeypatch.setattr(same_bits, "is_better", lambda way, plain: bool(len(way()) == len(plain())) and bits_agree)
    tokenizer = _tokenizer()
    assert tokenizer._latents._at_once == 4
    assert (tokenizer._latents._latents == tokenizer._latents._in_parts) == bits_agree
    assert np.array_equal(tokenizer.encode(pixels_BHWC), expected)


def test_a_way_is_better_when_every_bit_agrees_and_it_takes_no_more_time_or_nearly_so(monkeypatch):
    plain, near = torch.ones(3), torch.ones(3) + 2**-23

    def fast() -> torch.Tensor:
        return plain.clone()

    def slow() -> torch.Tensor:
        return plain

    for ratio in (1.2, 2.0):
        seconds = {fast: iter([9.0, *[1.0] * 9]), slow: iter([ratio] * 10)}  # one run was disturbed
        monkeypatch.setattr(same_bits, "_seconds", lambda work, seconds=seconds: next(seconds[work]))
        assert same_bits.is_better(fast, slow)
        assert same_bits.is_better(slow, fast) == (ratio < same_bits.NEARLY)
    assert not same_bits.is_better(lambda: near, slow)


def test_as_many_images_at_once_as_fit_and_divide_the_batch():
    mib = 1 << 20
    assert same_bits.images_at_once(64, mib // 4) == 2
    assert same_bits.images_at_once(64, mib // 64) == 32
    assert same_bits.images_at_once(15, mib // 16) == 5
    assert same_bits.images_at_once(64, 8 * mib) == 64, "not one fits: the batch as it is"
    assert same_bits.images_at_once(1, 1) == 1


def test_loading_draws_nothing_from_torchs_own_random_numbers():
    before = torch.get_rng_state()
    _tokenizer()
    assert torch.equal(torch.get_rng_state(), before)
