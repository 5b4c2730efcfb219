"""The fused bottleneck is the plain one: same values, same gradients, and never a tensor of all positions and codes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model import bottleneck, quantizer
from model.bottleneck import CodeFigures, mean_posterior, relaxed_latent
from model.quantizer import CodeTables, GumbelNoise
from plain_bottleneck import plain_latent

# B batch, P positions of a sample, N = B·P, K codes, C channels of the keys, D channels of the codes

Latent = Callable[[Tensor, CodeTables, Tensor, float], tuple[Tensor, CodeFigures]]
KEYS_B2 = quantizer.noise_keys(3, 5, np.array([0, 7, 2]))


def fused_latent(z_NC: Tensor, tables: CodeTables, keys_B2: Tensor, temperature: float) -> tuple[Tensor, CodeFigures]:
    noise = GumbelNoise(keys_B2, len(z_NC) // len(keys_B2), len(tables.keys_KC))
    return relaxed_latent(z_NC, tables, noise, temperature)


def inputs(
    head: str, dtype: torch.dtype, num_positions: int, num_codes: int, scale: float
) -> tuple[Tensor, CodeTables]:
    """Leaves; the codes of `conv` lie transposed in memory, as the decoder has them."""
    g = torch.Generator().manual_seed(num_codes)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    z_NC, keys_KC = scale * drawn(len(KEYS_B2) * num_positions, 6), drawn(num_codes, 6)
    codes_KD, key_bias_K, code_bias_D = drawn(6, num_codes).T, drawn(num_codes), drawn(6)
    tables = CodeTables(keys_KC, key_bias_K, codes_KD, code_bias_D)
    if head == "inner_product":
        tables = CodeTables(keys_KC, None, keys_KC, None)
    for each in (z_NC, *tables):
        if each is not None:
            each.requires_grad_()
    return z_NC, tables


def everything(latent: Latent, given: tuple[Tensor, CodeTables], temperature: float) -> dict[str, Tensor]:
    """All values, and the gradients of a loss in which each has its own weights."""
    z_NC, tables = given
    latent_ND, codes = latent(z_NC, tables, KEYS_B2, temperature)
    g = torch.Generator().manual_seed(1)
    differentiable = {"latent": latent_ND, "kl": codes.kl_N, "posterior": codes.posterior_K}
    weights = {name: torch.randn(each.shape, generator=g, dtype=torch.float64) for name, each in differentiable.items()}
    loss = sum((weights[name].to(each.dtype) * each).sum() for name, each in differentiable.items())
    leaves = {"z": z_NC, **{name: each for name, each in tables._asdict().items() if each is not None}}
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    found = differentiable | {f"d {name}": each for name, each in zip(leaves, gradients, strict=True)}
    return {name: each.detach() for name, each in found.items()} | {"tokens": codes.tokens_N}


def farthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, each relative to the largest value of its tensor."""
    assert found.keys() == expected.keys() and torch.equal(found["tokens"], expected["tokens"])
    scales = {name: max(float(each.double().abs().max()), 1e-3) for name, each in expected.items()}
    return max(float((found[name].double() - expected[name].double()).abs().max()) / scales[name] for name in expected)


@pytest.fixture(params=[1, 4, 1000], ids=lambda rows: f"chunks of {rows}")
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bottleneck, "chunk_rows", lambda *_: request.param)


@pytest.fixture(params=[10**6, 1], ids=["logits again", "logits kept"])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bottleneck, "WIDE", request.param)


@pytest.mark.usefixtures("chunks", "kept")
@pytest.mark.parametrize("temperature", [1.0, 0.3, 1 / 16, 1e-3])
@pytest.mark.parametrize("head", ["conv", "inner_product"])
@pytest.mark.parametrize(("num_positions", "num_codes", "scale"), [(5, 37, 1.0), (1, 2, 1.0), (6, 64, 1e3)])
def test_values_and_gradients_are_those_of_the_plain_form(head, temperature, num_positions, num_codes, scale):
    given = inputs(head, torch.float64, num_positions, num_codes, scale)
    expected = everything(plain_latent, given, temperature)
    assert farthest(everything(fused_latent, given, temperature), expected) < 1e-10


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("temperature", [1.0, 1 / 16])
@pytest.mark.parametrize("head", ["conv", "inner_product"])
def test_in_fp32_it_is_about_as_close_to_fp64_as_the_plain_form(head, temperature):
    exact = everything(plain_latent, inputs(head, torch.float64, 16, 300, 1.0), temperature)
    given = inputs(head, torch.float32, 16, 300, 1.0)
    fused, plain = (farthest(everything(each, given, temperature), exact) for each in (fused_latent, plain_latent))
    assert fused < 4 * plain
    assert fused < 1e-5 / temperature


