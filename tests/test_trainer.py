"""A step is a function of its state and its batch: it resumes bit for bit, and ranks agree on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from numpy.typing import NDArray

from model.config import DVAEConfig, LossConfig, ModelError, OptimConfig, Ramp, ScheduleConfig
from model.metrics import EvalSums
from model.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = DVAEConfig(codebook_size=32, width=16, blocks_per_group=1, decoder_init=16, stem="strided", code_dim=8)
OPTIM = OptimConfig(lr=3e-3, ema_decay=0.9)
SCHEDULES = ScheduleConfig(Ramp(1.0, 0.1, 20), Ramp(0.0, 0.02, 10), Ramp(1.0, 0.1, 20, warmup=2))


def _trainer(seed: int = 0, **changes: Any) -> Trainer:
    given = {"dvae": CONFIG, "loss": LossConfig("l2"), "optim": OPTIM, "precision": "fp32"} | changes
    schedules = dataclasses.replace(SCHEDULES, usage_weight=Ramp(given.get("usage", 0.0), 0.0, 20))
    configs = (given["dvae"], given["loss"], given["optim"], schedules)
    return Trainer(*configs, seed=seed, device=torch.device("cpu"), precision=given["precision"])


def _batch(step: int, size: int = 6) -> NDArray[np.uint8]:
    rng = np.random.default_rng(step)
    return rng.integers(0, 256, (size, 4, 4, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)


def _train(trainer: Trainer, num_steps: int) -> dict[str, float]:
    figures = {}
    for _ in range(num_steps):
        figures = trainer.train_step(_batch(trainer.step), np.arange(6))
    return figures


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("head", ["conv", "inner_product"])
def test_a_resumed_run_is_bit_identical_to_one_never_interrupted(head, precision):
    changes = {"dvae": dataclasses.replace(CONFIG, head=head), "precision": precision}
    whole, first, second = (_trainer(**changes) for _ in range(3))
    _train(whole, 9)
    _train(first, 4)
    second.load_state_tensors(first.state_tensors())
    assert second.step == 4
    figures = _train(second, 5)
    assert _same(second.state_tensors(), whole.state_tensors())
    assert figures["loss"] == _train_last_figures(changes)["loss"]
    assert _same(second.averaged_weights(), whole.averaged_weights())


def _train_last_figures(changes: dict[str, Any]) -> dict[str, float]:
    return _train(_trainer(**changes), 9)


def test_state_taken_before_the_first_step_resumes_too():
    fresh, resumed = _trainer(seed=1), _trainer(seed=2)
    resumed.seed = 1
    resumed.load_state_tensors(fresh.state_tensors())
    _train(fresh, 3)
    _train(resumed, 3)
    assert _same(fresh.state_tensors(), resumed.state_tensors())


def test_the_state_is_a_copy_that_later_steps_leave_alone():
    trainer = _trainer()
    _train(trainer, 2)
    state, weights = trainer.state_tensors(), trainer.averaged_weights()
    before = {name: each.clone() for name, each in (state | weights).items()}
    _train(trainer, 1)
    assert _same(state | weights, before)
    assert not _same(trainer.state_tensors(), state)


@pytest.mark.parametrize("fault", ["lacks", "lacks its moment", "extra", "shape"])
def test_a_state_of_another_model_is_refused_by_the_tensors_name(fault):
    trainer = _trainer()
    _train(trainer, 1)
    state, name = trainer.state_tensors(), "model.encoder.blocks.input.w"
    if fault == "lacks":
        del state[name]
    elif fault == "lacks its moment":
        name = "optim.encoder.blocks.input.w.exp_avg"
        del state[name]
    elif fault == "extra":
        name = "model.encoder.blocks.group_9.w"
        state[name] = torch.zeros(1)
    else:
        state[name] = state[name][:3]
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        _trainer().load_state_tensors(state)


def test_a_state_of_another_architecture_is_refused():
    wider = _trainer(dvae=dataclasses.replace(CONFIG, width=32))
    with pytest.raises(ModelError, match=r"encoder\.blocks.*needs"):
        wider.load_state_tensors(_trainer().state_tensors())


def test_training_lowers_the_loss_and_reports_what_it_did():
    trainer, light = _trainer(), np.full((6, 32, 32, 3), 230, np.uint8)
    first = trainer.train_step(light, np.arange(6))
    for _ in range(40):
        last = trainer.train_step(light, np.arange(6))
    assert last["loss"] < 0.7 * first["loss"]
    assert set(first) == {
        "loss", "squared_error", "kl", "grad_norm", "temperature", "kl_weight", "lr", "skipped",
    }  # fmt: skip
    assert (first["temperature"], first["kl_weight"], first["lr"]) == (1.0, 0.0, pytest.approx(1e-3))
    assert (last["temperature"], last["kl_weight"], last["lr"]) == (0.1, 0.02, pytest.approx(3e-4))


def test_the_slots_decide_the_noise_and_so_the_loss():
    losses = [_trainer().train_step(_batch(0), slots)["loss"] for slots in (np.arange(6), np.arange(6) + 6)]
    assert losses[0] != losses[1]
    assert losses[0] == _trainer().train_step(_batch(0), np.arange(6))["loss"]


@pytest.mark.parametrize("poison", ["pixels", "weights"])
def test_a_non_finite_step_is_skipped_counted_and_leaves_the_weights_alone(poison):
    trainer = _trainer()
    _train(trainer, 2)
    pixels = torch.from_numpy(_batch(2)).float()
    if poison == "pixels":
        pixels[1, 3, 3, 0] = float("nan")
    else:
        trainer.model.decoder.input.w.register_hook(lambda gradient: gradient * float("inf"))
    before = trainer.state_tensors()
    figures = trainer.train_step(pixels, np.arange(6))
    after = trainer.state_tensors()
    assert figures["skipped"] == 1.0
    assert (trainer.step, trainer.skipped_steps) == (3, 1)
    assert _same(*({n: each for n, each in s.items() if not n.startswith("trainer.")} for s in (before, after)))
    if poison == "pixels":
        assert _train(trainer, 1)["skipped"] == 0.0


def test_skips_in_a_row_are_counted_apart_and_over_a_resume():
    trainer, broken = _trainer(), torch.from_numpy(_batch(0)).float().fill_(float("nan"))
    for _ in range(2):
        trainer.train_step(broken, np.arange(6))
    state = trainer.state_tensors()
    resumed = _trainer()
    resumed.load_state_tensors(state)
    resumed.train_step(broken, np.arange(6))
    assert (resumed.skipped_steps, resumed.skipped_in_a_row) == (3, 3)
    _train(resumed, 1)
    assert (resumed.skipped_steps, resumed.skipped_in_a_row) == (3, 0)
    del state["trainer.skipped_in_a_row"]  # as before it was counted
    resumed.load_state_tensors(state)
    assert (resumed.skipped_steps, resumed.skipped_in_a_row) == (2, 0)


def test_the_usage_term_is_reported_where_it_has_a_weight():
    assert "usage_kl" not in _train(_trainer(), 1)
    figures = _train(_trainer(usage=0.5), 1)
    assert figures["loss"] == pytest.approx(figures["squared_error"] + 0.5 * figures["usage_kl"] / 192, rel=1e-4)


def test_gradients_are_clipped_to_the_norm_asked_for():
    """Plain Adam doesn't see a factor on all gradients, so the moments are what shows it."""
    clip = 1e-3
    trainer = _trainer(optim=dataclasses.replace(OPTIM, grad_clip=clip, betas=(0.0, 0.5)))
    figures = trainer.train_step(_batch(0), np.arange(6))
    state = trainer.state_tensors()
    first_moments = [each.flatten() for name, each in state.items() if name.endswith("exp_avg")]
    assert figures["grad_norm"] > clip
    assert float(torch.cat(first_moments).norm()) == pytest.approx(clip, rel=1e-3)


