"""What the rest of model/ asks of an architecture, and the passes through one that are the same for all.

An architecture has pixels of its own kind (`map_pixels`, `unmap_pixels`), an encoder that ends in what the keys of the
codes are multiplied with (`latents`), the tables of its codes, and a decoder (`decode`, `expected`). What stands
between encoder and decoder is bottleneck.py's when training and quantizer.py's otherwise.
"""
# B batch, C channels, H W rows and columns of tokens or pixels, N = B·H·W positions, K codes, D code channels

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import quantizer
from model.bottleneck import CodeFigures, relaxed_latent
from model.config import ArchitectureConfig, ModelError
from model.quantizer import CodeTables, GumbelNoise

Grid = tuple[int, int, int]  # (B, H, W) of tokens


class Relaxed(NamedTuple):
    """What one training pass yields."""

    stats_BCHW: Tensor  # (B, C, H·f, W·f), fp32
    codes: CodeFigures


class Autoencoder(nn.Module, ABC):
    """`forward` is the relaxed training pass. State-dict names of what decides tokens begin with `encoder.`, but for a
    `codebook` that is both keys and codes."""

    config: ArchitectureConfig
    recomputes = False

    def forward(self, x_BCHW: Tensor, noise_keys_B2: Tensor, temperature: float) -> Relaxed:
        grid_BHW = self.grid_of(x_BCHW)
        noise = GumbelNoise(noise_keys_B2, grid_BHW[1] * grid_BHW[2], self.config.codebook_size)
        latent_ND, codes = relaxed_latent(self.encode(x_BCHW), self.tables(), noise, temperature)
        return Relaxed(self.decode(latent_ND, grid_BHW), codes)

    def recompute_activations(self) -> None:
        """From now on, training keeps fewer activations and computes the others twice: the same bits, less memory."""
        self.recomputes = True

    def grid_of(self, x_BCHW: Tensor) -> Grid:
        """(B, H, W) of the tokens of these pixels."""
        f = self.config.downsample
        if x_BCHW.shape[2] % f or x_BCHW.shape[3] % f:
            raise ModelError(f"pixels of {tuple(x_BCHW.shape[2:])} are not a multiple of downsample {f}")
        return x_BCHW.shape[0], x_BCHW.shape[2] // f, x_BCHW.shape[3] // f

    def encode(self, x_BCHW: Tensor) -> Tensor:
        """Mapped pixels → what the keys of the codes are multiplied with: (N, C) in fp32, in raster order."""
        return self.latents(x_BCHW).float()

    def decode_tokens(self, tokens_N: Tensor, grid_BHW: Grid) -> Tensor:
        """Pixel statistics of one-hot codes, by lookup."""
        return self.decode(quantizer.hard_latent(tokens_N, self.tables()), grid_BHW)

    def reconstruction(self, stats_BCHW: Tensor) -> Tensor:
        """Pixel statistics → (B, 3, H, W) in [0, 1]."""
        return self.unmap_pixels(self.expected(stats_BCHW))

    @abstractmethod
    def map_pixels(self, pixels_BHWC: Tensor, out: Tensor | None = None) -> Tensor:
        """uint8 → what the encoder takes: (B, 3, H, W) in fp32, laid out channels-last; in `out` (B, H, W, 3) if it is
        given."""

    @abstractmethod
    def unmap_pixels(self, x_BCHW: Tensor) -> Tensor:
        """Back to [0, 1], clamped."""

    @abstractmethod
    def expected(self, stats_BCHW: Tensor) -> Tensor:
        """Pixel statistics → the mapped pixels (B, 3, H, W) that they describe."""

    @abstractmethod
    def latents(self, x_BCHW: Tensor) -> Tensor:
        """`encode` in whatever type the last layer gives."""

    @abstractmethod
    def tables(self) -> CodeTables:
        """Keys make the logits, codes make the latent."""

    @abstractmethod
    def decode(self, latent_ND: Tensor, grid_BHW: Grid) -> Tensor:
        """Latents, one row per position → pixel statistics in fp32."""

    @abstractmethod
    def encoder_body(self) -> Sequence[nn.Module]:
        """The encoder's layers that lie outside the bottleneck, whose fp32 is a promise."""

    @abstractmethod
    def decoder_body(self) -> Sequence[nn.Module]:
        """The decoder's."""

    @abstractmethod
    def reset_parameters(self, seed: int) -> None:
        """The same seed gives the same weights on every machine: drawn on the CPU, module by module."""


class Group(nn.Sequential):
    """With a `forward` of our own, for torch.compile makes no graph of torch's."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return through(self, x_BCHW)


def through(layers: Iterable[nn.Module], x_BCHW: Tensor) -> Tensor:
    for layer in layers:
        x_BCHW = layer(x_BCHW)
    return x_BCHW


def computed_again(part: Callable[[Tensor], Tensor], x_BCHW: Tensor) -> Tensor:
    """Only what goes in is kept; the backward pass computes the rest again, bit for bit."""
    if not torch.is_grad_enabled():
        return part(x_BCHW)
    made: Tensor = checkpoint(part, x_BCHW, use_reentrant=False, preserve_rng_state=False)
    return made


Model = TypeVar("Model", bound=Autoencoder)


def seeded(model: Model, seed: int) -> Model:
    model.reset_parameters(seed)
    return model


def on_device(model: Model, device: torch.device) -> Model:
    """Weights lie channels-last, as the pixels do: convolutions then need no reordering."""
    return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
