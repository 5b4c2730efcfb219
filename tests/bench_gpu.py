"""The encoder's marks on a GPU, from torch, pipeline/ and model/ only (no Ray): prints JSON.

    python tests/bench_gpu.py                          # OpenAI's size at 256 px; minutes on one GPU
    python tests/bench_gpu.py --device cpu --small     # the same code, in seconds, for figures that mean nothing

Marks: in bf16 at least 0.55 of the FLOP/s of a large bf16 matrix product measured here; at least 2.5 times the
published class code (`pip install --no-deps dall-e==0.1 attrs requests`) as published, on the same device; end to end
(read, decode on threads, encode, write) at least 0.95 of the encoder alone. What is compared is interleaved.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from make_data import image_bytes, tar_bytes
from model import losses, quantizer
from model.checkpoint import Checkpoint, tokenizer_id
from model.code_search import CodeSearch
from model.config import DVAEConfig, ModelError
from model.dvae import DVAE, seeded_dvae
from model.inference import DTYPES
from model.lanes import exact
from model.tokenizer import DVAETokenizer
from pipeline.images import ImageSpec
from pipeline.output import OutputPrefix
from pipeline.plan import ShardTask, part_name
from pipeline.shard_patterns import expand
from pipeline.token_table import TableSpec
from pipeline.tokenize_shard import TokenizeJob, TokenizeWorker

CALLERS = 2  # threads that encode: one batch is copied while another is computed
SHARDS_IN_FLIGHT = 4
SMALL = DVAEConfig(codebook_size=512, width=64, blocks_per_group=1, decoder_init=16)  # the least that dall_e can be


class Bench:
    """One device, one model, one image size."""

    def __init__(self, device: torch.device, *, small: bool, rounds: int) -> None:
        self.device, self.small, self.rounds = device, small, rounds
        self.config, self.size = (SMALL, 32) if small else (DVAEConfig(), 256)
        weights = dict(seeded_dvae(self.config, 0).state_dict())
        spec = ImageSpec(size=self.size, small="upscale").to_json()
        self.checkpoint = Checkpoint(weights, self.config, spec, 0, tokenizer_id(weights, self.config, spec))
        self.flops = flops_per_image(self.config, self.size)

    def tokenizer(self, precision: str, batch_size: int, *, compile: bool = False) -> DVAETokenizer:
        name, options = str(self.device), {"precision": precision, "batch_size": batch_size, "compile": compile}
        return DVAETokenizer(self.checkpoint, device=name, **options)  # type: ignore[arg-type]

    def pixels(self, num_images: int) -> np.ndarray:
        return np.random.default_rng(0).integers(0, 256, (num_images, self.size, self.size, 3), dtype=np.uint8)

    def seconds(self, work: Callable[[], object], times: int = 1) -> float:
        """By the clock, with nothing left on the device."""
        self._finish()
        started = time.perf_counter()
        for _ in range(times):
            work()
        self._finish()
        return (time.perf_counter() - started) / times

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def flops_per_image(config: DVAEConfig, size: int) -> int:
    """Of the encoder with its conv head; 272.3 G for OpenAI's size at 256 px."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = DVAE(config)
        quantizer.logits(model.latents(torch.empty(1, 3, size, size)), model.tables())
    return int(counter.get_total_flops())


