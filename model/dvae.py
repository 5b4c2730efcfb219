"""The dVAE's layers: DALL·E's encoder and decoder (openai/DALL-E) at any width, depth and downsampling.

State-dict names are OpenAI's under `encoder.` and `decoder.`; the inner-product head adds `codebook`.
The bottleneck's arithmetic lives in bottleneck.py and quantizer.py. Beside it, the encoder's last and the decoder's
first convolution stay in fp32, whatever autocast says.
"""
# B batch, C channels, H W rows and columns of tokens or pixels, N = B·H·W positions, K codes, D code channels

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import losses
from model.autoencoder import Autoencoder, Grid, Group, computed_again, seeded
from model.config import NO_DECODER, DVAEConfig, ModelError
from model.quantizer import CodeTables


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


def _through(blocks: Sequence[nn.Module], x_BCHW: Tensor, *, recomputes: bool) -> Tensor:
    """`recomputes`: of each group only what goes in is kept."""
    for block in blocks:
        x_BCHW = computed_again(block, x_BCHW) if recomputes and isinstance(block, Group) else block(x_BCHW)
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
        x_BCHW = _through(self.body_layers, x_BCHW, recomputes=self.recomputes)
        return F.relu(x_BCHW, inplace=True)

    @property
    def body_layers(self) -> list[nn.Module]:
        return list(self.blocks)[:-1]

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
        return _through(self.body_layers, x_BCHW, recomputes=self.recomputes)

    @property
    def body_layers(self) -> list[nn.Module]:
        return list(self.blocks)[1:]

    @property
    def input(self) -> Conv2d:
        return _conv(self.blocks, "input")


class NoDecoder(Decoder):
    """In the place of the decoder that a checkpoint lacks. It has no weights, and refuses."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.blocks = nn.Sequential()

    def body(self, x_BCHW: Tensor) -> Tensor:
        raise ModelError(NO_DECODER)

    def forward(self, latent_BCHW: Tensor) -> Tensor:
        return self.body(latent_BCHW)


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


class DVAE(Autoencoder):
    """Encoder, bottleneck and decoder. Pixel statistics are three means and three log-scales of the logit-Laplace."""

    config: DVAEConfig

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        if config.head == "inner_product":
            self.codebook = nn.Parameter(torch.empty(config.codebook_size, config.code_dim))

    def recompute_activations(self) -> None:
        self.encoder.recomputes = self.decoder.recomputes = True

    def map_pixels(self, pixels_BHWC: Tensor, out: Tensor | None = None) -> Tensor:
        return losses.map_pixels(pixels_BHWC, out)

    def unmap_pixels(self, x_BCHW: Tensor) -> Tensor:
        return losses.unmap_pixels(x_BCHW)

    def expected(self, stats_BCHW: Tensor) -> Tensor:
        return losses.expected_pixels(stats_BCHW)

    def encoder_body(self) -> Sequence[nn.Module]:
        return self.encoder.body_layers

    def decoder_body(self) -> Sequence[nn.Module]:
        return self.decoder.body_layers

    def latents(self, x_BCHW: Tensor) -> Tensor:
        conv_head = self.config.head == "conv"
        z_BCHW: Tensor = self.encoder.body(x_BCHW) if conv_head else self.encoder(x_BCHW)
        return z_BCHW.permute(0, 2, 3, 1).flatten(0, 2)

    def tables(self) -> CodeTables:
        """Keys make the logits, codes make the latent; for `inner_product` one table is both."""
        if self.config.head == "inner_product":
            return CodeTables(self.codebook, None, self.codebook, None)
        keys = self.encoder.output
        if isinstance(self.decoder, NoDecoder):
            return CodeTables(keys.w.flatten(1), keys.b, keys.w.new_empty(len(keys.w), 0), None)
        codes = self.decoder.input
        return CodeTables(keys.w.flatten(1), keys.b, codes.w.flatten(1).T, codes.b)

    def decode(self, latent_ND: Tensor, grid_BHW: Grid) -> Tensor:
        latent_BDHW = latent_ND.reshape(*grid_BHW, -1).permute(0, 3, 1, 2)
        conv_head = self.config.head == "conv"
        stats_BCHW: Tensor = self.decoder.body(latent_BDHW) if conv_head else self.decoder(latent_BDHW)
        return stats_BCHW.float()

    def reset_parameters(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, Conv2d):
                module.reset_parameters(generator)
        if self.config.head == "inner_product":
            with torch.no_grad():
                self.codebook.normal_(std=self.config.code_dim**-0.5, generator=generator)


def seeded_dvae(config: DVAEConfig, seed: int) -> DVAE:
    return seeded(DVAE(config), seed)
