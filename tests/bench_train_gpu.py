"""The training step on a GPU, from torch and model/ only (no Ray): prints JSON.

    python tests/bench_train_gpu.py                          # OpenAI's size at 256 px; some minutes on one GPU
    python tests/bench_train_gpu.py --device cpu --small     # the same code, in seconds, for figures that mean nothing

At OpenAI's size and 256 px in bf16, with the fused bottleneck and with the plain one, as it is, with activations
computed again, and compiled: the largest batch that fits, images a second there, and the share that its FLOPs are of
the FLOP/s of a large bf16 matrix product measured here. A step counts as three forward passes (activations that are
computed again are not counted as work), so the share is of useful FLOPs.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from bench_gpu import Bench, matmul_peak
from bench_train import our_flops
from model.autoencoder import Relaxed
from model.config import LossConfig, ModelError, OptimConfig, ScheduleConfig
from model.dvae import DVAE
from model.trainer import Trainer
from plain_bottleneck import plain_latent

FORWARD_PASSES = 3  # a step's worth of FLOPs: backward is twice forward
WAYS: dict[str, dict[str, bool]] = {
    "as_it_is": {},
    "checkpoint_activations": {"checkpoint_activations": True},
    "compile": {"compile": True},
}


class PlainBottleneck(DVAE):
    """With all (N, K) tensors whole, as before the fused bottleneck came."""

    def forward(self, x_BCHW: Tensor, noise_keys_B2: Tensor, temperature: float) -> Relaxed:
        grid_BHW, z_NC = self.grid_of(x_BCHW), self.encode(x_BCHW)
        with torch.autocast(x_BCHW.device.type, enabled=False):
            latent_ND, codes = plain_latent(z_NC, self.tables(), noise_keys_B2, temperature)
        return Relaxed(self.decode(latent_ND, grid_BHW), codes)


class Steps:
    """One trainer at one batch size."""

    def __init__(self, bench: Bench, *, fused: bool, batch_size: int, **options: bool) -> None:
        configs = (bench.config, LossConfig(), OptimConfig(), ScheduleConfig())
        given: dict[str, Any] = {"seed": 0, "device": bench.device, "precision": "bf16", **options}
        if fused:
            self._trainer = Trainer(*configs, **given)
        else:
            with patch("model.trainer.build", PlainBottleneck):
                self._trainer = Trainer(*configs, **given)
        self._pixels_BHWC, self._slots_B = bench.pixels(batch_size), np.arange(batch_size)

    def one(self) -> None:
        self._trainer.train_step(self._pixels_BHWC, self._slots_B)


def fits(bench: Bench, batch_size: int, **options: bool) -> bool:
    try:
        steps = Steps(bench, batch_size=batch_size, **options)  # type: ignore[arg-type]
        bench.seconds(steps.one, 2)  # the second one has the optimiser's state beside it
    except torch.OutOfMemoryError:
        return False
    finally:
        steps = None  # type: ignore[assignment]
        free(bench)
    return True


def free(bench: Bench) -> None:
    torch._dynamo.reset()  # what is compiled holds the model
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def largest_batch(fits: Callable[[int], bool], most: int) -> int:
    """Of those that fit, to an eighth; 0 if none does. `most` is not exceeded."""
    good = 0
    trial = 1
    while trial <= most and fits(trial):
        good, trial = trial, 2 * trial
    bad = min(trial, most + 1)
    while good and bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def rows(bench: Bench, peak_tflops: float, flops: int, most: int, ways: Sequence[str]) -> Iterator[dict[str, Any]]:
    for way in ways:
        for fused in (True, False):
            options = {"fused": fused, **WAYS[way]}
            row: dict[str, Any] = {"way": way, "bottleneck": "fused" if fused else "plain"}
            try:
                batch_size = largest_batch(lambda size, options=options: fits(bench, size, **options), most)
                yield {**row, **rate(bench, peak_tflops, flops, batch_size, options)}
            except (ModelError, torch.OutOfMemoryError) as error:
                yield {**row, "problem": str(error).partition("\n")[0]}


def rate(bench: Bench, peak_tflops: float, flops: int, batch_size: int, options: dict[str, bool]) -> dict[str, Any]:
    """`batch_size` 0: not even one image fits."""
    if not batch_size:
        return {"largest_batch": 0}
    steps = Steps(bench, batch_size=batch_size, **options)  # type: ignore[arg-type]
    times = 1 if bench.small else 5
    bench.seconds(steps.one, 2)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    images_per_s = batch_size / statistics.median(bench.seconds(steps.one, times) for _ in range(bench.rounds))
    tflops = FORWARD_PASSES * flops * images_per_s / 1e12
    peak_bytes = torch.cuda.max_memory_allocated(bench.device) if bench.device.type == "cuda" else 0
    steps = None  # type: ignore[assignment]
    free(bench)
    return {
        "largest_batch": batch_size, "images_per_s": round(images_per_s, 2), "tflops": round(tflops, 3),
        "share_of_bf16_peak": round(tflops / peak_tflops, 3), "gb_an_image": round(peak_bytes / batch_size / 1e9, 3),
    }  # fmt: skip


def measure(bench: Bench, most: int, ways: Sequence[str]) -> dict[str, Any]:
    peaks = matmul_peak(bench)
    peak = max([tflops for name, tflops in peaks.items() if name.startswith("bf16")] + [0.001])  # of a small product
    flops = our_flops(bench.config, bench.size)
    return {
        "device": torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "cpu",
        "torch": torch.__version__, "size": bench.size, "model": bench.config.to_json(),
        "gflop_forward": round(flops / 1e9, 3), "matmul_tflops": peaks,
        "rows": list(rows(bench, peak, flops, most, ways)),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--small", action="store_true", help="a tiny model and few images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most", type=int, default=512, help="the largest batch to try")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    chosen = parser.parse_args(arguments)
    if chosen.device != "cpu" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu --small runs the code, for figures that mean nothing")
    bench = Bench(torch.device(chosen.device), small=chosen.small, rounds=chosen.rounds)
    json.dump(measure(bench, chosen.most, chosen.ways), sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
