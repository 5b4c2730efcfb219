"""The loss is the mean over the global batch, however many workers share it and in however many passes."""

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

from model.config import DVAEConfig, LossConfig, OptimConfig, Ramp, ScheduleConfig
from model.micro_batches import micro_batches
from model.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = DVAEConfig(codebook_size=32, width=16, blocks_per_group=1, decoder_init=16, stem="strided", code_dim=8)
SCHEDULES = ScheduleConfig(Ramp(1.0, 0.1, 20), Ramp(0.02, 0.02, 10), Ramp(1.0, 0.1, 20))
BATCH = 6
# (the first rank's images, the second's, micro_batch_size, usage weight)
CASES = [
    (first, micro, usage) for first in (3, 4) for micro in (None, 1, 2, 3) for usage in (0.0, 0.3)
]  # fmt: skip


def trainer_of(usage: float, micro: int | None) -> Trainer:
    schedules = dataclasses.replace(SCHEDULES, usage_weight=Ramp(usage, usage, 1))
    return Trainer(
        CONFIG, LossConfig(), OptimConfig(lr=3e-3), schedules,
        seed=0, device=torch.device("cpu"), precision="fp32", batch_size=BATCH, micro_batch_size=micro,
    )  # fmt: skip


def pixels(step: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(step)
    return rng.integers(0, 256, (BATCH, 4, 4, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)


def two_steps(trainer: Trainer, mine: NDArray[np.int64]) -> dict[str, Any]:
    """The figures of both steps, and the weights after them."""
    figures = [trainer.train_step(pixels(step)[mine], mine) for step in range(2)]
    return {"figures": figures, "weights": trainer.state_tensors()}


def same_training(one: dict[str, Any], other: dict[str, Any]) -> None:
    for mine, theirs in zip(one["figures"], other["figures"], strict=True):
        for name in ("loss", "nats_per_value"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-6), name
        assert mine == pytest.approx(theirs, rel=1e-4)
    for name, tensor in one["weights"].items():
        if name.startswith("model."):
            assert torch.allclose(tensor, other["weights"][name], rtol=1e-3, atol=2e-5), name


@pytest.mark.parametrize("usage", [0.0, 0.3])
@pytest.mark.parametrize("micro", [1, 2, 4, 5])
def test_accumulation_changes_only_rounding(micro: int, usage: float) -> None:
    whole = two_steps(trainer_of(usage, None), np.arange(BATCH))
    same_training(two_steps(trainer_of(usage, micro), np.arange(BATCH)), whole)


def test_one_pass_for_all_is_bit_identical_to_no_limit() -> None:
    whole, limited = (two_steps(trainer_of(0.0, micro), np.arange(BATCH)) for micro in (None, BATCH))
    assert whole["figures"] == limited["figures"]


def test_micro_batches_are_as_few_and_as_equal_as_can_be() -> None:
    def sizes(num_images: int, largest: int | None) -> list[int]:
        slots = np.arange(num_images)
        batches = micro_batches(np.zeros((num_images, 1, 1, 3), np.uint8), slots, 20, largest)
        assert np.concatenate([batch.slots_B for batch in batches]).tolist() == slots.tolist()
        assert [batch.is_last for batch in batches] == [False] * (len(batches) - 1) + [True]
        assert sum(batch.share for batch in batches) == pytest.approx(num_images / 20)
        return [len(batch.pixels_BHWC) for batch in batches]

    assert sizes(9, 4) == [3, 3, 3]
    assert sizes(10, 4) == [3, 3, 4]
    assert sizes(4, 4) == sizes(4, None) == sizes(4, 7) == [4]


def _rank(rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", world_size), rank=rank, world_size=world_size
    )
    torch.set_num_threads(1)
    done = []
    for first, micro, usage in CASES:
        mine = np.arange(first) if rank == 0 else np.arange(first, BATCH)
        done.append(two_steps(trainer_of(usage, micro), mine))
    torch.save(done, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_train_as_one_with_equal_and_unequal_shares_and_any_accumulation(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(2, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    alone = {usage: two_steps(trainer_of(usage, None), np.arange(BATCH)) for usage in (0.0, 0.3)}
    for (_, _, usage), one, other in zip(CASES, *ranks, strict=True):
        assert one["figures"] == other["figures"]  # the global batch's, on both
        assert all(torch.equal(one["weights"][name], other["weights"][name]) for name in one["weights"])
        same_training(one, alone[usage])