def test_the_averaged_weights_follow_the_stated_decay():
    trainer = _trainer()
    name = "decoder.blocks.output.conv.w"
    _train(trainer, 1)
    average = trainer.state_tensors()[f"model.{name}"]  # the first update starts the average
    assert torch.equal(trainer.averaged_weights()[name], average)
    for _ in range(3):
        _train(trainer, 1)
        average = 0.9 * average + 0.1 * trainer.state_tensors()[f"model.{name}"]
    assert torch.allclose(trainer.averaged_weights()[name], average, atol=1e-6)


def test_the_update_is_adamws():
    """Against torch's plain implementation: the fused one walks memory, where channels-last weights lie otherwise."""
    trainer = _trainer(optim=dataclasses.replace(OPTIM, weight_decay=0.1))
    before = {name: each.detach().clone() for name, each in trainer.model.named_parameters()}
    gradients: dict[str, torch.Tensor] = {}
    for name, parameter in trainer.model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: gradients.__setitem__(name, gradient.clone()))
    figures = trainer.train_step(_batch(0), np.arange(6))
    for name, parameter in before.items():
        plain = torch.nn.Parameter(parameter.contiguous().clone())
        plain.grad = gradients[name].contiguous()
        torch.optim.AdamW([plain], lr=figures["lr"], weight_decay=0.1).step()
        assert torch.allclose(trainer.model.get_parameter(name), plain, atol=1e-6), name


