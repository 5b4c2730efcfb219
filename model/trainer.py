"""One training step, and evaluation with the averaged weights. No Ray, no files, no data order.

Under an initialised torch.distributed the model is wrapped in DDP here; launching processes is the caller's.
"""
# B this rank's samples, C channels, H W rows and columns of pixels, N positions, K codes

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from model import losses, quantizer, training_state
from model.architectures import build
from model.autoencoder import Autoencoder, on_device, seeded
from model.bottleneck import mean_posterior
from model.compiled import compile_convolutions
from model.config import ArchitectureConfig, LossConfig, ModelError, OptimConfig, ScheduleConfig
from model.evaluation import Evaluator, Reconstructions
from model.losses import LossParts
from model.metrics import EvalSums, code_use
from model.micro_batches import MicroBatch, Pixels, micro_batches
from model.schedules import StepValues, values_at

Precision = Literal["fp32", "bf16"]


class Trainer:
    """Holds the weights, their moving average, the optimiser and the step."""

    def __init__(
        self,
        dvae_config: ArchitectureConfig,
        loss_config: LossConfig,
        optim_config: OptimConfig,
        schedule_config: ScheduleConfig,
        *,
        seed: int,
        device: torch.device,
        precision: Precision,
        batch_size: int | None = None,
        micro_batch_size: int | None = None,
        compile: bool = False,
        checkpoint_activations: bool = False,
    ) -> None:
        """`batch_size`: images of the global batch; None: all ranks have as many as this one. `micro_batch_size`:
        of one forward pass; None: all that this rank has. `checkpoint_activations` changes no bit, `compile` may round
        differently; both leave evaluation as it is. Raises ModelError."""
        if precision not in get_args(Precision):
            raise ModelError(f"precision {precision!r} must be one of {get_args(Precision)}")
        loss_config.check_fits(dvae_config)
        self.loss_config, self.optim_config, self.schedules = loss_config, optim_config, schedule_config
        self._penalises_usage = max(schedule_config.usage_weight.start, schedule_config.usage_weight.end) > 0
        self.seed, self.device, self.precision = seed, device, precision
        self._batch_size, self._micro_batch_size = batch_size, micro_batch_size
        self.step, self.skipped_steps, self.skipped_in_a_row = 0, 0, 0
        self.model = on_device(seeded(build(dvae_config), seed), device)
        self._average = _moving_average(self.model, optim_config.ema_decay)
        if checkpoint_activations:
            self.model.recompute_activations()
        if compile:
            compile_convolutions(self.model, device)
        self._optimizer = _adamw(self.model, optim_config)
        self._evaluator = Evaluator(self.averaged_model, loss_config, seed=seed, device=device, precision=precision)
        self._code_counts_K = torch.zeros(dvae_config.codebook_size, dtype=torch.int64, device=device)
        self._own_code_counts_K = torch.zeros_like(self._code_counts_K)
        self._distributed = dist.is_available() and dist.is_initialized()
        self._world_size = dist.get_world_size() if self._distributed else 1
        ddp = _in_ddp(self.model, device) if self._distributed else None
        self._forward: nn.Module = self.model if ddp is None else ddp
        self._gradients_stay_here = nullcontext if ddp is None else ddp.no_sync
        self._is_unsettled = self._world_size > 2

    @property
    def averaged_model(self) -> Autoencoder:
        assert isinstance(self._average.module, Autoencoder)
        return self._average.module

    def averaged_weights(self) -> dict[str, Tensor]:
        """The moving average, copied: what evaluates and tokenises, so what a checkpoint publishes."""
        return {name: training_state.kept(each) for name, each in self.averaged_model.state_dict().items()}

    def train_step(self, pixels_BHWC: Pixels, slots_B: NDArray[np.int64]) -> dict[str, float]:
        """One update from this rank's share of the global batch; `slots_B` are its positions in that batch.

        The loss is the mean over the global batch, whatever the shares of the ranks and the micro-batches. So are
        the figures, and the same on all ranks.
        """
        values = values_at(self.schedules, self.step)
        batch_size = self._batch_size or len(slots_B) * self._world_size
        batches = micro_batches(pixels_BHWC, slots_B, batch_size, self._micro_batch_size)
        if self._is_unsettled:
            self._settle(batches[-1], values)
        sums = self._backward(batches, values)
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.optim_config.grad_clip or math.inf)
        figures = self._over_ranks(sums | {"grad_norm": grad_norm.double() / self._world_size})
        updated = all(map(math.isfinite, figures.values()))  # of all ranks, so that all skip the same steps
        if updated:
            self._update(values)
        self._optimizer.zero_grad(set_to_none=True)
        self._count(updated)
        return figures | {
            "temperature": values.temperature,
            "kl_weight": values.kl_weight,
            "lr": self.optim_config.lr * values.lr,
            "skipped": float(not updated),
        }

    def evaluate(self, pixels_BHWC: Pixels, places_B: NDArray[np.int64]) -> EvalSums:
        """With the averaged weights and the temperature of the current step. `places_B`: of the images among all those
        held out."""
        return self._reconstructions(pixels_BHWC, places_B).sums()

    def reconstruct(
        self, pixels_BHWC: Pixels, places_B: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """(soft, hard), both uint8 (B, H, W, 3)."""
        return self._reconstructions(pixels_BHWC, places_B).pictures()

    def gather_code_counts(self) -> None:
        """From all ranks, which must all call it: then the state of each has them."""
        self._code_counts_K += self._summed(self._own_code_counts_K)
        self._own_code_counts_K.zero_()

    def take_code_use(self) -> dict[str, float]:
        """How the codes were used since it was last asked, with the argmax of every training image: held-out images
        may be fewer than the codes. All ranks must call it."""
        self.gather_code_counts()
        histogram_K = self._code_counts_K.cpu().numpy().astype(np.float64)
        self._code_counts_K.zero_()
        return code_use(histogram_K)

    def state_tensors(self) -> dict[str, Tensor]:
        """Copies on the CPU of all that a bit-identical resume needs."""
        state = training_state.state_tensors(self.model, self._average, self._optimizer)
        state["trainer.step"] = torch.tensor(self.step)
        state["trainer.skipped_steps"] = torch.tensor(self.skipped_steps)
        state["trainer.skipped_in_a_row"] = torch.tensor(self.skipped_in_a_row)
        state["trainer.code_counts"] = training_state.kept(self._code_counts_K)
        return state

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Refuses other names or shapes than this trainer's own, naming the first that differs."""
        scalar = torch.Size(())
        training_state.load_state_tensors(state, self.model, self._average, self._optimizer)
        self.step = int(training_state.taken(state, "trainer.step", scalar))
        self.skipped_steps = int(training_state.taken(state, "trainer.skipped_steps", scalar))
        in_a_row = state.get("trainer.skipped_in_a_row")  # states of before have none
        self.skipped_in_a_row = 0 if in_a_row is None else int(in_a_row)
        counts_K = state.get("trainer.code_counts")
        if counts_K is not None:
            self._code_counts_K.copy_(counts_K)

    def _settle(self, batch: MicroBatch, values: StepValues) -> None:
        """One pass whose gradients are thrown away. After the first one of a process DDP lays gradients out anew, in
        the order in which they came, and their place decides in which order more than two ranks are added up. So a
        run that goes on from a checkpoint would differ in the last bit from one that was never stopped."""
        counts_K = self._own_code_counts_K.clone()
        self._loss(batch, values, None).loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.zero_grad(set_to_none=True)
        self._own_code_counts_K.copy_(counts_K)
        self._is_unsettled = False

    def _backward(self, batches: Sequence[MicroBatch], values: StepValues) -> dict[str, Tensor]:
        """Adds up the gradients; what this rank has of the global batch's figures."""
        mean_K = self._mean_posterior(batches) if self._penalises_usage and self._micro_batch_size else None
        sums: dict[str, Tensor] = {}
        for batch in batches:
            with nullcontext() if batch.is_last else self._gradients_stay_here():
                parts = self._loss(batch, values, mean_K)
                (parts.loss * batch.weight(self._world_size)).backward()  # type: ignore[no-untyped-call]
            for name, value in self._measured(parts).items():
                own = value.detach().double() * batch.share
                sums[name] = sums[name] + own if name in sums else own
        return sums

    def _loss(self, batch: MicroBatch, values: StepValues, mean_K: Tensor | None) -> LossParts:
        """`mean_K`: the mean posterior of the global batch, if it is known already."""
        x_BCHW = self._mapped(batch.pixels_BHWC)
        keys_B2 = quantizer.noise_keys(self.seed, self.step, batch.slots_B).to(self.device)
        with self._autocast():
            stats_BCHW, codes = self._forward(x_BCHW, keys_B2, values.temperature)
        self._own_code_counts_K.index_add_(0, codes.tokens_N, torch.ones_like(codes.tokens_N))
        expected = self.model.expected
        parts = losses.loss_parts(stats_BCHW, x_BCHW, codes.kl_N, values.kl_weight, self.loss_config, expected)
        if not self._penalises_usage:
            return parts
        over_batch: Callable[[Tensor], Tensor] = lambda own_K: (  # noqa: E731
            self._summed(own_K * batch.share) if mean_K is None else mean_K
        )
        return losses.with_usage(parts, x_BCHW, codes.posterior_K, len(codes.kl_N), values.usage_weight, over_batch)

    @torch.no_grad()
    def _mean_posterior(self, batches: Sequence[MicroBatch]) -> Tensor:
        """(K,), over the global batch, by a pass of its own through the encoder: the usage term is no sum over
        micro-batches, so its gradient needs this before the first of them. All ranks must call it."""
        shares = []
        for batch in batches:
            with self._autocast():
                z_NC = self.model.encode(self._mapped(batch.pixels_BHWC))
            shares.append(mean_posterior(z_NC, self.model.tables()) * batch.share)
        return self._summed(torch.stack(shares).sum(dim=0))

    def _reconstructions(self, pixels_BHWC: Pixels, places_B: NDArray[np.int64]) -> Reconstructions:
        return self._evaluator.reconstruct(pixels_BHWC, places_B, values_at(self.schedules, self.step).temperature)

    def _measured(self, parts: LossParts) -> dict[str, Tensor]:
        """By the names of the metrics."""
        usage = {} if parts.usage_kl is None else {"usage_kl": parts.usage_kl}
        reconstruction = {losses.FIGURES[self.loss_config.likelihood]: parts.reconstruction}
        return {"loss": parts.loss, **reconstruction, "kl": parts.kl, **usage}

    def _mapped(self, pixels_BHWC: Pixels) -> Tensor:
        return self.model.map_pixels(torch.as_tensor(pixels_BHWC).to(self.device, non_blocking=True))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def _over_ranks(self, figures: dict[str, Tensor]) -> dict[str, float]:
        """Their sums over the ranks, with one transfer from the device."""
        return dict(zip(figures, self._summed(torch.stack(list(figures.values()))).tolist(), strict=True))

    def _summed(self, x: Tensor) -> Tensor:
        """Over the ranks, in place."""
        if self._distributed:
            dist.all_reduce(x)
        return x

    def _count(self, updated: bool) -> None:
        self.step += 1
        self.skipped_steps += not updated
        self.skipped_in_a_row = 0 if updated else self.skipped_in_a_row + 1

    def _update(self, values: StepValues) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self.optim_config.lr * values.lr
        self._optimizer.step()
        self._average.update_parameters(self.model)


def _in_ddp(model: Autoencoder, device: torch.device) -> DistributedDataParallel:
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def _moving_average(model: Autoencoder, decay: float) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]


def _adamw(model: Autoencoder, config: OptimConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
