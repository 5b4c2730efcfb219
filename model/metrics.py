"""What an evaluation adds up, over batches and over ranks, and the figures made of the sums."""
# B batch, C channels, H W rows and columns of pixels, N positions, K codes

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import losses
from model.bottleneck import CodeFigures
from model.similarity import has_ssim, ssim

NUM_SCALARS = 10


@dataclass(frozen=True)
class EvalSums:
    """`posterior_K` sums q(code | x) and `histogram_K` counts the argmax, over all positions."""

    num_images: float
    num_values: float
    num_positions: float
    squared_error_soft: float  # pixels in [0, 1]
    squared_error_hard: float
    ssim_soft: float  # of all images; NaN where they are too small for it
    ssim_hard: float
    nll: float  # nats for logit_laplace, squared or absolute error otherwise; noisy relaxation as in training
    kl: float  # nats, to the uniform distribution
    entropy: float  # nats, of q(code | x)
    histogram_K: NDArray[np.float64]
    posterior_K: NDArray[np.float64]

    @classmethod
    def zeros(cls, codebook_size: int) -> EvalSums:
        return cls.from_array(np.zeros(NUM_SCALARS + 2 * codebook_size))

    def to_array(self) -> NDArray[np.float64]:
        """One float64 vector, so that ranks can add theirs up in one reduction."""
        scalars = [
            self.num_images,
            self.num_values,
            self.num_positions,
            self.squared_error_soft,
            self.squared_error_hard,
            self.ssim_soft,
            self.ssim_hard,
            self.nll,
            self.kl,
            self.entropy,
        ]
        return np.concatenate([np.array(scalars, dtype=np.float64), self.histogram_K, self.posterior_K])

    @classmethod
    def from_array(cls, array: NDArray[np.float64]) -> EvalSums:
        scalars, per_code = array[:NUM_SCALARS].tolist(), array[NUM_SCALARS:]
        half = per_code.size // 2
        fields: list[Any] = [*scalars, per_code[:half], per_code[half:]]
        return cls(*fields)

    def __add__(self, other: EvalSums) -> EvalSums:
        return EvalSums.from_array(self.to_array() + other.to_array())

    def metrics(self, likelihood: str = "logit_laplace") -> dict[str, float]:
        """`kl` = `information` + `usage_kl`: I(x; z), and the KL of the mean posterior to uniform."""
        if not self.num_values:
            raise ValueError("no image was evaluated: the held-out shards are empty")
        kl = self.kl / self.num_positions
        usage_kl = math.log(self.histogram_K.size) - _entropy(self.posterior_K)
        return {
            "psnr_soft": psnr(self.squared_error_soft / self.num_values),
            "psnr_hard": psnr(self.squared_error_hard / self.num_values),
            **self._ssims(),
            losses.FIGURES[likelihood]: self.nll / self.num_values,
            "kl": kl,
            "information": kl - usage_kl,
            "usage_kl": usage_kl,
            "posterior_entropy": self.entropy / self.num_positions,
            **code_use(self.histogram_K),
        }

    def _ssims(self) -> dict[str, float]:
        """Nothing for images that are too small."""
        means = {"ssim_soft": self.ssim_soft / self.num_images, "ssim_hard": self.ssim_hard / self.num_images}
        return {name: mean for name, mean in means.items() if not math.isnan(mean)}


def code_use(histogram_K: NDArray[np.float64]) -> dict[str, float]:
    """Of how often each code is the argmax."""
    num_codes, used = histogram_K.size, float((histogram_K > 0).sum())
    num_positions = float(histogram_K.sum())
    return {
        "used_share": used / num_codes,
        "dead_codes": num_codes - used,
        "perplexity": math.exp(_entropy(histogram_K)),
        "top_share": float(histogram_K.max() / num_positions),
        "num_positions": num_positions,
    }


def psnr(mean_squared_error: float) -> float:
    """Decibels for pixels in [0, 1]; at most 100, so that equal images give a number."""
    return -10.0 * math.log10(max(mean_squared_error, 1e-10))


def eval_sums(x_BCHW: Tensor, soft_BCHW: Tensor, hard_BCHW: Tensor, nll_B: Tensor, codes: CodeFigures) -> EvalSums:
    """Sums of one batch; pixels in [0, 1]."""
    num_positions, num_codes = len(codes.kl_N), len(codes.posterior_K)
    kl = _total(codes.kl_N)
    return EvalSums(
        num_images=float(len(x_BCHW)),
        num_values=float(x_BCHW.numel()),
        num_positions=float(num_positions),
        squared_error_soft=_total((soft_BCHW - x_BCHW).square()),
        squared_error_hard=_total((hard_BCHW - x_BCHW).square()),
        ssim_soft=_ssim(soft_BCHW, x_BCHW),
        ssim_hard=_ssim(hard_BCHW, x_BCHW),
        nll=_total(nll_B),
        kl=kl,
        entropy=num_positions * math.log(num_codes) - kl,
        histogram_K=torch.bincount(codes.tokens_N, minlength=num_codes).cpu().numpy().astype(np.float64),
        posterior_K=codes.posterior_K.cpu().numpy().astype(np.float64) * num_positions,
    )


def _ssim(made_BCHW: Tensor, x_BCHW: Tensor) -> float:
    return _total(ssim(made_BCHW, x_BCHW)) if has_ssim(*x_BCHW.shape[2:]) else math.nan


def _total(x: Tensor) -> float:
    return float(x.sum(dtype=torch.float64))


def _entropy(weights_K: NDArray[np.float64]) -> float:
    probs = weights_K[weights_K > 0] / weights_K.sum()
    return float(-(probs * np.log(probs)).sum())
