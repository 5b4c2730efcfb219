"""The encoder as tokenising runs it: weights cast once, fixed shapes, compiled if wished; uint8 pixels → latents.

In bf16 and fp16 the encoder's convolutions and what lies between them are of that type, as under autocast; its last
convolution, or the product with the codebook, stays in fp32. tf32 is fp32 whose convolutions multiply with 10 bits of
mantissa, on GPUs that can.
"""
# b images of one fixed-size batch, H W rows and columns, N positions, C channels

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from model import same_bits
from model.architectures import build
from model.autoencoder import Autoencoder, on_device
from model.checkpoint import Checkpoint
from model.config import ModelError
from model.dvae import NoDecoder

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def check_precision(precision: str, device: torch.device) -> torch.dtype:
    if precision not in DTYPES:
        raise ModelError(f"precision {precision!r} must be one of {', '.join(DTYPES)}")
    if precision in ("tf32", "fp16") and device.type == "cpu":
        raise ModelError(f"precision {precision!r} needs a CUDA device; on the CPU take bf16 or fp32")
    return DTYPES[precision]


def find_device(name: str) -> torch.device:
    """Raises ModelError for a CUDA device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ModelError(f"device {name!r} must be auto, cpu, cuda or cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device {name!r} was asked for, but torch sees no CUDA device")
    return torch.device(name)


def inference_model(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Autoencoder:
    """Frozen, on the device, its encoder in `dtype` but for the fp32 island."""
    with torch.device("meta"):
        model = build(checkpoint.dvae_config)
        if not checkpoint.has_decoder:
            model.decoder = NoDecoder()
    model.load_state_dict(checkpoint.weights, assign=True)
    model = on_device(model.requires_grad_(False).eval(), device)
    for layer in model.encoder_body():
        layer.to(dtype)
    return model


class Latents:
    """uint8 (b, H, W, 3) on the device → (N, C): fp32, or the encoder's own type before a conv head. To be made and
    called inside `exact`, for it chooses by trying."""

    def __init__(
        self, model: Autoencoder, dtype: torch.dtype, pixels_shape: tuple[int, ...], *, compiled: bool
    ) -> None:
        self._model, self._dtype = model, dtype
        device = next(model.parameters()).device
        # A buffer of our own costs no page faults; a compiled pass makes none of this size.
        self._x_bHWC = None if compiled else torch.empty(pixels_shape, dtype=torch.float32, device=device)
        self._latents: Callable[[Tensor], Tensor] = self._eager
        if compiled:
            self._latents = torch.compile(self._eager, fullgraph=True, dynamic=False)
        elif device.type == "cpu":
            self._choose(pixels_shape)

    def __call__(self, pixels_bHWC: Tensor) -> Tensor:
        return self._latents(pixels_bHWC)

    def _choose(self, pixels_shape: tuple[int, ...]) -> None:
        """A few images at a time where that gives the same bits: their activations stay in the cache, on the heap."""
        bytes_per_image = self._model.config.largest_activation(pixels_shape[1]) * self._dtype.itemsize
        self._at_once = same_bits.images_at_once(pixels_shape[0], bytes_per_image)
        if self._at_once == pixels_shape[0]:
            return
        pixels_bHWC = torch.randint(0, 256, pixels_shape, dtype=torch.uint8, generator=same_bits.seeded())
        self._z_NC = torch.empty_like(self._eager(pixels_bHWC))
        if same_bits.is_better(lambda: self._in_parts(pixels_bHWC), lambda: self._eager(pixels_bHWC)):
            self._latents = self._in_parts

    def _in_parts(self, pixels_bHWC: Tensor) -> Tensor:
        """In a buffer of its own, until the next call."""
        parts = torch.split(pixels_bHWC, self._at_once)
        for z_nC, part_nHWC in zip(torch.chunk(self._z_NC, len(parts)), parts, strict=True):
            z_nC.copy_(self._eager(part_nHWC))
        return self._z_NC

    def _eager(self, pixels_bHWC: Tensor) -> Tensor:
        out = None if self._x_bHWC is None else self._x_bHWC[: len(pixels_bHWC)]
        x_bCHW = self._model.map_pixels(pixels_bHWC, out=out)
        return self._model.latents(x_bCHW.to(self._dtype))


@contextmanager
def compiling() -> Iterator[None]:
    """Raises ModelError saying what torch.compile lacked."""
    try:
        yield
    except RuntimeError as error:
        first = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"compile: torch.compile failed ({type(error).__name__}: {first}); it needs a C++ compiler on CPUs (g++, "
            "or $CXX) and Triton on GPUs: install it, or set compile=false"
        ) from error
