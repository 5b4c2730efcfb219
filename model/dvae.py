"""The dVAE's layers: DALL·E's encoder and decoder (openai/DALL-E) at any width, depth and downsampling.

State-dict names are OpenAI's under `encoder.` and `decoder.`; the inner-product head adds `codebook`.
The bottleneck's arithmetic lives in bottleneck.py and quantizer.py. Beside it, the encoder's last and the decoder's
first convolution stay in fp32, whatever autocast says.
"""
# B batch, C channels, H W rows and columns of tokens or pixels, N = B·H·W positions, K codes, D code channels

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import quantizer
from model.bottleneck import CodeFigures, relaxed_latent
from model.config import DVAEConfig, ModelError
from model.quantizer import CodeTables, GumbelNoise


class Conv2d(nn.Module):
    """Zero-padded convolution; `w` is drawn from N(0, 1/fan_in) and `b` is 0 at the start."""

    def __init__(self, n_in: int, n_out: int, kernel: int, *, stride: int = 1, fp32: bool = False) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(n_out, n_in, kernel, kernel))
        self.b = nn.Parameter(torch.empty(n_out))
        self.stride, self.fp32 = stride, fp32
        self.padding = (kernel - 1) // 2 if stride == 1 else 0

    def reset_parameters(self, generator: torch.Generator) -> None:
        fan_in = self.w[0].numel()
        with torch.no_grad():
            self.w.normal_(std=fan_in**-0.5, generator=generator)
            self.b.zero_()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self.fp32:
            return F.conv2d(x_BCHW, self.w, self.b, stride=self.stride, padding=self.padding)
        with torch.autocast(x_BCHW.device.type, enabled=False):
            return F.conv2d(x_BCHW.float(), self.w, self.b, stride=self.stride, padding=self.padding)


class Block(nn.Module):
    """id_path(x) + post_gain · res_path(x): four convolutions, a quarter of the width inside."""

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, ...], post_gain: float) -> None:
        super().__init__()
        inner = n_out // 4
        widths = (n_in, inner, inner, inner, n_out)
        self.post_gain = post_gain
        self.id_path: nn.Module = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel in enumerate(kernels):
            layers[f"relu_{i + 1}"] = nn.ReLU(inplace=i > 0)  # the block's own input is also that of id_path
            layers[f"conv_{i + 1}"] = Conv2d(widths[i], widths[i + 1], kernel)
        self.res_path = nn.Sequential(layers)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        id_BCHW: Tensor = self.id_path(x_BCHW)
        res_BCHW: Tensor = self.res_path(x_BCHW).mul_(self.post_gain)
        # In place: fresh memory for every sum costs more on a CPU than adding up does.
        return res_BCHW.add_(id_BCHW) if id_BCHW.dtype == res_BCHW.dtype else id_BCHW + res_BCHW


Kernels = tuple[int, int, int, int]
ENCODER_KERNELS: Kernels = (3, 3, 3, 1)
DECODER_KERNELS: Kernels = (1, 3, 3, 3)


class Group(nn.Sequential):
    """With a `forward` of our own, for torch.compile makes no graph of torch's."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for layer in self:
            x_BCHW = layer(x_BCHW)
        return x_BCHW


def _group(
    widths: tuple[int, int], kernels: Kernels, config: DVAEConfig, resize: tuple[str, nn.Module] | None
) -> Group:
    """`blocks_per_group` blocks from widths[0] to widths[1], then the pooling or upsampling, if any."""
    post_gain = 1.0 / (len(config.group_widths) * config.blocks_per_group) ** 2
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(config.blocks_per_group):
        layers[f"block_{i + 1}"] = Block(widths[0] if i == 0 else widths[1], widths[1], kernels, post_gain)
    if resize is not None:
        layers[resize[0]] = resize[1]
    return Group(layers)


def _through(blocks: Iterable[nn.Module], x_BCHW: Tensor, *, recomputes: bool) -> Tensor:
    """`recomputes`: of each group only what goes in is kept; the backward pass computes the rest again, bit for bit."""
    for block in blocks:
        if recomputes and torch.is_grad_enabled() and isinstance(block, Group):
            x_BCHW = checkpoint(block, x_BCHW, use_reentrant=False, preserve_rng_state=False)
        else:
            x_BCHW = block(x_BCHW)
    return x_BCHW


class Encoder(nn.Module):
    """Mapped pixels (B, 3, H·f, W·f) → logits (B, K, H, W), or the code latent for the inner-product head."""

    recomputes = False

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        kernel = config.stem_stride if config.stem == "strided" else 7
        widths = (config.width, *config.group_widths)
        out = config.codebook_size if config.head == "conv" else config.code_dim
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["input"] = Conv2d(3, config.width, kernel, stride=config.stem_stride)
        for g in range(1, len(widths)):
            pool = ("pool", nn.MaxPool2d(kernel_size=2)) if g < len(widths) - 1 else None
            layers[f"group_{g}"] = _group((widths[g - 1], widths[g]), ENCODER_KERNELS, config, pool)
        head = OrderedDict([("relu", nn.ReLU(inplace=True)), ("conv", Conv2d(widths[-1], out, 1, fp32=True))])
        layers["output"] = nn.Sequential(head)
        self.blocks = nn.Sequential(layers)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out_BCHW: Tensor = self.output(self.body(x_BCHW))
        return out_BCHW

    def body(self, x_BCHW: Tensor) -> Tensor:
        """All but the last convolution."""
        x_BCHW = _through(list(self.blocks)[:-1], x_BCHW, recomputes=self.recomputes)
        return F.relu(x_BCHW, inplace=True)

    @property
    def output(self) -> Conv2d:
        return _conv(self.blocks, "output.conv")


class Decoder(nn.Module):
    """Latent (B, K or D, H, W) → pixel statistics (B, 6, H·f, W·f): three means, three log-scales."""

    recomputes = False

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        widths = (config.decoder_init, *reversed(config.group_widths))
        n_in = config.codebook_size if config.head == "conv" else config.code_dim
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["input"] = Conv2d(n_in, config.decoder_init, 1, fp32=True)
        for g in range(1, len(widths)):
            up = ("upsample", nn.Upsample(scale_factor=2, mode="nearest")) if g < len(widths) - 1 else None
            layers[f"group_{g}"] = _group((widths[g - 1], widths[g]), DECODER_KERNELS, config, up)
        layers["output"] = _pixel_head(widths[-1], config.stem_stride)
        self.blocks = nn.Sequential(layers)

    def forward(self, latent_BCHW: Tensor) -> Tensor:
        return self.body(self.input(latent_BCHW))

    def body(self, x_BCHW: Tensor) -> Tensor:
        """All but the first convolution."""
        return _through(list(self.blocks)[1:], x_BCHW, recomputes=self.recomputes)

    @property
    def input(self) -> Conv2d:
        return _conv(self.blocks, "input")


def _conv(blocks: nn.Sequential, name: str) -> Conv2d:
    module = blocks.get_submodule(name)
    assert isinstance(module, Conv2d)
    return module


def _pixel_head(width: int, stride: int) -> Group:
    """The last 1×1 convolution; for a strided stem it makes stride² pixels at once, the stem's mirror."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["relu"] = nn.ReLU()
    layers["conv"] = Conv2d(width, 6 * stride * stride, 1)
    if stride > 1:
        layers["shuffle"] = nn.PixelShuffle(stride)
    return Group(layers)


