"""Batches on their way to the device and back: buffers that are made once, and who may use torch's settings when.

`exact` is one caller at a time, in all of the process; a lane is one batch's buffers. On CUDA a tokenizer has two
lanes: while the device computes one batch, the next is copied into pinned memory and from there to the device, and
nobody holds the settings while waiting. On the CPU there is one lane, and computing is what `exact` orders.
"""
# b images of one fixed-size batch, H W rows and columns (of pixels, or of tokens), C channels

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SETTINGS = threading.Lock()  # threads and flags are torch's, not a tokenizer's
LANES_ON_CUDA = 2

Encode = Callable[[Tensor], Tensor]  # uint8 (b, H, W, C) → int32 (b, H, W), both on the device


@contextmanager
def exact(threads: int, *, tf32: bool = False) -> Iterator[None]:
    """No gradients, so many threads, and true fp32 (but for convolutions, where `tf32` is wished); all as it was
    afterwards. On CUDA the flags count where a kernel
    is launched, so waiting for it needs none of this. No benchmarking: it may choose another kernel in another run."""
    with _SETTINGS:
        before, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")
        cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32)
        try:
            with torch.inference_mode(), cudnn:
                yield
        finally:
            torch.set_float32_matmul_precision(precision)
            torch.set_num_threads(before)


class Lane:
    """`fill`, `launch` (inside `exact`), `tokens`: in this order, by one thread."""

    def __init__(self, pixels_shape: tuple[int, ...], tokens_shape: tuple[int, ...], *, pinned: bool = False) -> None:
        self._pixels = torch.zeros(pixels_shape, dtype=torch.uint8, pin_memory=pinned)
        self._tokens = torch.zeros(tokens_shape, dtype=torch.int32, pin_memory=pinned)

    def fill(self, pixels_BHWC: NDArray[np.uint8]) -> None:
        """At most a batch, which is filled up with black. The array is read here and never again."""
        batch_bHWC = self._pixels.numpy()
        batch_bHWC[: len(pixels_BHWC)] = pixels_BHWC
        batch_bHWC[len(pixels_BHWC) :] = 0

    def launch(self, encode: Encode) -> None:
        self._tokens.copy_(encode(self._pixels))

    def tokens(self) -> NDArray[np.int32]:
        """(b, H, W), until the lane is used again."""
        return self._tokens.numpy()


class CudaLane(Lane):
    """From pinned memory on a stream of its own, so that the copy runs beside the computing of another lane. All lanes
    of a tokenizer compute on one stream, in turn, for its other buffers are shared."""

    def __init__(
        self,
        pixels_shape: tuple[int, ...],
        tokens_shape: tuple[int, ...],
        device: torch.device,
        compute: torch.cuda.Stream,
    ) -> None:
        super().__init__(pixels_shape, tokens_shape, pinned=True)
        self._on_device = torch.zeros(pixels_shape, dtype=torch.uint8, device=device)
        self._copy, self._compute = torch.cuda.Stream(device), compute  # type: ignore[no-untyped-call]
        self._copy.wait_stream(torch.cuda.current_stream(device))  # the zeros above
        self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # others spin, and decoders want the CPU

    def launch(self, encode: Encode) -> None:
        with torch.cuda.stream(self._copy):
            self._on_device.copy_(self._pixels, non_blocking=True)
        self._compute.wait_stream(self._copy)
        with torch.cuda.stream(self._compute):
            self._tokens.copy_(encode(self._on_device), non_blocking=True)
            self._done.record()

    def tokens(self) -> NDArray[np.int32]:
        self._done.synchronize()
        return super().tokens()


class Lanes:
    """Who comes while all are taken waits; first come, first served."""

    def __init__(self, pixels_shape: tuple[int, ...], tokens_shape: tuple[int, ...], device: torch.device) -> None:
        self._free: queue.SimpleQueue[Lane] = queue.SimpleQueue()
        self._compute: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._compute = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._compute.wait_stream(torch.cuda.current_stream(device))  # the weights' way to the device
            for _ in range(LANES_ON_CUDA):
                self._free.put(CudaLane(pixels_shape, tokens_shape, device, self._compute))
        else:
            self._free.put(Lane(pixels_shape, tokens_shape))

    def in_turn(self) -> AbstractContextManager[object]:
        """To compute, inside `exact`, with buffers that the lanes' batches use too: on CUDA after these, on their
        stream; on the CPU `exact` is enough."""
        return nullcontext() if self._compute is None else torch.cuda.stream(self._compute)

    @contextmanager
    def lane(self) -> Iterator[Lane]:
        lane = self._free.get()
        try:
            yield lane
        finally:
            self._free.put(lane)
