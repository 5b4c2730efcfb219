"""DALLE-pytorch's DiscreteVAE (lucidrains, 1.6.6): its layers, and its own form of a file, `vae.pt`.

State-dict names are those of its class. It differs from DALL·E's dVAE in its pixels (normalised, not mapped to
[0.1, 0.9]), and in its decoder, which gives three colours without log-scales: it was trained with a squared error.
"""
# B batch, C channels, H W rows and columns of tokens or pixels, N = B·H·W positions, D code channels

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from model.autoencoder import Autoencoder, Grid, Group, computed_again, through
from model.checks import ModelError
from model.config import ArchitectureConfig, Colour, DiscreteVAEConfig
from model.quantizer import CodeTables

NAMES = {"codebook_size": "num_tokens"}  # ours → its own, where they differ
# What its constructor takes where hparams do not say.
DEFAULTS = {"image_size": 256, "num_tokens": 512, "codebook_dim": 512, "num_layers": 3, "num_resnet_blocks": 0,
            "hidden_dim": 64, "channels": 3}  # fmt: skip
# What else its constructor takes: how it is trained, so no token hangs on it.
OF_TRAINING = {"smooth_l1_loss", "temperature", "straight_through", "reinmax", "kl_div_loss_weight"}
HPARAMS = "the hparams"


class ResBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = Group(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        made_BCHW: Tensor = self.net(x_BCHW)
        return made_BCHW.add_(x_BCHW)


class Conv2d(nn.Conv2d):
    """With a `forward` of our own, for torch.compile makes no graph of torch's."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return super().forward(x_BCHW)


def _encoder(config: DiscreteVAEConfig) -> Iterator[nn.Module]:
    for n_in in (3, *[config.hidden_dim] * (config.num_layers - 1)):
        yield Group(nn.Conv2d(n_in, config.hidden_dim, 4, stride=2, padding=1), nn.ReLU(inplace=True))
    for _ in range(config.num_resnet_blocks):
        yield ResBlock(config.hidden_dim)
    yield nn.Conv2d(config.hidden_dim, config.codebook_size, 1)


def _decoder(config: DiscreteVAEConfig) -> Iterator[nn.Module]:
    first = config.codebook_dim
    if config.num_resnet_blocks:
        yield Conv2d(config.codebook_dim, config.hidden_dim, 1)
        first = config.hidden_dim
    for _ in range(config.num_resnet_blocks):
        yield ResBlock(config.hidden_dim)
    for n_in in (first, *[config.hidden_dim] * (config.num_layers - 1)):
        yield Group(nn.ConvTranspose2d(n_in, config.hidden_dim, 4, stride=2, padding=1), nn.ReLU(inplace=True))
    yield Conv2d(config.hidden_dim, 3, 1)


class DiscreteVAE(Autoencoder):
    """Pixel statistics are the normalised pixels themselves."""

    config: DiscreteVAEConfig

    def __init__(self, config: DiscreteVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.codebook = nn.Embedding(config.codebook_size, config.codebook_dim)
        self.encoder, self.decoder = nn.Sequential(*_encoder(config)), nn.Sequential(*_decoder(config))

    def map_pixels(self, pixels_BHWC: Tensor, out: Tensor | None = None) -> Tensor:
        mean, std = (_one_or_each(values, pixels_BHWC.device) for values in self.config.normalization)
        return torch.div(pixels_BHWC, 255.0, out=out).sub_(mean).div_(std).permute(0, 3, 1, 2)

    def unmap_pixels(self, x_BCHW: Tensor) -> Tensor:
        mean, std = (_one_or_each(values, x_BCHW.device) for values in self.config.normalization)
        return (x_BCHW.permute(0, 2, 3, 1) * std + mean).clamp_(0.0, 1.0).permute(0, 3, 1, 2)

    def expected(self, stats_BCHW: Tensor) -> Tensor:
        return stats_BCHW

    def encoder_body(self) -> Sequence[nn.Module]:
        return list(self.encoder)[:-1]

    def decoder_body(self) -> Sequence[nn.Module]:
        return list(self.decoder)

    def latents(self, x_BCHW: Tensor) -> Tensor:
        z_BCHW = self._through(self.encoder_body(), x_BCHW)
        return z_BCHW.permute(0, 2, 3, 1).flatten(0, 2)

    def tables(self) -> CodeTables:
        keys = cast(nn.Conv2d, self.encoder[-1])
        return CodeTables(keys.weight.flatten(1), keys.bias, self.codebook.weight, None)

    def decode(self, latent_ND: Tensor, grid_BHW: Grid) -> Tensor:
        latent_BDHW = latent_ND.reshape(*grid_BHW, -1).permute(0, 3, 1, 2)
        return self._through(self.decoder_body(), latent_BDHW).float()

    def _through(self, layers: Sequence[nn.Module], x_BCHW: Tensor) -> Tensor:
        """Encoder and decoder are computed again whole: their first and last layers hold most of what is kept, and
        only one of the two is then in memory."""
        if self.recomputes:
            return computed_again(lambda x_BCHW: through(layers, x_BCHW), x_BCHW)
        return through(layers, x_BCHW)

    def reset_parameters(self, seed: int) -> None:
        """As torch's own layers begin: uniform within 1/√fan_in; codes are drawn from N(0, 1)."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                    bound = module.weight[0].numel() ** -0.5
                    for parameter in module.parameters():
                        parameter.uniform_(-bound, bound, generator=generator)
            self.codebook.weight.normal_(generator=generator)


def _one_or_each(values: Colour, device: torch.device) -> float | Tensor:
    """One number where it is the same for all colours: much faster."""
    return values[0] if len(set(values)) == 1 else torch.tensor(values, device=device)


def from_hparams(
    hparams: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[DiscreteVAEConfig, dict[str, Tensor], int]:
    """The parts of a `vae.pt` (of a `dalle.pt`: its `vae_params`, and the weights under `vae.` without that prefix) →
    config, our weights in fp32, image size. Raises ModelError naming the first thing that does not fit."""
    config, image_size = _config({**DEFAULTS, **hparams})
    expected = _expected(config)
    if lacking := [name for name in expected if name not in weights]:
        raise ModelError(f"the tensor {lacking[0]!r} is missing, which the hparams ask for")
    if unknown := [name for name in weights if name not in expected]:
        raise ModelError(f"the tensor {unknown[0]!r} is there, which the hparams do not ask for")
    for name, wanted in expected.items():
        found = weights[name]
        if found.shape != wanted.shape or not found.is_floating_point():
            raise ModelError(
                f"{name!r} is {found.dtype} {tuple(found.shape)}; the hparams ask for {tuple(wanted.shape)}"
            )
    return config, {name: weights[name].detach().float() for name in expected}, image_size


def to_hparams(config: DiscreteVAEConfig, image_size: int) -> dict[str, Any]:
    """What its constructor takes. Raises ModelError for images of a size that it refuses."""
    config.grid(image_size)
    if image_size & (image_size - 1):
        raise ModelError(f"DALLE-pytorch takes images of a power of 2; this checkpoint's have {image_size} pixels")
    fields = {NAMES.get(name, name): value for name, value in config.to_json().items() if name != "architecture"}
    if fields["normalization"] == DiscreteVAEConfig.normalization:
        del fields["normalization"]
    return {"image_size": image_size, **fields, "channels": 3}


def vae_pt(config: ArchitectureConfig, weights: Mapping[str, Tensor], image_size: int) -> bytes:
    """A file as its train_vae.py writes: loads with `torch.load(…, weights_only=True)`. Raises ModelError for another
    architecture, and for images of a size that its class refuses."""
    if not isinstance(config, DiscreteVAEConfig):
        raise ModelError(
            "a vae.pt holds DALLE-pytorch's DiscreteVAE, and this checkpoint has DALL·E's architecture: other layers, "
            "which that class cannot hold; train with model.architecture=dalle_pytorch to have one that it can"
        )
    # In the order of its class: safetensors gives another one every time, and the same model should be the same bytes.
    kept = {name: weights[name].detach().cpu().contiguous() for name in _expected(config)}
    buffer = io.BytesIO()
    torch.save({"hparams": to_hparams(config, image_size), "weights": kept}, buffer)
    return buffer.getvalue()


def _config(hparams: Mapping[str, Any]) -> tuple[DiscreteVAEConfig, int]:
    fields = {name: value for name, value in hparams.items() if name not in OF_TRAINING}
    image_size, channels = fields.pop("image_size"), fields.pop("channels")
    if channels != 3:
        raise ModelError(f"{HPARAMS} say channels {channels!r}: only models of three colours (RGB) are read here")
    if not isinstance(image_size, int) or isinstance(image_size, bool):
        raise ModelError(f"{HPARAMS} say image_size {image_size!r}: it must be a whole number")
    ours = {theirs: name for name, theirs in NAMES.items()}
    try:
        if fields.get("normalization", ()) is None:
            raise ModelError("normalization None (pixels as they are) is not read here")
        if "normalization" in fields:  # its default has a fourth entry, for transparency
            fields["normalization"] = [tuple(values)[:3] for values in fields["normalization"]]
        config = DiscreteVAEConfig.from_json({ours.get(name, name): value for name, value in fields.items()})
        config.grid(image_size)
    except (ModelError, TypeError) as error:
        raise ModelError(f"{HPARAMS}: {error}") from error
    return config, image_size


def _expected(config: DiscreteVAEConfig) -> dict[str, Tensor]:
    """Without memory behind them."""
    try:
        with torch.device("meta"):
            return DiscreteVAE(config).state_dict()
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ModelError(f"{HPARAMS} ask for tensors that no memory could hold: {config}") from error
