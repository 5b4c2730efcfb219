"""What a model makes of held-out images, relaxed and from tokens, with noise that is the same at every evaluation."""
# B images, C channels, H W rows and columns of pixels, N positions, K codes

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import losses, quantizer
from model.autoencoder import Autoencoder
from model.bottleneck import CodeFigures
from model.checkpoint import Checkpoint
from model.config import LossConfig, ModelError
from model.inference import inference_model
from model.metrics import EvalSums, eval_sums
from model.micro_batches import Pixels

EVALUATION_STEP = 2**62  # keys the noise of evaluations apart from that of every training step


class PixelMetric(Protocol):
    """A figure of pictures, added up over batches."""

    def add(self, x_BCHW: Tensor, made_BCHW: Tensor) -> None:
        """Originals and reconstructions, fp32 in [0, 1]."""

    def figures(self) -> dict[str, float]: ...


@dataclass(frozen=True)
class Reconstructions:
    """Of one batch; pixels in [0, 1]. `nll_B` is of the relaxed reconstruction."""

    x_BCHW: Tensor
    soft_BCHW: Tensor
    hard_BCHW: Tensor
    nll_B: Tensor
    codes: CodeFigures

    def sums(self) -> EvalSums:
        return eval_sums(self.x_BCHW, self.soft_BCHW, self.hard_BCHW, self.nll_B, self.codes)

    def pictures(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """(soft, hard), both uint8 (B, H, W, 3)."""
        return losses.to_uint8(self.soft_BCHW).cpu().numpy(), losses.to_uint8(self.hard_BCHW).cpu().numpy()


class Evaluator:
    """Holds a model as it is: a training run's moving average goes on changing under it."""

    def __init__(
        self, model: Autoencoder, loss: LossConfig, *, seed: int, device: torch.device, precision: str
    ) -> None:
        if precision not in ("fp32", "bf16"):
            raise ModelError(f"precision {precision!r} must be fp32 or bf16")
        loss.check_fits(model.config)
        self._model, self._loss, self._seed, self._device = model, loss, seed, device
        self._bf16 = precision == "bf16"

    @classmethod
    def of_checkpoint(
        cls, checkpoint: Checkpoint, loss: LossConfig, *, seed: int, device: torch.device, precision: str
    ) -> Evaluator:
        model = inference_model(checkpoint, device, torch.float32)
        return cls(model, loss, seed=seed, device=device, precision=precision)

    @property
    def likelihood(self) -> str:
        return self._loss.likelihood

    @property
    def codebook_size(self) -> int:
        return self._model.config.codebook_size

    @torch.no_grad()
    def reconstruct(self, pixels_BHWC: Pixels, places_B: NDArray[np.int64], temperature: float) -> Reconstructions:
        """`places_B`: of the images among all those held out. The noise is drawn by them, so that neither the batch
        size nor the number of workers changes it."""
        model = self._model
        x_BCHW = model.map_pixels(torch.as_tensor(pixels_BHWC).to(self._device, non_blocking=True))
        keys_B2 = quantizer.noise_keys(self._seed, EVALUATION_STEP, places_B).to(self._device)
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16):
            soft_BCHW, codes = model(x_BCHW, keys_B2, temperature)
            hard_BCHW = model.decode_tokens(codes.tokens_N, model.grid_of(x_BCHW))
        return Reconstructions(
            x_BCHW=model.unmap_pixels(x_BCHW),
            soft_BCHW=model.reconstruction(soft_BCHW),
            hard_BCHW=model.reconstruction(hard_BCHW),
            nll_B=losses.negative_log_likelihood(soft_BCHW, x_BCHW, self._loss, model.expected),
            codes=codes,
        )
