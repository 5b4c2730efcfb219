"""Inference: uint8 pixels → tokens, tokens → uint8 pixels, from a checkpoint. Reading it is the caller's.

Tokens must not depend on an image's neighbours or on how many are given: every batch has the same shape, filled
up with black images, and the number of torch threads is fixed (another one may pick another kernel). All may be
called from several threads at once; lanes.py orders them.
"""
# B images, b images of one fixed-size batch, H W rows and columns, N positions, K codes, C channels

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import losses, quantizer, same_bits
from model.checkpoint import Checkpoint
from model.code_search import CodeSearch, SplitCodeSearch, chunk_rows
from model.config import ModelError
from model.inference import Latents, Precision, check_precision, compiling, find_device, inference_model
from model.lanes import Lanes, exact
from model.quantizer import CodeTables


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
        compile: bool = False,
    ) -> None:
        if min(batch_size, threads) < 1:
            raise ModelError(f"batch_size {batch_size} and threads {threads} must be at least 1")
        config = checkpoint.dvae_config
        self.image_spec, self.tokenizer_id = checkpoint.image_spec, checkpoint.tokenizer_id
        self.codebook_size = config.codebook_size
        self.grid = config.grid(self.image_spec["size"])
        self._device = find_device(device)
        self._precision, self._dtype = precision, check_precision(precision, self._device)
        self._batch_size, self._threads, self._compiled = batch_size, threads, compile
        self._model = inference_model(checkpoint, self._device, self._dtype)
        size = self.image_spec["size"]
        pixels_shape, tokens_shape = (batch_size, size, size, 3), (batch_size, *self.grid)
        with self._exact():
            self._latents = Latents(self._model, self._dtype, pixels_shape, compiled=compile)
            self._search = self._code_search()
        # Last: on CUDA the lanes' stream waits here for all that was written above, the search's buffers too.
        self._lanes = Lanes(pixels_shape, tokens_shape, self._device)
        if compile:
            with compiling():  # now, and not within the first shard's deadline
                self.encode(np.zeros((1, size, size, 3), np.uint8))

    @property
    def numerics(self) -> dict[str, Any]:
        """What may move a token that is nearly tied, without being part of the tokenizer's identity."""
        return {
            "device": self._device.type,
            "precision": self._precision,
            "compiled": self._compiled,
            "batch_size": self._batch_size,
            "threads": self._threads,
        }

    @property
    def device_name(self) -> str | None:
        """What the CUDA device calls itself; None on a CPU."""
        return torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else None

    def encode(self, pixels_BHWC: NDArray[np.uint8]) -> NDArray[np.int32]:
        """uint8 (B, size, size, 3) → int32 (B, H, W), each in [0, codebook_size). The pixels may be read-only."""
        self._check_pixels(pixels_BHWC)
        tokens_BHW = np.empty((len(pixels_BHWC), *self.grid), np.int32)
        for start in range(0, len(pixels_BHWC), self._batch_size):
            part_BHWC = pixels_BHWC[start : start + self._batch_size]
            with self._lanes.lane() as lane:
                lane.fill(part_BHWC)
                with self._exact():
                    lane.launch(self._encode_batch)
                tokens_BHW[start : start + self._batch_size] = lane.tokens()[: len(part_BHWC)]
        return tokens_BHW

    def margins(self, pixels_BHWC: NDArray[np.uint8], tokens_BHW: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """By how much the best logit at each position beats that of the given token, (B, H, W): how near a tie a
        token was that `encode` gives otherwise; 0 where it is the same."""
        self._check_pixels(pixels_BHWC)
        self._check_tokens(tokens_BHW)
        with self._exact(), self._lanes.in_turn():
            return self._in_batches(self._margins_batch, np.empty((0, *self.grid), np.float32), pixels_BHWC, tokens_BHW)

    def decode(self, tokens_BHW: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        """Integers (B, H, W) → uint8 (B, H·f, W·f, 3)."""
        self._check_tokens(tokens_BHW)
        f = self._model.config.downsample
        none = np.empty((0, tokens_BHW.shape[1] * f, tokens_BHW.shape[2] * f, 3), np.uint8)
        with self._exact():
            return self._in_batches(self._decode_batch, none, tokens_BHW)

    def _exact(self) -> AbstractContextManager[None]:
        return exact(self._threads, tf32=self._precision == "tf32")

    def _code_search(self) -> Callable[[Tensor], Tensor]:
        tables, num_rows = self._model.tables(), self._batch_size * self.grid[0] * self.grid[1]
        split = self._device.type == "cuda" and self._dtype != torch.float32 and self._model.config.has_conv_head
        if split:
            return SplitCodeSearch(tables, num_rows, self._dtype)
        plain = CodeSearch(tables, num_rows)
        return same_bits.packed_search(tables, plain, num_rows) or plain

    def _encode_batch(self, pixels_bHWC: Tensor) -> Tensor:
        return self._search(self._latents(pixels_bHWC)).view(-1, *self.grid)

    def _margins_batch(
        self, pixels_bHWC: NDArray[np.uint8], tokens_bHW: NDArray[np.integer[Any]]
    ) -> NDArray[np.float32]:
        tokens_N = torch.from_numpy(tokens_bHW.astype(np.int64).reshape(-1)).to(self._device)
        latents_NC = self._latents(torch.from_numpy(pixels_bHWC).to(self._device))
        margins_N = _chunked_margins(latents_NC.float(), tokens_N, self._model.tables())
        return margins_N.reshape(len(pixels_bHWC), *self.grid)

    def _decode_batch(self, tokens_bHW: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        tokens_N = torch.from_numpy(tokens_bHW.astype(np.int64).reshape(-1)).to(self._device)
        batch, rows, columns = tokens_bHW.shape
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            stats_BCHW = self._model.decode_tokens(tokens_N, (batch, rows, columns))
        return losses.to_uint8(self._model.reconstruction(stats_BCHW)).cpu().numpy()

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


def _chunked_margins(z_NC: Tensor, tokens_N: Tensor, tables: CodeTables) -> NDArray[np.float32]:
    rows = chunk_rows(len(tables.keys_KC), z_NC.device.type)
    chunks = zip(torch.split(z_NC, rows), torch.split(tokens_N, rows), strict=True)
    return np.concatenate([_margins(quantizer.logits(z_nC, tables), tokens_n) for z_nC, tokens_n in chunks])


def _margins(logits_NK: Tensor, tokens_N: Tensor) -> NDArray[np.float32]:
    chosen_N = logits_NK.gather(1, tokens_N[:, None])[:, 0]
    return np.asarray((logits_NK.amax(dim=1) - chosen_N).cpu().numpy(), dtype=np.float32)
