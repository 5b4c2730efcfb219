"""What a dVAE, its loss, its optimiser and its schedules are: frozen dataclasses, checked as they are made.

The defaults are DALL·E's (arXiv 2102.12092). Reading files and command lines is the caller's business.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal


class ModelError(ValueError):
    """Something that the caller gave to the model wing is wrong; the message names it and the remedy."""


@dataclass(frozen=True)
class DVAEConfig:
    """The architecture. `stem="full"` is DALL·E's; `"strided"` opens with a 4×4 convolution of stride 4."""

    codebook_size: int = 8192
    downsample: Literal[4, 8, 16] = 8
    width: int = 256
    blocks_per_group: int = 2
    decoder_init: int = 128
    head: Literal["conv", "inner_product"] = "conv"
    code_dim: int = 128
    stem: Literal["full", "strided"] = "full"

    def __post_init__(self) -> None:
        _at_least("codebook_size", self.codebook_size, 2)
        _one_of("downsample", self.downsample, (4, 8, 16))
        _at_least("width", self.width, 4)
        if self.width % 4:
            raise ModelError(f"width {self.width} is not a multiple of 4 (a block is a quarter as wide inside)")
        _at_least("blocks_per_group", self.blocks_per_group, 1)
        _at_least("decoder_init", self.decoder_init, 1)
        _one_of("head", self.head, ("conv", "inner_product"))
        _at_least("code_dim", self.code_dim, 1)
        _one_of("stem", self.stem, ("full", "strided"))

    @property
    def stem_stride(self) -> int:
        return 4 if self.stem == "strided" else 1

    @property
    def group_widths(self) -> tuple[int, ...]:
        """Channels of each encoder group: doubled after every pooling, at most eight times the width."""
        num_poolings = (self.downsample // self.stem_stride).bit_length() - 1
        return tuple(self.width * min(2**group, 8) for group in range(num_poolings + 1))

    def grid(self, image_size: int) -> tuple[int, int]:
        """(H, W) tokens of a square image of `image_size` pixels."""
        if image_size < self.downsample or image_size % self.downsample:
            raise ModelError(f"image size {image_size} is not a multiple of downsample {self.downsample}")
        return image_size // self.downsample, image_size // self.downsample

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> DVAEConfig:
        known = {each.name for each in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ModelError(f"the model config has the unknown field {unknown[0]!r}; known: {sorted(known)}")
        return cls(**fields)


@dataclass(frozen=True)
class LossConfig:
    """Which density of pixels the decoder describes. The weight of the KL term is a schedule."""

    likelihood: Literal["logit_laplace", "l2", "l1"] = "logit_laplace"

    def __post_init__(self) -> None:
        _one_of("likelihood", self.likelihood, ("logit_laplace", "l2", "l1"))


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and what surrounds it. `lr` is multiplied by the schedule of that name.

    `grad_clip` is the largest gradient norm (None: no limit); DALL·E names none, so by default it only
    stops outliers.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    grad_clip: float | None = 1.0
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        _above("lr", self.lr, 0.0)
        for beta in self.betas:
            _share("betas", beta)
        _above("eps", self.eps, 0.0)
        _not_negative("weight_decay", self.weight_decay)
        if self.grad_clip is not None:
            _above("grad_clip", self.grad_clip, 0.0)
        _share("ema_decay", self.ema_decay)


@dataclass(frozen=True)
class Ramp:
    """From `start` at step 0 along half a cosine to `end` at step `steps`, and `end` from there on.

    During the first `warmup` steps the value is also scaled by (step + 1) / (warmup + 1).
    """

    start: float
    end: float
    steps: int
    warmup: int = 0

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            _not_negative(name, getattr(self, name))
        _at_least("steps", self.steps, 1)
        _at_least("warmup", self.warmup, 0)


@dataclass(frozen=True)
class ScheduleConfig:
    """What changes with the step. `lr` is a factor on `OptimConfig.lr`: DALL·E's 1e-4 → 1.25e-6.

    `usage_weight` weighs the KL of the batch's mean posterior to uniform: it keeps codes in use in short runs.
    """

    temperature: Ramp = field(default_factory=lambda: Ramp(1.0, 1 / 16, 150_000))
    kl_weight: Ramp = field(default_factory=lambda: Ramp(0.0, 6.6, 5_000))
    lr: Ramp = field(default_factory=lambda: Ramp(1.0, 0.0125, 1_200_000))
    usage_weight: Ramp = field(default_factory=lambda: Ramp(0.0, 0.0, 1))

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            _above(f"temperature.{name}", getattr(self.temperature, name), 0.0)
        if self.temperature.warmup:
            raise ModelError(f"temperature.warmup {self.temperature.warmup} must be 0: a warm-up starts at 0")


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ModelError(f"{name} {value!r} must be a whole number of at least {least}")


def _above(name: str, value: float, bound: float) -> None:
    if not (math.isfinite(value) and value > bound):
        raise ModelError(f"{name} {value!r} must be a finite number above {bound}")


def _not_negative(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0.0):
        raise ModelError(f"{name} {value!r} must be a finite number, zero or more")


def _share(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ModelError(f"{name} {value!r} must lie in [0, 1)")


def _one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ModelError(f"{name} {value!r} must be one of {', '.join(map(repr, choices))}")
