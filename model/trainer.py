"""One training step, and evaluation with the averaged weights. No Ray, no files, no data order.

Under an initialised torch.distributed the model is wrapped in DDP here; launching processes is the caller's.
"""
# B this rank's samples, C channels, H W rows and columns of pixels, N positions, K codes

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from model import losses, quantizer, training_state
from model.config import DVAEConfig, LossConfig, ModelError, OptimConfig, ScheduleConfig
from model.dvae import DVAE, on_device, seeded_dvae
from model.losses import LossParts
from model.metrics import EvalSums, eval_sums
from model.schedules import StepValues, values_at

Pixels = Tensor | NDArray[np.uint8]
Precision = Literal["fp32", "bf16"]
EVALUATION_STEP = 2**62  # keys the noise of evaluations apart from that of every training step


class Reconstructions(NamedTuple):
    """What the model makes of a batch: relaxed as in training, and from the argmax tokens."""

    x_BCHW: Tensor
    soft_stats_BCHW: Tensor
    hard_stats_BCHW: Tensor
    logits_NK: Tensor
    tokens_N: Tensor


class Trainer:
    """Holds the weights, their moving average, the optimiser and the step."""

    def __init__(
        self,
        dvae_config: DVAEConfig,
        loss_config: LossConfig,
        optim_config: OptimConfig,
        schedule_config: ScheduleConfig,
        *,
        seed: int,
        device: torch.device,
        precision: Precision,
    ) -> None:
        if precision not in get_args(Precision):
            raise ModelError(f"precision {precision!r} must be one of {get_args(Precision)}")
        self.loss_config, self.optim_config, self.schedules = loss_config, optim_config, schedule_config
        self._penalises_usage = max(schedule_config.usage_weight.start, schedule_config.usage_weight.end) > 0
        self.seed, self.device, self.precision = seed, device, precision
        self.step, self.skipped_steps = 0, 0
        self.model = on_device(seeded_dvae(dvae_config, seed), device)
        self._average = _moving_average(self.model, optim_config.ema_decay)
        self._optimizer = _adamw(self.model, optim_config)
        self._distributed = dist.is_available() and dist.is_initialized()
        self._forward = _in_ddp(self.model, device) if self._distributed else self.model

    @property
    def averaged_model(self) -> DVAE:
        assert isinstance(self._average.module, DVAE)
        return self._average.module

    def averaged_weights(self) -> dict[str, Tensor]:
        """The moving average, copied: what evaluates and tokenises, so what a checkpoint publishes."""
        return {name: training_state.kept(each) for name, each in self.averaged_model.state_dict().items()}

    def train_step(self, pixels_BHWC: Pixels, slots_B: NDArray[np.int64]) -> dict[str, float]:
        """One update from this rank's share of the global batch; `slots_B` are its positions in that batch.

        The figures are this rank's, but for `grad_norm` and `skipped`, on which all ranks agree.
        """
        values = values_at(self.schedules, self.step)
        parts = self._loss(pixels_BHWC, slots_B, values)
        parts.loss.backward()  # type: ignore[no-untyped-call]
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.optim_config.grad_clip or math.inf)
        updated = self._finite_everywhere(parts.loss.detach(), grad_norm)
        if updated:
            self._update(values)
        self._optimizer.zero_grad(set_to_none=True)
        self.skipped_steps += not updated
        self.step += 1
        return self._figures(parts, values, grad_norm, updated)

    def evaluate(self, pixels_BHWC: Pixels) -> EvalSums:
        """With the averaged weights and the temperature of the current step."""
        made = self._reconstructions(pixels_BHWC)
        return eval_sums(
            losses.unmap_pixels(made.x_BCHW),
            losses.reconstruction(made.soft_stats_BCHW),
            losses.reconstruction(made.hard_stats_BCHW),
            losses.negative_log_likelihood(made.soft_stats_BCHW, made.x_BCHW, self.loss_config),
            made.logits_NK,
            made.tokens_N,
        )

    def reconstruct(self, pixels_BHWC: Pixels) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """(soft, hard), both uint8 (B, H, W, 3)."""
        made = self._reconstructions(pixels_BHWC)
        soft = losses.to_uint8(losses.reconstruction(made.soft_stats_BCHW))
        hard = losses.to_uint8(losses.reconstruction(made.hard_stats_BCHW))
        return soft.cpu().numpy(), hard.cpu().numpy()

    def state_tensors(self) -> dict[str, Tensor]:
        """Copies on the CPU of all that a bit-identical resume needs."""
        state = training_state.state_tensors(self.model, self._average, self._optimizer)
        state["trainer.step"] = torch.tensor(self.step)
        state["trainer.skipped_steps"] = torch.tensor(self.skipped_steps)
        return state

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Refuses other names or shapes than this trainer's own, naming the first that differs."""
        scalar = torch.Size(())
        training_state.load_state_tensors(state, self.model, self._average, self._optimizer)
        self.step = int(training_state.taken(state, "trainer.step", scalar))
        self.skipped_steps = int(training_state.taken(state, "trainer.skipped_steps", scalar))

    def _loss(self, pixels_BHWC: Pixels, slots_B: NDArray[np.int64], values: StepValues) -> LossParts:
        x_BCHW = self._mapped(pixels_BHWC)
        keys_B2 = quantizer.noise_keys(self.seed, self.step, slots_B).to(self.device)
        with self._autocast():
            stats_BCHW, logits_NK = self._forward(x_BCHW, keys_B2, values.temperature)
        parts = losses.loss_parts(stats_BCHW, x_BCHW, logits_NK, values.kl_weight, self.loss_config)
        if not self._penalises_usage:
            return parts
        return losses.with_usage(parts, x_BCHW, logits_NK, values.usage_weight, self._mean_over_ranks)

    @torch.no_grad()
    def _reconstructions(self, pixels_BHWC: Pixels) -> Reconstructions:
        model, x_BCHW = self.averaged_model, self._mapped(pixels_BHWC)
        keys_B2 = quantizer.noise_keys(self.seed, EVALUATION_STEP, np.arange(len(x_BCHW))).to(self.device)
        temperature = values_at(self.schedules, self.step).temperature
        with self._autocast():
            soft_stats_BCHW, logits_NK = model(x_BCHW, keys_B2, temperature)
            tokens_N = logits_NK.argmax(dim=-1)
            hard_stats_BCHW = model.decode_tokens(tokens_N, model.grid_of(x_BCHW))
        return Reconstructions(x_BCHW, soft_stats_BCHW, hard_stats_BCHW, logits_NK, tokens_N)

    def _mapped(self, pixels_BHWC: Pixels) -> Tensor:
        return losses.map_pixels(torch.as_tensor(pixels_BHWC).to(self.device, non_blocking=True))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def _finite_everywhere(self, loss: Tensor, grad_norm: Tensor) -> bool:
        """A loss may be non-finite on one rank alone; all ranks must skip the same steps."""
        finite = (torch.isfinite(loss) & torch.isfinite(grad_norm)).to(torch.int32)
        if self._distributed:
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        return bool(finite)

    def _mean_over_ranks(self, x: Tensor) -> Tensor:
        if not self._distributed:
            return x
        mean = x / dist.get_world_size()
        dist.all_reduce(mean)
        return mean

    def _update(self, values: StepValues) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self.optim_config.lr * values.lr
        self._optimizer.step()
        self._average.update_parameters(self.model)

    def _figures(self, parts: LossParts, values: StepValues, grad_norm: Tensor, updated: bool) -> dict[str, float]:
        measured = {
            "loss": parts.loss,
            "nats_per_value": parts.reconstruction,
            "kl": parts.kl,
            **({} if parts.usage_kl is None else {"usage_kl": parts.usage_kl}),
            "grad_norm": grad_norm,
        }
        numbers = torch.stack(list(measured.values())).detach().tolist()  # one transfer from the device
        return dict(zip(measured, numbers, strict=True)) | {
            "temperature": values.temperature,
            "kl_weight": values.kl_weight,
            "lr": self.optim_config.lr * values.lr,
            "skipped": float(not updated),
        }


def _in_ddp(model: DVAE, device: torch.device) -> nn.Module:
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def _moving_average(model: DVAE, decay: float) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]


def _adamw(model: DVAE, config: OptimConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
