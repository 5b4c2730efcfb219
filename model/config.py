"""What a model, its loss, its optimiser and its schedules are: frozen dataclasses, checked as they are made.

There are two architectures, DALL·E's dVAE and DALLE-pytorch's DiscreteVAE; `config_class` says which one a model's
fields mean. The defaults are DALL·E's (arXiv 2102.12092). Reading files and command lines is the caller's business.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from model.checks import ModelError as ModelError  # where all others look for it
from model.checks import above, at_least, between, not_negative, one_of, share

MAX_BLOCKS = 256  # a config may come from a stranger, and layers are built before they are compared
MAX_LAYERS = 16  # each halves the picture
Likelihood = Literal["logit_laplace", "l2", "l1"]

NO_DECODER = (
    "this checkpoint is an encoder alone: it makes tokens, and pictures need the decoder too; import both, "
    "`dvae import encoder.pkl decoder.pkl DEST`: the tokenizer_id, and so every token, stays the same"
)


class ArchitectureConfig(ABC):
    """What is asked of an architecture before there are weights."""

    codebook_size: int
    likelihoods: ClassVar[tuple[Likelihood, ...]]
    """That its decoder can be trained with; the first is that of its authors."""

    @property
    @abstractmethod
    def downsample(self) -> int:
        """Pixels along each side of a token."""

    @property
    @abstractmethod
    def has_conv_head(self) -> bool:
        """Logits come from a convolution, which takes what is before it in the precision of the others."""

    @abstractmethod
    def largest_activation(self, image_size: int) -> int:
        """Values of one image's widest tensor in the encoder."""

    @abstractmethod
    def encoder_side(self) -> dict[str, Any]:
        """Those fields that decide tokens; a decoder may change without changing them."""

    @abstractmethod
    def in_words(self) -> str:
        """For a model card."""

    def grid(self, image_size: int) -> tuple[int, int]:
        """(H, W) tokens of a square image of `image_size` pixels."""
        if image_size < self.downsample or image_size % self.downsample:
            raise ModelError(f"image size {image_size} is not a multiple of downsample {self.downsample}")
        return image_size // self.downsample, image_size // self.downsample

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload,no-any-return]  # those below are dataclasses

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        known = {each.name for each in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(set(fields) - known):
            raise ModelError(f"the model config has the unknown field {unknown[0]!r}; known: {sorted(known)}")
        return cls(**fields)


@dataclass(frozen=True)
class DVAEConfig(ArchitectureConfig):
    """DALL·E's. `stem="full"` is its own; `"strided"` opens with a 4×4 convolution of stride 4."""

    likelihoods = ("logit_laplace", "l2", "l1")

    codebook_size: int = 8192
    downsample: Literal[4, 8, 16] = 8
    width: int = 256
    blocks_per_group: int = 2
    decoder_init: int = 128
    head: Literal["conv", "inner_product"] = "conv"
    code_dim: int = 128
    stem: Literal["full", "strided"] = "full"

    def __post_init__(self) -> None:
        at_least("codebook_size", self.codebook_size, 2)
        one_of("downsample", self.downsample, (4, 8, 16))
        at_least("width", self.width, 4)
        if self.width % 4:
            raise ModelError(f"width {self.width} is not a multiple of 4 (a block is a quarter as wide inside)")
        between("blocks_per_group", self.blocks_per_group, 1, MAX_BLOCKS)
        at_least("decoder_init", self.decoder_init, 1)
        one_of("head", self.head, ("conv", "inner_product"))
        at_least("code_dim", self.code_dim, 1)
        one_of("stem", self.stem, ("full", "strided"))

    @property
    def stem_stride(self) -> int:
        return 4 if self.stem == "strided" else 1

    @property
    def group_widths(self) -> tuple[int, ...]:
        """Channels of each encoder group: doubled after every pooling, at most eight times the width."""
        num_poolings = (self.downsample // self.stem_stride).bit_length() - 1
        return tuple(self.width * min(2**group, 8) for group in range(num_poolings + 1))

    @property
    def has_conv_head(self) -> bool:
        return self.head == "conv"

    def largest_activation(self, image_size: int) -> int:
        return (image_size // self.stem_stride) ** 2 * self.width

    def encoder_side(self) -> dict[str, Any]:
        decoder_only = {"decoder_init"} | ({"code_dim"} if self.head == "conv" else set())
        return {name: value for name, value in self.to_json().items() if name not in decoder_only}

    def in_words(self) -> str:
        blocks = f"{self.blocks_per_group} blocks a group"
        return f"As DALL·E's (arXiv 2102.12092), width {self.width}, {blocks}, head `{self.head}`, stem `{self.stem}`."


Colour = tuple[float, float, float]


@dataclass(frozen=True)
class DiscreteVAEConfig(ArchitectureConfig):
    """DALLE-pytorch's DiscreteVAE (1.6.6) on three colours; the defaults are those of its train_vae.py.

    `codebook_size` is called num_tokens there. `normalization`: means and standard deviations of red, green and blue,
    in [0, 1]: the encoder sees (x − mean)/std, and the decoder's output is of that kind.
    """

    architecture: Literal["dalle_pytorch"] = "dalle_pytorch"
    codebook_size: int = 8192
    num_layers: int = 3
    num_resnet_blocks: int = 2
    hidden_dim: int = 256
    codebook_dim: int = 512
    normalization: tuple[Colour, Colour] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    likelihoods = ("l2", "l1")

    def __post_init__(self) -> None:
        one_of("architecture", self.architecture, ("dalle_pytorch",))
        at_least("codebook_size", self.codebook_size, 2)
        between("num_layers", self.num_layers, 1, MAX_LAYERS)
        between("num_resnet_blocks", self.num_resnet_blocks, 0, MAX_BLOCKS)
        at_least("hidden_dim", self.hidden_dim, 1)
        at_least("codebook_dim", self.codebook_dim, 1)
        object.__setattr__(self, "normalization", _normalization(self.normalization))

    @property
    def downsample(self) -> int:
        return int(2**self.num_layers)

    @property
    def has_conv_head(self) -> bool:
        return True

    def largest_activation(self, image_size: int) -> int:
        return (image_size // 2) ** 2 * self.hidden_dim

    def encoder_side(self) -> dict[str, Any]:
        return {name: value for name, value in self.to_json().items() if name != "codebook_dim"}

    def in_words(self) -> str:
        sizes = ("num_layers", "num_resnet_blocks", "hidden_dim", "codebook_dim")
        return f"As DALLE-pytorch's DiscreteVAE: {', '.join(f'{name} {getattr(self, name)}' for name in sizes)}."


ModelConfig = DVAEConfig | DiscreteVAEConfig


def config_class(fields: Mapping[str, Any]) -> type[ModelConfig]:
    """Which architecture a model's fields, from JSON or YAML, are of. Those without a name are DALL·E's."""
    if "architecture" not in fields:
        return DVAEConfig
    one_of("architecture", fields["architecture"], (DiscreteVAEConfig.architecture,), " (leave it out for DALL·E's)")
    return DiscreteVAEConfig


def model_config(fields: dict[str, Any]) -> ModelConfig:
    """Of a checkpoint's record. Raises ModelError."""
    return config_class(fields).from_json(fields)


@dataclass(frozen=True)
class LossConfig:
    """Which density of pixels the decoder describes. The weight of the KL term is a schedule."""

    likelihood: Likelihood = "logit_laplace"

    def __post_init__(self) -> None:
        one_of("likelihood", self.likelihood, ("logit_laplace", "l2", "l1"))

    def check_fits(self, model: ArchitectureConfig) -> None:
        """Raises ModelError."""
        one_of("likelihood", self.likelihood, model.likelihoods, " here: this decoder gives colours, no log-scales")


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
        above("lr", self.lr, 0.0)
        for beta in self.betas:
            share("betas", beta)
        above("eps", self.eps, 0.0)
        not_negative("weight_decay", self.weight_decay)
        if self.grad_clip is not None:
            above("grad_clip", self.grad_clip, 0.0)
        share("ema_decay", self.ema_decay)


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
            not_negative(name, getattr(self, name))
        at_least("steps", self.steps, 1)
        at_least("warmup", self.warmup, 0)


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
            above(f"temperature.{name}", getattr(self.temperature, name), 0.0)
        if self.temperature.warmup:
            raise ModelError(f"temperature.warmup {self.temperature.warmup} must be 0: a warm-up starts at 0")


def _normalization(given: Any) -> tuple[Colour, Colour]:
    """As tuples, whatever it came as."""
    try:
        means, stds = ((float(red), float(green), float(blue)) for red, green, blue in given)
    except (TypeError, ValueError):
        raise ModelError(f"normalization {given!r} must be three means and three standard deviations") from None
    for mean in means:
        not_negative("normalization: mean", mean)
    for std in stds:
        above("normalization: standard deviation", std, 0.0)
    return means, stds