def test_evaluation_adds_up_over_batches_and_moves_nothing():
    trainer = _trainer()
    _train(trainer, 3)
    before = trainer.state_tensors()
    one, other = trainer.evaluate(_batch(1), np.arange(6)), trainer.evaluate(_batch(2), np.arange(6, 12))
    total = EvalSums.zeros(32) + one + other
    assert _same(trainer.state_tensors(), before)
    assert total.histogram_K.sum() == total.num_positions == 2 * 6 * 16
    assert total.metrics()["kl"] == pytest.approx((one.metrics()["kl"] + other.metrics()["kl"]) / 2)


def test_the_noise_of_an_evaluation_belongs_to_the_image_not_to_its_batch():
    trainer = _trainer()
    pixels_BHWC, places_B = _batch(1), np.array([3, 0, 7, 8, 2, 9])
    whole_BHWC, _ = trainer.reconstruct(pixels_BHWC, places_B)
    for number in range(6):
        alone_BHWC, _ = trainer.reconstruct(pixels_BHWC[[number]], places_B[[number]])
        assert np.abs(alone_BHWC[0].astype(int) - whole_BHWC[number]).max() <= 1, "to rounding"
    elsewhere_BHWC, _ = trainer.reconstruct(pixels_BHWC, places_B + 1)
    assert np.abs(elsewhere_BHWC.astype(int) - whole_BHWC).max() > 1, "other noise is to be seen"


def test_the_reconstructions_are_those_that_the_evaluation_measures():
    trainer = _trainer()
    _train(trainer, 30)
    pixels_BHWC = _batch(0)
    metrics = trainer.evaluate(pixels_BHWC, np.arange(6)).metrics()
    for made_BHWC, name in zip(trainer.reconstruct(pixels_BHWC, np.arange(6)), ("psnr_soft", "psnr_hard"), strict=True):
        assert made_BHWC.dtype == np.uint8 and made_BHWC.shape == pixels_BHWC.shape
        mean_squared_error = ((made_BHWC.astype(float) - pixels_BHWC) ** 2).mean() / 255**2
        assert -10 * np.log10(mean_squared_error) == pytest.approx(metrics[name], abs=0.02)


def test_a_wrong_precision_is_refused():
    with pytest.raises(ModelError, match="precision 'fp8'"):
        _trainer(precision="fp8")


def _rank(rank: int, world_size: int, folder: str) -> None:
    """Two ranks share one global batch of 6, without and with the usage term; at the end, only rank 1 has a
    broken pixel."""
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    mine, states, skipped = np.arange(6)[rank::world_size], [], []
    for usage in (0.0, 0.3):
        trainer = _trainer(usage=usage)
        for step in range(3):
            trainer.train_step(_batch(step)[mine], mine)
        states.append(trainer.state_tensors())
        broken = torch.from_numpy(_batch(3)[mine]).float()
        broken[0, 0, 0, 0] = float("nan") if rank == 1 else 0.0
        skipped.append(trainer.train_step(broken, mine)["skipped"])
        states.append(trainer.state_tensors())
    torch.save((states, skipped), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_train_as_one_and_skip_the_same_steps(tmp_path: Path):
    mp.spawn(_rank, args=(2, str(tmp_path)), nprocs=2)
    (states, skipped), (other_states, other_skipped) = (torch.load(tmp_path / f"rank{r}.pt") for r in (0, 1))
    assert skipped == other_skipped == [1.0, 1.0]
    assert all(_same(one, other) for one, other in zip(states, other_states, strict=True))
    for usage, state in ((0.0, states[0]), (0.3, states[2])):
        alone = _trainer(usage=usage)
        _train(alone, 3)
        expected = alone.state_tensors()
        for name in (each for each in expected if each.startswith("model.")):
            assert torch.allclose(state[name], expected[name], rtol=1e-3, atol=2e-5), name
    assert not torch.equal(
        states[0]["model.encoder.blocks.output.conv.w"], states[2]["model.encoder.blocks.output.conv.w"]
    )
