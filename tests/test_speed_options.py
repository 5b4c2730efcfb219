"""Speed options of training: what is learnt stays, and so do the names of what is kept."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.compiled import compile_convolutions
from model.config import DVAEConfig, LossConfig, ModelError, OptimConfig, Ramp, ScheduleConfig
from model.dvae import Conv2d, seeded_dvae
from model.trainer import Trainer
from training_cost import kept_bytes_and_flops

pytestmark = pytest.mark.usefixtures("one_thread")

PIXELS_BHWC = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
SCHEDULES = ScheduleConfig(Ramp(1.0, 0.5, 20), Ramp(0.0, 0.02, 10), usage_weight=Ramp(0.1, 0.1, 1))


def trainer(precision: Any = "fp32", **options: Any) -> Trainer:
    model = {name: options.pop(name) for name in ("head", "downsample", "stem") if name in options}
    config = DVAEConfig(codebook_size=32, width=8, blocks_per_group=1, decoder_init=8, code_dim=8, **model)
    given: dict[str, Any] = {"seed": 0, "device": torch.device("cpu"), "precision": precision, **options}
    return Trainer(config, LossConfig("l2"), OptimConfig(lr=1e-3), SCHEDULES, **given)


def trained(made: Trainer, steps: int = 3) -> tuple[dict[str, Tensor], dict[str, float]]:
    figures = [made.train_step(PIXELS_BHWC, np.arange(2)) for _ in range(steps)]
    return made.state_tensors(), figures[-1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("head", ["conv", "inner_product"])
def test_activations_computed_again_give_the_same_bits(head: str, precision: str) -> None:
    plain, figures = trained(trainer(precision, head=head))
    again, figures_again = trained(trainer(precision, head=head, checkpoint_activations=True))
    assert figures == figures_again
    assert plain.keys() == again.keys() and all(torch.equal(plain[name], again[name]) for name in plain)


def _cost(made: Trainer) -> tuple[int, int]:
    return kept_bytes_and_flops(lambda: made.train_step(PIXELS_BHWC, np.arange(2)))


def test_activations_computed_again_are_not_kept() -> None:
    """What autograd keeps, but for the inputs of the groups; paid for with another forward pass of the groups."""

    kept, flops = _cost(trainer())
    kept_again, flops_again = _cost(trainer(checkpoint_activations=True))
    assert kept_again < 0.4 * kept
    assert 1.1 * flops < flops_again < 4 / 3 * flops


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_learns_the_same_under_the_same_names(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the other option, in a process group, and evaluation on another batch size. The first backend takes the
    graphs as they are found; the second is what a run uses, and needs most of a minute for them."""
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend=backend))
    plain, expected = trained(trainer(stem="strided", downsample=4))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        made = trainer(stem="strided", downsample=4, compile=True, checkpoint_activations=True)
        compiled, figures = trained(made)
    finally:
        dist.destroy_process_group()
    assert figures == pytest.approx(expected, rel=1e-4)
    assert plain.keys() == compiled.keys()
    assert all(torch.allclose(plain[name], compiled[name], rtol=1e-2, atol=1e-4) for name in plain)
    assert math.isfinite(made.evaluate(PIXELS_BHWC[:1], np.arange(1)).metrics()["psnr_hard"])


def test_every_convolution_outside_the_bottleneck_is_compiled_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """As deep as DALL·E's: torch gives up on a function after some graphs, and goes on uncompiled without an error."""
    num_compiled: list[int] = []

    def count(graph: torch.fx.GraphModule, _: object) -> Any:
        num_compiled.append(sum(node.target is torch.conv2d for node in graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr("torch.compile", partial(torch.compile, backend=count))
    model = seeded_dvae(DVAEConfig(codebook_size=32, width=8, decoder_init=8), 0)
    compile_convolutions(model, torch.device("cpu"))
    num_convolutions = sum(isinstance(module, Conv2d) for module in model.modules())
    for batch_size in (2, 3, 4):
        num_compiled.clear()
        model(torch.rand(batch_size, 3, 16, 16), torch.zeros(batch_size, 2, dtype=torch.int32), 1.0)
        assert sum(num_compiled) == num_convolutions - 2  # the encoder's last and the decoder's first


def test_without_a_compiler_training_says_so_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object, **__: object) -> object:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr("torch.compile", lambda *_, **__: no_compiler)
    with pytest.raises(ModelError, match=r"No working C\+\+ compiler found.*install it, or set compile=false"):
        trainer(compile=True)