@pytest.mark.parametrize("head", ["conv", "inner_product"])
def test_autograd_agrees_with_finite_differences(head, monkeypatch):
    monkeypatch.setattr(bottleneck, "chunk_rows", lambda *_: 2)
    z_NC, tables = inputs(head, torch.float64, 1, 5, 1.0)
    leaves = [each for each in tables if each is not None]

    def outputs(z_NC: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        parts = leaves if head == "conv" else (leaves[0], None, leaves[0], None)
        latent_ND, codes = fused_latent(z_NC, CodeTables(*parts), KEYS_B2, 0.7)
        return latent_ND, codes.kl_N, codes.posterior_K

    assert torch.autograd.gradcheck(outputs, (z_NC, *(leaves if head == "conv" else leaves[:1])))


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("output", ["latent", "kl", "posterior"])
def test_a_loss_may_use_one_output_alone_and_train_a_part_alone(output):
    z_NC, tables = inputs("conv", torch.float64, 4, 11, 1.0)

    def gradient(latent: Latent, leaf: Tensor) -> Tensor | None:
        latent_ND, codes = latent(z_NC, tables, KEYS_B2, 0.5)
        chosen = {"latent": latent_ND, "kl": codes.kl_N, "posterior": codes.posterior_K}[output]
        weights = torch.arange(chosen.numel(), dtype=torch.float64).reshape(chosen.shape)
        return torch.autograd.grad((weights * chosen).sum(), leaf, allow_unused=True)[0]

    tables.keys_KC.requires_grad_(False)
    for leaf in (z_NC, tables.key_bias_K, tables.codes_KD):
        assert leaf is not None
        expected = gradient(plain_latent, leaf)
        found = gradient(fused_latent, leaf)
        assert torch.allclose(found, torch.zeros_like(leaf) if expected is None else expected, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("chunks")
def test_the_mean_posterior_can_be_had_alone():
    z_NC, tables = inputs("conv", torch.float64, 4, 11, 1.0)
    _, codes = plain_latent(z_NC, tables, KEYS_B2, 1.0)
    assert torch.allclose(mean_posterior(z_NC, tables), codes.posterior_K, rtol=1e-12)


def test_kl_of_uniform_posteriors_is_zero_and_of_sure_ones_ln_k():
    for num_codes in (2, 256, 8192):
        keys_KC = torch.eye(num_codes, 4)
        tables = CodeTables(keys_KC, torch.full((num_codes,), 1.7), torch.randn(num_codes, 3), None)
        z_NC = torch.cat([torch.zeros(1, 4), torch.full((2, 4), 1e4) * torch.eye(2, 4)])
        _, codes = fused_latent(z_NC, tables, KEYS_B2, 1.0)
        assert codes.kl_N.tolist() == pytest.approx([0.0, math.log(num_codes), math.log(num_codes)], abs=1e-5)
        assert codes.tokens_N.tolist()[1:] == [0, 1]
        assert float(codes.posterior_K.sum()) == pytest.approx(1.0, abs=1e-5)


def test_the_lowest_temperatures_give_the_code_of_the_noisy_argmax():
    z_NC, tables = inputs("conv", torch.float32, 20, 9, 1.0)
    whole_NK = torch.empty(60, 9)
    noise_NK = GumbelNoise(KEYS_B2, 20, 9).draw(slice(0, 60), whole_NK, torch.empty_like(whole_NK))
    best_N = (quantizer.logits(z_NC, tables) + noise_NK).argmax(dim=1)
    latent_ND, _ = fused_latent(z_NC, tables, KEYS_B2, 1e-6)
    assert torch.allclose(latent_ND, quantizer.hard_latent(best_N, tables), atol=1e-5)


def test_the_bits_are_the_same_run_to_run_and_however_the_batch_is_split():
    keys_B2 = quantizer.noise_keys(0, 1, np.arange(4))
    g = torch.Generator().manual_seed(2)
    z_NC, keys_KC = torch.randn(4 * 64, 16, generator=g), torch.randn(512, 16, generator=g)
    tables = CodeTables(keys_KC, None, keys_KC, None)

    def per_position(first: int, last: int) -> list[Tensor]:
        latent_ND, codes = fused_latent(z_NC[64 * first : 64 * last], tables, keys_B2[first:last], 0.5)
        return [latent_ND, codes.kl_N, codes.tokens_N]

    whole = per_position(0, 4)
    for parts in ([(0, 4)], [(0, 2), (2, 4)], [(0, 1), (1, 2), (2, 3), (3, 4)]):
        joined = [torch.cat(each) for each in zip(*(per_position(*part) for part in parts), strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(joined, whole, strict=True)), parts


class _Made(TorchDispatchMode):
    """How many elements each new piece of memory holds that any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, Tensor] = {}  # held, so that no address is used twice
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in self._seen:
                self._seen[each.untyped_storage().data_ptr()] = each
                self.sizes.append(each.untyped_storage().nbytes() // each.element_size())
        return made


def test_no_tensor_of_all_positions_and_codes_is_ever_made(monkeypatch):
    monkeypatch.setattr(bottleneck, "chunk_rows", lambda *_: 48)
    given = inputs("conv", torch.float32, 64, 100, 1.0)
    with _Made() as made:
        everything(fused_latent, given, 0.5)
    assert max(made.sizes) == 48 * 100  # a chunk
    with _Made() as made:
        everything(plain_latent, given, 0.5)
    assert max(made.sizes) == 192 * 100


def test_logits_of_wide_keys_are_kept_for_a_backward_pass_alone_and_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(bottleneck, "chunk_rows", lambda *_: 48)
    monkeypatch.setattr(bottleneck, "WIDE", 6)
    z_NC, tables = inputs("conv", torch.float32, 64, 100, 1.0)
    with _Made() as made, torch.no_grad():
        fused_latent(z_NC, tables, KEYS_B2, 0.5)
    assert max(made.sizes) < 192 * 100
    with _Made() as made:
        latent_ND, codes = fused_latent(z_NC, tables, KEYS_B2, 0.5)
        gradients = [torch.autograd.grad(latent_ND.sum() + codes.kl_N.sum(), z_NC, retain_graph=True) for _ in range(2)]
    assert made.sizes.count(192 * 100) == 1
    assert torch.equal(gradients[0][0], gradients[1][0])