Grid = tuple[int, int, int]  # (B, H, W) of tokens


class Relaxed(NamedTuple):
    """What one training pass yields."""

    stats_BCHW: Tensor  # (B, 6, H·f, W·f), fp32
    codes: CodeFigures


class DVAE(nn.Module):
    """Encoder, bottleneck and decoder. `forward` is the relaxed training pass."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        if config.head == "inner_product":
            self.codebook = nn.Parameter(torch.empty(config.codebook_size, config.code_dim))

    def forward(self, x_BCHW: Tensor, noise_keys_B2: Tensor, temperature: float) -> Relaxed:
        grid_BHW = self.grid_of(x_BCHW)
        noise = GumbelNoise(noise_keys_B2, grid_BHW[1] * grid_BHW[2], self.config.codebook_size)
        latent_ND, codes = relaxed_latent(self.encode(x_BCHW), self.tables(), noise, temperature)
        return Relaxed(self.decode(latent_ND, grid_BHW), codes)

    def recompute_activations(self) -> None:
        """From now on, training keeps fewer activations and computes the others twice: the same bits, less memory."""
        self.encoder.recomputes = self.decoder.recomputes = True

    def grid_of(self, x_BCHW: Tensor) -> Grid:
        """(B, H, W) of the tokens of these pixels."""
        f = self.config.downsample
        if x_BCHW.shape[2] % f or x_BCHW.shape[3] % f:
            raise ModelError(f"pixels of {tuple(x_BCHW.shape[2:])} are not a multiple of downsample {f}")
        return x_BCHW.shape[0], x_BCHW.shape[2] // f, x_BCHW.shape[3] // f

    def encode(self, x_BCHW: Tensor) -> Tensor:
        """Mapped pixels → what the keys of the codes are multiplied with: (N, C) in fp32, in raster order."""
        return self.latents(x_BCHW).float()

    def latents(self, x_BCHW: Tensor) -> Tensor:
        """`encode` in whatever type the last convolution gives."""
        conv_head = self.config.head == "conv"
        z_BCHW: Tensor = self.encoder.body(x_BCHW) if conv_head else self.encoder(x_BCHW)
        return z_BCHW.permute(0, 2, 3, 1).flatten(0, 2)

    def tables(self) -> CodeTables:
        """Keys make the logits, codes make the latent; for `inner_product` one table is both."""
        if self.config.head == "inner_product":
            return CodeTables(self.codebook, None, self.codebook, None)
        keys, codes = self.encoder.output, self.decoder.input
        return CodeTables(keys.w.flatten(1), keys.b, codes.w.flatten(1).T, codes.b)

    def decode_tokens(self, tokens_N: Tensor, grid_BHW: Grid) -> Tensor:
        """Pixel statistics of one-hot codes, by lookup."""
        return self.decode(quantizer.hard_latent(tokens_N, self.tables()), grid_BHW)

    def decode(self, latent_ND: Tensor, grid_BHW: Grid) -> Tensor:
        """Latents, one row per position → pixel statistics in fp32."""
        latent_BDHW = latent_ND.reshape(*grid_BHW, -1).permute(0, 3, 1, 2)
        conv_head = self.config.head == "conv"
        stats_BCHW: Tensor = self.decoder.body(latent_BDHW) if conv_head else self.decoder(latent_BDHW)
        return stats_BCHW.float()

    def reset_parameters(self, seed: int) -> None:
        """The same seed gives the same weights on every machine: drawn on the CPU, module by module."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, Conv2d):
                module.reset_parameters(generator)
        if self.config.head == "inner_product":
            with torch.no_grad():
                self.codebook.normal_(std=self.config.code_dim**-0.5, generator=generator)


def seeded_dvae(config: DVAEConfig, seed: int) -> DVAE:
    model = DVAE(config)
    model.reset_parameters(seed)
    return model


def on_device(model: DVAE, device: torch.device) -> DVAE:
    """Weights lie channels-last, as the pixels do: convolutions then need no reordering."""
    return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
