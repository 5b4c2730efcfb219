"""Evaluation sums: they add up, travel as one array, and give the figures that they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from model.metrics import EvalSums, eval_sums, psnr
from model.similarity import ssim
from plain_bottleneck import plain_figures

# B batch, N positions, K codes


def _sums(seed: int, num_positions: int = 32) -> EvalSums:
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(2, 3, 8, 8, generator=g)
    logits_NK = 3 * torch.randn(num_positions, 10, generator=g)
    hard = (x + 0.1).clamp(0, 1)
    return eval_sums(x, x + 0.01, hard, torch.rand(2, generator=g), plain_figures(logits_NK))


def test_sums_travel_as_one_array_and_add_in_it():
    one, other = _sums(1), _sums(2)
    array = one.to_array() + other.to_array()
    assert array.dtype == np.float64
    added = one + other
    assert np.array_equal(added.to_array(), array)
    assert EvalSums.from_array(array).metrics() == added.metrics()
    assert (EvalSums.zeros(10) + one).metrics() == one.metrics()


def test_psnr_is_of_the_pixels_in_the_unit_range():
    assert _sums(0).metrics()["psnr_soft"] == pytest.approx(40.0, abs=0.01)
    assert psnr(0.01) == pytest.approx(20.0)
    assert psnr(0.0) == 100.0


def test_ssim_is_that_of_torchmetrics_and_small_pictures_have_none():
    torchmetrics = pytest.importorskip("torchmetrics.functional.image")
    g = torch.Generator().manual_seed(0)
    for height, width in ((40, 33), (6, 16)):
        x = torch.rand(3, 3, height, width, generator=g).to(memory_format=torch.channels_last)
        made = (x + 0.1 * torch.randn(x.shape, generator=g)).clamp(0, 1)
        theirs = torchmetrics.structural_similarity_index_measure(made, x, data_range=1.0, reduction="none")
        assert ssim(made, x) == pytest.approx(theirs, abs=1e-5)
    metrics = (_sums(1) + _sums(2)).metrics()
    assert 0 < metrics["ssim_hard"] < 1
    tiny = torch.rand(1, 3, 4, 4)
    alone = eval_sums(tiny, tiny, tiny, torch.zeros(1), plain_figures(torch.zeros(1, 8)))
    assert not {"ssim_soft", "ssim_hard"} & (EvalSums.zeros(8) + alone).metrics().keys()


def test_kl_is_information_plus_use_and_entropy_makes_up_the_rest():
    metrics = (_sums(3) + _sums(4)).metrics()
    assert metrics["kl"] == pytest.approx(metrics["information"] + metrics["usage_kl"])
    assert metrics["kl"] == pytest.approx(math.log(10) - metrics["posterior_entropy"], rel=1e-5)
    assert metrics["information"] >= 0 and metrics["usage_kl"] >= 0


def test_codes_are_counted_by_their_argmax():
    logits_NK = torch.full((8, 16), -50.0)
    logits_NK[torch.arange(8), torch.tensor([3, 3, 3, 3, 5, 5, 7, 7])] = 50.0
    x = torch.zeros(1, 3, 8, 8)
    metrics = eval_sums(x, x, x, torch.zeros(1), plain_figures(logits_NK)).metrics()
    assert (metrics["used_share"], metrics["dead_codes"], metrics["top_share"]) == (3 / 16, 13.0, 0.5)
    assert metrics["perplexity"] == pytest.approx(2**1.5)
    assert metrics["posterior_entropy"] == pytest.approx(0.0, abs=1e-6)


def test_one_code_for_everything_is_a_perplexity_of_one():
    logits_NK = torch.zeros(4, 8)
    x = torch.zeros(1, 3, 8, 8)
    metrics = eval_sums(x, x, x, torch.zeros(1), plain_figures(logits_NK)).metrics()
    assert metrics["perplexity"] == pytest.approx(1.0)
    assert metrics["posterior_entropy"] == pytest.approx(math.log(8))
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-6)


def test_no_image_at_all_is_an_error_not_a_figure():
    with pytest.raises(ValueError, match="held-out shards are empty"):
        EvalSums.zeros(10).metrics()
