"""Inference: uint8 pixels → tokens, tokens → uint8 pixels, from a checkpoint. Reading it is the caller's.

Tokens must not depend on an image's neighbours or on how many are given: every batch has the same shape, filled
up with black images, and the number of torch threads is fixed (another one may pick another kernel).
"""
# B images, b images of one fixed-size batch, H W rows and columns, N positions, K codes, C channels

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import losses, quantizer
from model.checkpoint import Checkpoint
from model.config import ModelError
from model.dvae import DVAE, on_device
from model.quantizer import CodeTables

Precision = Literal["fp32", "bf16"]
CHUNK_BYTES = 8 << 20  # of logits: one chunk stays in the cache between the product and its argmax


class DVAETokenizer:
    """`grid`, `codebook_size`, `tokenizer_id` and `image_spec` say what it makes, `numerics` how it is computed."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "auto",
        precision: Precision = "fp32",
        batch_size: int = 32,
        threads: int = 1,
    ) -> None:
        if precision not in get_args(Precision):
            raise ModelError(f"precision {precision!r} must be one of {', '.join(get_args(Precision))}")
        if min(batch_size, threads) < 1:
            raise ModelError(f"batch_size {batch_size} and threads {threads} must be at least 1")
        config = checkpoint.dvae_config
        self.image_spec, self.tokenizer_id = checkpoint.image_spec, checkpoint.tokenizer_id
        self.codebook_size = config.codebook_size
        self.grid = config.grid(self.image_spec["size"])
        self._device, self._precision = _device(device), precision
        self._batch_size, self._threads = batch_size, threads
        self._model = _inference_model(checkpoint, self._device)
        self._turn = threading.Lock()

    @property
    def numerics(self) -> dict[str, Any]:
        """What may move a token that is nearly tied, without being part of the tokenizer's identity."""
        return {
            "device": self._device.type,
            "precision": self._precision,
            "compiled": False,
            "batch_size": self._batch_size,
            "threads": self._threads,
        }

    def encode(self, pixels_BHWC: NDArray[np.uint8]) -> NDArray[np.int32]:
        """uint8 (B, size, size, 3) → int32 (B, H, W), each in [0, codebook_size). From any thread; one at a time."""
        self._check_pixels(pixels_BHWC)
        with self._turn, self._inference():
            return self._in_batches(self._encode_batch, np.empty((0, *self.grid), np.int32), pixels_BHWC)

    def margins(self, pixels_BHWC: NDArray[np.uint8], tokens_BHW: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """By how much the best logit at each position beats that of the given token, (B, H, W): how near a tie a
        token was that `encode` gives otherwise; 0 where it is the same."""
        self._check_pixels(pixels_BHWC)
        self._check_tokens(tokens_BHW)
        with self._inference():
            return self._in_batches(self._margins_batch, np.empty((0, *self.grid), np.float32), pixels_BHWC, tokens_BHW)

    def decode(self, tokens_BHW: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        """Integers (B, H, W) → uint8 (B, H·f, W·f, 3)."""
        self._check_tokens(tokens_BHW)
        f = self._model.config.downsample
        none = np.empty((0, tokens_BHW.shape[1] * f, tokens_BHW.shape[2] * f, 3), np.uint8)
        with self._inference():
            return self._in_batches(self._decode_batch, none, tokens_BHW)

    def _encode_batch(self, pixels_bHWC: NDArray[np.uint8]) -> NDArray[np.int32]:
        tokens_N = _chunked_argmax(self._encoded(pixels_bHWC), self._model.tables())
        return tokens_N.reshape(len(pixels_bHWC), *self.grid)

    def _margins_batch(
        self, pixels_bHWC: NDArray[np.uint8], tokens_bHW: NDArray[np.integer[Any]]
    ) -> NDArray[np.float32]:
        tokens_N = torch.from_numpy(tokens_bHW.astype(np.int64).reshape(-1)).to(self._device)
        margins_N = _chunked_margins(self._encoded(pixels_bHWC), tokens_N, self._model.tables())
        return margins_N.reshape(len(pixels_bHWC), *self.grid)

    def _encoded(self, pixels_bHWC: NDArray[np.uint8]) -> Tensor:
        x_BCHW = losses.map_pixels(torch.from_numpy(pixels_bHWC).to(self._device))
        with self._autocast():
            return self._model.encode(x_BCHW)

    def _decode_batch(self, tokens_bHW: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        tokens_N = torch.from_numpy(tokens_bHW.astype(np.int64).reshape(-1)).to(self._device)
        batch, rows, columns = tokens_bHW.shape
        with self._autocast():
            stats_BCHW = self._model.decode_tokens(tokens_N, (batch, rows, columns))
        return losses.to_uint8(losses.reconstruction(stats_BCHW)).cpu().numpy()

    def _in_batches(
        self, one_batch: Callable[..., NDArray[Any]], none: NDArray[Any], *arrays: NDArray[Any]
    ) -> NDArray[Any]:
        """Apply `one_batch` to batches of one fixed shape; the last is filled up with zeros, and cut again."""
        done = [none]
        for start in range(0, len(arrays[0]), self._batch_size):
            parts = [rows[start : start + self._batch_size] for rows in arrays]
            done.append(one_batch(*map(self._padded, parts))[: len(parts[0])])
        return np.concatenate(done)

    def _padded(self, rows: NDArray[Any]) -> NDArray[Any]:
        padded = np.zeros((self._batch_size, *rows.shape[1:]), rows.dtype)
        padded[: len(rows)] = rows
        return padded

    def _check_pixels(self, pixels_BHWC: NDArray[np.uint8]) -> None:
        size = self.image_spec["size"]
        if pixels_BHWC.dtype != np.uint8 or pixels_BHWC.ndim != 4 or pixels_BHWC.shape[1:] != (size, size, 3):
            found = f"{pixels_BHWC.dtype} {pixels_BHWC.shape}"
            raise ModelError(f"pixels are {found}; this tokenizer takes uint8 (B, {size}, {size}, 3)")

    def _check_tokens(self, tokens_BHW: NDArray[np.integer[Any]]) -> None:
        if tokens_BHW.ndim != 3 or not np.issubdtype(tokens_BHW.dtype, np.integer):
            raise ModelError(f"tokens are {tokens_BHW.dtype} {tokens_BHW.shape}; decode takes integers (B, H, W)")
        if tokens_BHW.size and not (tokens_BHW.min() >= 0 and tokens_BHW.max() < self.codebook_size):
            low, high = tokens_BHW.min(), tokens_BHW.max()
            raise ModelError(f"tokens lie in [{low}, {high}]; this codebook has [0, {self.codebook_size - 1}]")

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bf16")

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """No gradients, our number of threads (the process's own afterwards), and true fp32 on CUDA."""
        threads = torch.get_num_threads()
        exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode(), exact:
                yield
        finally:
            torch.set_num_threads(threads)


def _chunked_argmax(z_NC: Tensor, tables: CodeTables) -> NDArray[np.int32]:
    """argmax of the logits, never holding more of them than a chunk."""
    parts = [_argmax(quantizer.logits(each, tables)) for each in torch.split(z_NC, _chunk(tables))]
    return np.concatenate(parts)


def _chunked_margins(z_NC: Tensor, tokens_N: Tensor, tables: CodeTables) -> NDArray[np.float32]:
    chunks = zip(torch.split(z_NC, _chunk(tables)), torch.split(tokens_N, _chunk(tables)), strict=True)
    return np.concatenate([_margins(quantizer.logits(z_nC, tables), tokens_n) for z_nC, tokens_n in chunks])


def _margins(logits_NK: Tensor, tokens_N: Tensor) -> NDArray[np.float32]:
    chosen_N = logits_NK.gather(1, tokens_N[:, None])[:, 0]
    return np.asarray((logits_NK.amax(dim=1) - chosen_N).cpu().numpy(), dtype=np.float32)


def _chunk(tables: CodeTables) -> int:
    return max(1, CHUNK_BYTES // (4 * tables.keys_KC.shape[0]))


def _argmax(logits_NK: Tensor) -> NDArray[np.int32]:
    """On the CPU by numpy: 16 times faster there than torch (2.13) at 8192 codes."""
    on_cpu = logits_NK.device.type == "cpu"
    tokens_N = logits_NK.numpy().argmax(axis=1) if on_cpu else logits_NK.argmax(dim=1).cpu().numpy()
    return np.asarray(tokens_N, dtype=np.int32)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ModelError(f"device {name!r} must be auto, cpu, cuda or cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device {name!r} was asked for, but torch sees no CUDA device")
    return torch.device(name)


def _inference_model(checkpoint: Checkpoint, device: torch.device) -> DVAE:
    with torch.device("meta"):
        model = DVAE(checkpoint.dvae_config)
    model.load_state_dict(checkpoint.weights, assign=True)
    return on_device(model.requires_grad_(False).eval(), device)
