"""The fused bottleneck beside the plain one: time and peak memory of forward and backward. Prints a table.

    python tests/bench_bottleneck.py [--rounds 5] [--threads 1,2] [--sizes inner,conv] [--device cuda] [--json]

Both forms take turns in one process; the ratio is the median of the ratios of each round (fewest and most in
brackets), so that a machine that slows down slows both. CPU seconds are beside the clock's, for a machine with other
work. Memory is the peak above the inputs, gradients included: on a CPU what a process of its own held at most, on CUDA
torch's own count. Marks: at 8,192 positions and codes not slower, and at most an eighth of the memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import quantizer
from model.bottleneck import CodeFigures, relaxed_latent
from model.quantizer import CodeTables, GumbelNoise
from plain_bottleneck import plain_latent

# B batch, N positions, K codes, C channels of the keys, D channels of the codes

TEMPERATURE = 0.5


@dataclass(frozen=True)
class Size:
    samples: int
    positions: int  # of each sample
    codes: int
    key_channels: int
    code_channels: int
    one_table: bool


SIZES = {
    "tiny": Size(2, 16, 64, 8, 8, True),
    "small": Size(32, 64, 1024, 128, 128, True),
    "inner": Size(8, 1024, 8192, 128, 128, True),
    "conv": Size(8, 1024, 8192, 2048, 128, False),  # OpenAI's head: logits are kept
    "wide": Size(2, 1024, 65536, 64, 64, True),
}
DEFAULT_SIZES = ("small", "inner", "conv", "wide")
Work = Callable[[], object]


def inputs(size: Size, device: torch.device) -> tuple[Tensor, CodeTables, Tensor]:
    """As at the start of training: logits with a variance of about 1."""
    g = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device)

    z_NC = drawn(size.samples * size.positions, size.key_channels).requires_grad_()
    keys_KC = (drawn(size.codes, size.key_channels) * size.key_channels**-0.5).requires_grad_()
    tables = CodeTables(keys_KC, None, keys_KC, None)
    if not size.one_table:
        codes_DK = drawn(size.code_channels, size.codes).requires_grad_()
        biases = (torch.zeros(each, device=device, requires_grad=True) for each in (size.codes, size.code_channels))
        tables = CodeTables(keys_KC, next(biases), codes_DK.T, next(biases))
    return z_NC, tables, quantizer.noise_keys(0, 0, np.arange(size.samples)).to(device)


def fused_latent(z_NC: Tensor, tables: CodeTables, keys_B2: Tensor, temperature: float) -> tuple[Tensor, CodeFigures]:
    noise = GumbelNoise(keys_B2, len(z_NC) // len(keys_B2), len(tables.keys_KC))
    return relaxed_latent(z_NC, tables, noise, temperature)


FORMS = {"fused": fused_latent, "plain": plain_latent}


def step(form: str, given: tuple[Tensor, CodeTables, Tensor]) -> Work:
    """Forward and backward with the latent and the KL in the loss, as the paper's recipe has them."""
    z_NC, tables, keys_B2 = given
    leaves = [each for each in dict.fromkeys((z_NC, *tables)) if each is not None]
    slope_ND = torch.full((len(z_NC), tables.codes_KD.shape[1]), 1e-3, device=z_NC.device)

    def run() -> object:
        latent_ND, codes = FORMS[form](z_NC, tables, keys_B2, TEMPERATURE)
        return torch.autograd.grad((latent_ND, codes.kl_N.mean()), leaves, (slope_ND, torch.ones_like(codes.kl_N[0])))

    return run


def seconds(work: Work, device: torch.device) -> tuple[float, float]:
    """By the clock, and of the CPU."""
    _finish(device)
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    _finish(device)
    return time.perf_counter() - clock, time.process_time() - cpu


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times(size: Size, device: torch.device, rounds: int) -> dict[str, Any]:
    given = inputs(size, device)
    works = {form: step(form, given) for form in FORMS}
    found: dict[str, list[tuple[float, float]]] = {form: [] for form in FORMS}
    for form in FORMS:
        works[form]()  # warm
    for number in range(rounds):
        for form in sorted(FORMS, reverse=number % 2 == 1):
            found[form].append(seconds(works[form], device))
    pairs = list(zip(found["plain"], found["fused"], strict=True))
    return {
        **{f"{form}_s": _middle([clock for clock, _ in found[form]]) for form in FORMS},
        "times_faster": _middle([plain[0] / fused[0] for plain, fused in pairs]),
        "times_less_cpu": _middle([plain[1] / max(fused[1], 1e-9) for plain, fused in pairs]),
    }


def _middle(values: list[float]) -> list[float]:
    """Median, fewest, most."""
    return [round(each, 4) for each in (statistics.median(values), min(values), max(values))]


def peak_bytes(form: str, size: Size, device: torch.device) -> int:
    """Above the inputs, in this process, which does nothing else."""
    step(form, inputs(SIZES["tiny"], device))()  # libraries are loaded, threads are there
    work = step(form, inputs(size, device))
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    before = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def peak_of_a_child(form: str, name: str, device: torch.device) -> int:
    command = [sys.executable, __file__, "--peak-of", form, "--sizes", name, "--device", str(device)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(names: Sequence[str], device: torch.device, threads: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        peaks = {form: peak_of_a_child(form, name, device) for form in FORMS}
        for count in threads:
            torch.set_num_threads(count)
            row = {"size": name, **asdict(SIZES[name]), "threads": count, **times(SIZES[name], device, rounds)}
            shares = {"memory_share": round(peaks["fused"] / peaks["plain"], 4) if peaks["plain"] else None}
            rows.append({**row, **{f"{form}_peak_bytes": peak for form, peak in peaks.items()}, **shares})
    return rows


def as_text(rows: list[dict[str, Any]]) -> str:
    head = f"{'size':8}{'N x K':>16}{'C, D':>12}{'threads':>9}{'fused s':>9}{'plain s':>9}  times faster (less CPU)"
    lines = [head + "        fused MB  plain MB  share"]
    for row in rows:
        (ratio, least, most), cpu = row["times_faster"], row["times_less_cpu"][0]
        shape = f"{row['samples'] * row['positions']} x {row['codes']}"
        fused_mb, plain_mb = (row[f"{form}_peak_bytes"] / 1e6 for form in ("fused", "plain"))
        lines.append(
            f"{row['size']:8}{shape:>16}{row['key_channels']:>7}, {row['code_channels']:<3}{row['threads']:>9}"
            f"{row['fused_s'][0]:>9.3f}{row['plain_s'][0]:>9.3f}  {ratio:.2f} [{least:.2f}, {most:.2f}] ({cpu:.2f})"
            f"{fused_mb:>14.0f}{plain_mb:>10.0f}  {row['memory_share']}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--sizes", default=",".join(DEFAULT_SIZES), help=f"of {', '.join(SIZES)}")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--json", action="store_true", help="instead of the table")
    parser.add_argument("--peak-of", choices=list(FORMS), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    device, names = torch.device(chosen.device), chosen.sizes.split(",")
    if chosen.peak_of:
        sys.stdout.write(f"{peak_bytes(chosen.peak_of, SIZES[names[0]], device)}\n")
        return
    rows = measure(names, device, [int(count) for count in chosen.threads.split(",")], chosen.rounds)
    sys.stdout.write(json.dumps(rows, indent=2) if chosen.json else as_text(rows))
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