def matmul_peak(bench: Bench) -> dict[str, float]:
    """TFLOP/s of square products, by type and side; the best of the rounds."""
    peak: dict[str, float] = {}
    for side in (256,) if bench.small else (4096, 8192, 16384):
        for name in ("bf16", "fp16") if bench.device.type == "cuda" else ("bf16",):
            a = torch.randn(side, side, device=bench.device, dtype=DTYPES[name])
            b, out = torch.randn_like(a), torch.empty_like(a)

            def product(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
                torch.mm(a, b, out=out)

            bench.seconds(product, 3)
            best_s = min(bench.seconds(product, 10) for _ in range(bench.rounds))
            peak[f"{name} {side}"] = round(2 * side**3 / best_s / 1e12, 3)
    return peak


def encoder_rate(bench: Bench, tokenizer: DVAETokenizer, batch_size: int, callers: int) -> float:
    """Images a second of whole calls, from pixels in memory to tokens in memory."""
    pixels_BHWC = bench.pixels(batch_size)
    num_calls = 2 * callers if bench.small else max(4 * callers, 2048 // batch_size)
    with ThreadPoolExecutor(callers) as executor:

        def calls() -> None:
            list(executor.map(lambda _: tokenizer.encode(pixels_BHWC), range(num_calls)))

        calls()
        return num_calls * batch_size / statistics.median(bench.seconds(calls) for _ in range(bench.rounds))


def sweep(bench: Bench, peak_tflops: float, batches: Sequence[int], *, compile: bool) -> Iterator[dict[str, Any]]:
    precisions = ("fp32", "bf16", "fp16") if bench.device.type == "cuda" else ("fp32", "bf16")
    for precision in precisions:
        for compiled in (False, True) if compile else (False,):
            for batch_size in batches:
                row = {"precision": precision, "compiled": compiled, "batch_size": batch_size}
                try:
                    tokenizer = bench.tokenizer(precision, batch_size, compile=compiled)
                except (ModelError, torch.OutOfMemoryError) as error:
                    yield {**row, "problem": str(error)}
                    continue
                rates = {callers: encoder_rate(bench, tokenizer, batch_size, callers) for callers in (1, CALLERS)}
                tflops = rates[CALLERS] * bench.flops / 1e12
                yield {
                    **row, "images_per_s": round(rates[CALLERS], 1), "images_per_s_one_caller": round(rates[1], 1),
                    "tflops": round(tflops, 2), "share_of_bf16_peak": round(tflops / peak_tflops, 3),
                }  # fmt: skip


def where_time_goes(bench: Bench, precision: str, batch_size: int) -> dict[str, float]:
    """Milliseconds a batch: the convolutions as they are, and with cuDNN free to choose by trying; the search for the
    best code as it is, and in plain fp32; and how long it takes to hand the convolutions to the device."""
    tokenizer = bench.tokenizer(precision, batch_size)
    pixels_bHWC = torch.from_numpy(bench.pixels(batch_size)).to(bench.device)
    tried = torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=False)
    found: dict[str, float] = {}

    def note(name: str, work: Callable[[], object]) -> None:
        bench.seconds(work, 2)
        found[name] = round(1e3 * min(bench.seconds(work, 3) for _ in range(bench.rounds)), 3)

    with exact(1):
        z_NC = tokenizer._latents(pixels_bHWC)
        plain = CodeSearch(tokenizer._model.tables(), len(z_NC))
        note("convolutions", lambda: tokenizer._latents(pixels_bHWC))
        note("search", lambda: tokenizer._search(z_NC))
        note("search_in_plain_fp32", lambda: plain(z_NC))
        bench.seconds(lambda: None)
        started = time.perf_counter()
        tokenizer._latents(pixels_bHWC)
        found["handing_over"] = round(1e3 * (time.perf_counter() - started), 3)
        with tried:
            note("convolutions_chosen_by_trying", lambda: tokenizer._latents(pixels_bHWC))
    return found


def against_published(bench: Bench, precision: str, batch_size: int) -> dict[str, Any]:
    """The published encoder takes fp32 pixels that are on the device already, as its example does; ours takes uint8
    from memory and gives tokens in memory. Channels-first as there."""
    try:
        from dall_e.encoder import Encoder
    except ImportError as error:
        return {"problem": f"{error}: pip install --no-deps dall-e==0.1 attrs requests"}
    theirs = Encoder(
        n_hid=bench.config.width, n_blk_per_group=bench.config.blocks_per_group, vocab_size=bench.config.codebook_size,
        device=bench.device,
    )  # fmt: skip
    weights = {name.removeprefix("encoder."): w for name, w in bench.checkpoint.weights.items() if "encoder." in name}
    theirs.load_state_dict(weights)
    pixels_BHWC, ours = bench.pixels(batch_size), bench.tokenizer(precision, batch_size)
    x_BCHW = losses.map_pixels(torch.from_numpy(pixels_BHWC).to(bench.device)).contiguous()

    @torch.no_grad()
    def published() -> np.ndarray:
        return theirs(x_BCHW).argmax(dim=1).cpu().numpy()

    agreement = float((published() == ours.encode(pixels_BHWC)).mean())
    rates: dict[str, list[float]] = {"published": [], "ours": []}
    for _ in range(bench.rounds):
        rates["published"].append(batch_size / bench.seconds(published, 1 if bench.small else 5))
        rates["ours"].append(encoder_rate(bench, ours, batch_size, CALLERS))
    ratios = [a / b for a, b in zip(rates["ours"], rates["published"], strict=True)]
    return {
        "batch_size": batch_size, "precision": precision, "agreement": round(agreement, 5),
        "images_per_s": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "ratio": round(statistics.median(ratios), 3), "least": round(min(ratios), 3), "most": round(max(ratios), 3),
    }  # fmt: skip


def end_to_end(bench: Bench, folder: Path, precision: str, batch_size: int, threads: int) -> dict[str, Any]:
    """Shards of JPEGs from disk to parts on disk, against the encoder alone; interleaved."""
    num_shards, per_shard = (2, 2 * batch_size) if bench.small else (16, 8 * batch_size)
    sides = np.random.default_rng(0).integers(320, 513, (64, 2)).tolist()
    pictures = [image_bytes(n, width=width, height=height) for n, (width, height) in enumerate(sides)]
    for number in range(num_shards):
        members = [(f"{number}-{n}.jpg", pictures[n % 64]) for n in range(per_shard)]
        (folder / f"bench-{number:04d}.tar").write_bytes(tar_bytes(members))
    tokenizer = bench.tokenizer(precision, batch_size)
    table = TableSpec(tokenizer.tokenizer_id, tokenizer.grid, tokenizer.codebook_size, tokenizer.image_spec)
    worker = TokenizeWorker(tokenizer, TokenizeJob(OutputPrefix(str(folder / "out")), table, batch_size, threads))
    tasks = [ShardTask(shard, part_name(shard.url)) for shard in expand([str(folder)])]

    def run() -> int:
        with ThreadPoolExecutor(SHARDS_IN_FLIGHT) as executor:
            return sum(result.num_rows for result in executor.map(worker.tokenize, tasks))

    run()  # warm: kernels are chosen, files are in the page cache
    alone, whole = [], []
    for _ in range(bench.rounds):
        alone.append(encoder_rate(bench, tokenizer, batch_size, CALLERS))
        whole.append(num_shards * per_shard / bench.seconds(run))
    worker.close()
    shares = [w / a for w, a in zip(whole, alone, strict=True)]
    return {
        "images": num_shards * per_shard, "decode_threads": threads, "precision": precision, "batch_size": batch_size,
        "encoder_alone": round(statistics.median(alone), 1), "end_to_end": round(statistics.median(whole), 1),
        "share": round(statistics.median(shares), 3), "least": round(min(shares), 3), "most": round(max(shares), 3),
    }  # fmt: skip


def measure(bench: Bench, batches: Sequence[int], precision: str, threads: int, *, compile: bool) -> dict[str, Any]:
    peaks = matmul_peak(bench)
    peak = max(tflops for name, tflops in peaks.items() if name.startswith("bf16"))
    rows = list(sweep(bench, peak, batches, compile=compile))
    middle = batches[len(batches) // 2]
    with tempfile.TemporaryDirectory() as folder:
        whole = end_to_end(bench, Path(folder), precision, middle, threads)
    published = against_published(bench, precision, middle)
    shares = [row["share_of_bf16_peak"] for row in rows if row["precision"] == "bf16" and "problem" not in row]
    return {
        "device": torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "cpu",
        "torch": torch.__version__, "size": bench.size, "gflop_per_image": round(bench.flops / 1e9, 3),
        "matmul_tflops": peaks, "encoder": rows, "ms_per_batch": where_time_goes(bench, precision, middle),
        "against_published": published, "end_to_end": whole,
        "marks": {
            "bf16_share_of_peak": {"found": max(shares, default=None), "at_least": 0.55},
            "times_published": {"found": published.get("ratio"), "at_least": 2.5},
            "end_to_end_share": {"found": whole["share"], "at_least": 0.95},
        },
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--small", action="store_true", help="a tiny model and few images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", help="batch sizes; the middle one is compared")
    parser.add_argument("--precision", choices=list(DTYPES), default="bf16", help="of what is compared")
    parser.add_argument("--no-compile", action="store_true")
    chosen = parser.parse_args(arguments)
    if chosen.device != "cpu" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu --small runs the code, for figures that mean nothing")
    bench = Bench(torch.device(chosen.device), small=chosen.small, rounds=chosen.rounds)
    batches = chosen.batches or ([4] if chosen.small else [32, 64, 128])
    threads = len(os.sched_getaffinity(0))
    report = measure(bench, batches, chosen.precision, threads, compile=not chosen.no_compile)
    json.dump(report, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
