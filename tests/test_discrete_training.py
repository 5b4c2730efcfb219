"""DALLE-pytorch's DiscreteVAE in our training: bottleneck, options and commands are those of DALL·E's dVAE."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from jobs.api import load_tokenizer
from jobs.checkpoints import read_head
from jobs.config import ConfigError, check
from jobs.eval_checkpoint import EvalSettings, evaluate
from jobs.export_vae import run_export_vae
from jobs.train_config import TrainConfig
from jobs.train_dvae import run_training
from make_training import config, metric_lines, settings, write_training_data
from model.architectures import build
from model.autoencoder import seeded
from model.checkpoint import checkpoint_files
from model.compiled import compile_convolutions
from model.config import DiscreteVAEConfig, LossConfig, ModelError, OptimConfig, Ramp, ScheduleConfig
from model.discrete_vae import from_hparams
from model.evaluation import Evaluator
from model.trainer import Trainer
from pipeline.shard_patterns import expand
from pipeline.shards import read_samples
from training_cost import kept_bytes_and_flops

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = DiscreteVAEConfig(codebook_size=32, num_layers=2, num_resnet_blocks=1, hidden_dim=8, codebook_dim=12)
SCHEDULES = ScheduleConfig(Ramp(1.0, 0.5, 20), Ramp(0.0, 0.02, 10), Ramp(1.0, 1.0, 1), Ramp(0.1, 0.1, 1))
PIXELS_BHWC = np.random.default_rng(0).integers(0, 256, (4, 2, 2, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
SECTION = {
    "architecture": "dalle_pytorch", "codebook_size": 32, "num_layers": 3, "num_resnet_blocks": 1, "hidden_dim": 8,
    "codebook_dim": 8,
}  # fmt: skip


def trainer(precision: Any = "fp32", likelihood: Any = "l2", **options: Any) -> Trainer:
    given: dict[str, Any] = {"seed": 0, "device": torch.device("cpu"), "precision": precision, **options}
    return Trainer(CONFIG, LossConfig(likelihood), OptimConfig(lr=3e-3, ema_decay=0.5), SCHEDULES, **given)


def trained(made: Trainer, steps: int = 3) -> tuple[dict[str, Tensor], dict[str, float]]:
    figures = [made.train_step(PIXELS_BHWC, np.arange(4)) for _ in range(steps)]
    return made.state_tensors(), figures[-1]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("likelihood", ["l2", "l1"])
def test_it_learns(likelihood: Any) -> None:
    made = trainer(likelihood=likelihood)
    name = {"l2": "squared_error", "l1": "absolute_error"}[likelihood]
    first, last = trained(made, 1)[1], trained(made, 60)[1]
    assert last[name] < 0.8 * first[name] and not last["skipped"]
    figures = made.evaluate(PIXELS_BHWC, np.arange(4)).metrics(likelihood)
    assert figures["psnr_hard"] > 8 and figures["used_share"] > 1 / 32


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_computed_again_give_the_same_bits(precision: str) -> None:
    plain, figures = trained(trainer(precision))
    again, figures_again = trained(trainer(precision, checkpoint_activations=True))
    assert figures == figures_again and same(plain, again)


def _cost(made: Trainer) -> tuple[int, int]:
    return kept_bytes_and_flops(lambda: made.train_step(PIXELS_BHWC, np.arange(4)))


def test_activations_computed_again_are_not_kept() -> None:
    """Between the passes, but for what goes into encoder and decoder; paid for with another forward pass."""

    kept, flops = _cost(trainer())
    kept_again, flops_again = _cost(trainer(checkpoint_activations=True))
    assert kept_again < 0.4 * kept
    assert 1.1 * flops < flops_again < 4 / 3 * flops


def test_a_resumed_trainer_gives_the_bits_of_one_that_went_on() -> None:
    whole, _ = trained(trainer(), 5)
    first, _ = trained(trainer(), 2)
    resumed = trainer()
    resumed.load_state_tensors(first)
    assert same(trained(resumed, 3)[0], whole)


def test_every_convolution_outside_the_bottleneck_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    num_compiled: list[int] = []

    def count(graph: torch.fx.GraphModule, _: object) -> Any:
        found = (torch.conv2d, torch.nn.functional.conv_transpose2d, torch.conv_transpose2d)
        num_compiled.append(sum(node.target in found for node in graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr("torch.compile", partial(torch.compile, backend=count))
    model = seeded(build(CONFIG), 0)
    compile_convolutions(model, torch.device("cpu"))
    model(torch.rand(2, 3, 16, 16), torch.zeros(2, 2, dtype=torch.int32), 1.0)
    num_convolutions = sum(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in model.modules())
    assert sum(num_compiled) == num_convolutions - 1  # the encoder's last makes the logits


def test_a_density_needs_log_scales_which_its_decoder_does_not_give() -> None:
    words = "likelihood 'logit_laplace' must be one of 'l2', 'l1' here: this decoder gives colours, no log-scales"
    with pytest.raises(ModelError, match=words):
        trainer(likelihood="logit_laplace")
    with pytest.raises(ModelError, match=words):
        Evaluator(build(CONFIG), LossConfig(), seed=0, device=torch.device("cpu"), precision="fp32")


# As settings


@pytest.mark.parametrize(
    ("model", "loss", "said"),
    [
        ({"hiden_dim": 8}, "l2", "model.hiden_dim: unknown key; did you mean model.hidden_dim?"),
        ({"width": 8}, "l2", "model.width: unknown key"),
        ({"num_tokens": 8}, "l2", "model.num_tokens: unknown key"),
        ({"architecture": "vqgan"}, "l2", "model: architecture 'vqgan' must be 'dalle_pytorch' (leave it out for"),
        ({"num_layers": "many"}, "l2", "model.num_layers: Input should be a valid integer"),
        ({"num_layers": True}, "l2", "model.num_layers: Input should be a number (got True)"),
        ({"num_layers": 0}, "l2", "model: num_layers 0 must be a whole number of at least 1"),
        ({"normalization": [[0, 0, 0], [1, 1]]}, "l2", "model.normalization.1.2: "),
        ({"num_layers": 5}, "l2", "image.size with model.downsample: image size 16 is not a multiple of downsample 32"),
        ({}, "logit_laplace", "loss with model: likelihood 'logit_laplace' must be one of 'l2', 'l1' here"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, model: dict[str, Any], loss: str, said: str) -> None:
    given = settings(tmp_path, loss={"likelihood": loss}) | {"model": SECTION | model}
    with pytest.raises(ConfigError) as error:
        check(TrainConfig, given, "train.yaml")
    assert said in str(error.value)
    assert "did you mean model?" not in str(error.value)


def test_keys_of_the_one_architecture_are_unknown_to_the_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.num_layers: unknown key(?!; did you mean model\.num_layers)"):
        check(TrainConfig, settings(tmp_path, model={"num_layers": 3}), "train.yaml")
    with pytest.raises(ConfigError, match=r"model\.architectur: unknown key; did you mean model\.architecture\?"):
        check(TrainConfig, settings(tmp_path, model={"architectur": "dalle_pytorch"}), "train.yaml")


def test_settings_come_back_from_their_json(tmp_path: Path) -> None:
    given = check(TrainConfig, settings(tmp_path) | {"model": SECTION}, "here")
    assert given.model == DiscreteVAEConfig(
        codebook_size=32, num_layers=3, num_resnet_blocks=1, hidden_dim=8, codebook_dim=8
    )
    assert check(TrainConfig, json.loads(json.dumps(given.model_dump(mode="json"))), "again") == given


# From end to end


@pytest.mark.training
def test_it_is_trained_resumed_evaluated_and_exported_by_our_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_training_data(tmp_path)
    changes: dict[str, Any] = {"steps": 6, "eval": {"every_steps": 3}, "checkpoint": {"every_steps": 3}}
    given = settings(tmp_path, **changes) | {"model": SECTION}
    assert run_training(TrainConfig.model_validate(given), "dvae train") == 0
    whole = settings(tmp_path, output=str(tmp_path / "whole"), **changes) | {"model": SECTION, "steps": 9}
    assert run_training(TrainConfig.model_validate(whole), "dvae train") == 0
    assert run_training(TrainConfig.model_validate(given | {"steps": 9}), "dvae train") == 0
    weights = (tmp_path / "out" / "model" / "model.safetensors").read_bytes()
    assert weights == (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()
    card = (tmp_path / "out" / "model" / "MODEL_CARD.md").read_text()
    assert "As DALLE-pytorch's DiscreteVAE: num_layers 3, num_resnet_blocks 1, hidden_dim 8" in card
    last = next(line for line in reversed(metric_lines(tmp_path / "out")) if line["kind"] == "eval")
    found = evaluate(str(tmp_path / "out"), [str(tmp_path / "val")], EvalSettings(num_images=6, batch_size=4))
    assert found.figures["squared_error"] == pytest.approx(last["squared_error"], rel=1e-6)
    assert run_export_vae(str(tmp_path / "out"), str(tmp_path / "vae.pt"), as_json=False) == 0
    loaded = torch.load(io.BytesIO((tmp_path / "vae.pt").read_bytes()), weights_only=True)
    read, _, size = from_hparams(loaded["hparams"], loaded["weights"])
    assert (read.to_json(), size) == (found.checkpoint.dvae_config.to_json(), 16)


def test_one_that_does_not_say_how_it_was_trained_is_evaluated_all_the_same(tmp_path: Path) -> None:
    write_training_data(tmp_path)
    shape, spec = CONFIG, config(tmp_path).image.to_json()
    files = checkpoint_files(
        weights=seeded(build(shape), 0).state_dict(), dvae_config=shape, image_spec=spec, step=0,
        training_state=None, extra={},
    )  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    found = evaluate(str(tmp_path), [str(tmp_path / "val")], EvalSettings())
    assert 0 < found.figures["psnr_hard"] < 40 and "squared_error" not in found.figures
    images = [sample.image for shard in expand([str(tmp_path / "val")]) for sample in read_samples(shard)]
    tokens_BHW = load_tokenizer(str(tmp_path), device="cpu").encode(images)
    assert np.array_equal(found.histogram_K, np.bincount(tokens_BHW.ravel(), minlength=32))
    head = read_head(str(tmp_path))
    assert (head.grid, head.codebook_size) == ((4, 4), 32)
