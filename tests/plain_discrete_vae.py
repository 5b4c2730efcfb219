"""DALLE-pytorch's DiscreteVAE as formulas over a state dict: what ours is held against where its package is not."""
# B images, C channels, H W rows and columns of tokens or pixels, K codes

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Hparams = dict[str, Any]
# Three shapes: with residual blocks, without, and deeper with a wide codebook.
SHAPES: dict[str, Hparams] = {
    "two blocks": {
        "image_size": 32, "num_tokens": 96, "codebook_dim": 24, "num_layers": 3, "num_resnet_blocks": 2,
        "hidden_dim": 16, "channels": 3,
    },
    "no blocks": {
        "image_size": 16, "num_tokens": 40, "codebook_dim": 20, "num_layers": 2, "num_resnet_blocks": 0,
        "hidden_dim": 12, "channels": 3,
    },
    "many codes": {
        "image_size": 64, "num_tokens": 4096, "codebook_dim": 48, "num_layers": 4, "num_resnet_blocks": 1,
        "hidden_dim": 32, "channels": 3,
    },
}  # fmt: skip


def drawn_weights(hparams: Hparams, seed: int = 0) -> dict[str, Tensor]:
    """Under the names of its class, in its order."""
    hidden, layers, blocks = hparams["hidden_dim"], hparams["num_layers"], hparams["num_resnet_blocks"]
    generator = torch.Generator().manual_seed(seed)
    weights = {"codebook.weight": torch.randn(hparams["num_tokens"], hparams["codebook_dim"], generator=generator)}

    def conv(name: str, *shape: int, transposed: bool = False) -> None:
        scale = (2.0 / (shape[1] * shape[2] * shape[3])) ** 0.5
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) * scale
        width = shape[1] if transposed else shape[0]
        weights[f"{name}.bias"] = torch.randn(width, generator=generator) * 0.1

    def resblock(name: str) -> None:
        for at, kernel in ((0, 3), (2, 3), (4, 1)):
            conv(f"{name}.net.{at}", hidden, hidden, kernel, kernel)

    for n in range(layers):
        conv(f"encoder.{n}.0", hidden, hidden if n else 3, 4, 4)
    for n in range(blocks):
        resblock(f"encoder.{layers + n}")
    conv(f"encoder.{layers + blocks}", hparams["num_tokens"], hidden, 1, 1)
    first = 1 if blocks else 0
    if blocks:
        conv("decoder.0", hidden, hparams["codebook_dim"], 1, 1)
    for n in range(blocks):
        resblock(f"decoder.{first + n}")
    for n in range(layers):
        width = hidden if n or blocks else hparams["codebook_dim"]
        conv(f"decoder.{first + blocks + n}.0", width, hidden, 4, 4, transposed=True)
    conv(f"decoder.{first + blocks + layers}", 3, hidden, 1, 1)
    return weights


def logits(weights: dict[str, Tensor], hparams: Hparams, images_BCHW: Tensor) -> Tensor:
    """Pixels in [0, 1] → (B, K, H, W)."""
    x_BCHW = (images_BCHW - 0.5) / 0.5
    layers, blocks = hparams["num_layers"], hparams["num_resnet_blocks"]
    for n in range(layers):
        x_BCHW = F.conv2d(x_BCHW, *_of(weights, f"encoder.{n}.0"), stride=2, padding=1).relu()
    for n in range(blocks):
        x_BCHW = _resblock(weights, f"encoder.{layers + n}", x_BCHW)
    return F.conv2d(x_BCHW, *_of(weights, f"encoder.{layers + blocks}"))


def decoded(weights: dict[str, Tensor], hparams: Hparams, tokens_BHW: Tensor) -> Tensor:
    """Tokens → what its decoder gives, in [-1, 1] or a little beyond."""
    x_BCHW = weights["codebook.weight"][tokens_BHW].permute(0, 3, 1, 2)
    layers, blocks = hparams["num_layers"], hparams["num_resnet_blocks"]
    first = 1 if blocks else 0
    if blocks:
        x_BCHW = F.conv2d(x_BCHW, *_of(weights, "decoder.0"))
    for n in range(blocks):
        x_BCHW = _resblock(weights, f"decoder.{first + n}", x_BCHW)
    for n in range(layers):
        at = f"decoder.{first + blocks + n}.0"
        x_BCHW = F.conv_transpose2d(x_BCHW, *_of(weights, at), stride=2, padding=1).relu()
    return F.conv2d(x_BCHW, *_of(weights, f"decoder.{first + blocks + layers}"))


def _of(weights: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


def _resblock(weights: dict[str, Tensor], name: str, x_BCHW: Tensor) -> Tensor:
    y_BCHW = F.conv2d(x_BCHW, *_of(weights, f"{name}.net.0"), padding=1).relu()
    y_BCHW = F.conv2d(y_BCHW, *_of(weights, f"{name}.net.2"), padding=1).relu()
    return F.conv2d(y_BCHW, *_of(weights, f"{name}.net.4")) + x_BCHW
