"""Our training step beside that of DALLE-pytorch's DiscreteVAE, on the CPU: time and peak memory, as JSON.

    pip install --no-deps --target PEER dalle-pytorch==1.6.6 einops
    python tests/bench_train.py --dalle-pytorch PEER               # minutes; bench_train_gpu.py is for a GPU

Marks, at 8,192 codes on a 32×32 grid: at least 1.5 times as fast, at most half of the peak memory. What "the same
widths" are is a choice, so there are several rows of ours:

    same_layers   its own convolutions, weight for weight, in our training step: bottleneck, loss, optimiser, moving
                  average and memory layout are ours. Only what surrounds the layers differs.
    plain         same_layers with the bottleneck as a textbook has it (plain_bottleneck.py): the rest of the gain.
    same_flops    DALL·E's blocks behind a strided stem, of the width that costs as many FLOPs as its layers do, with
                  code vectors as wide as its. What a user has who goes from one project to the other. Also in bf16.

Each lives in a process of its own; steps are taken in turn, so that whatever else the machine does meets all alike.
Memory is VmHWM, less what the process had before the model was made (and with it, as `whole_process`).
"""
# B batch, H W rows and columns, C D channels of keys and codes, K codes

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import peer_dalle_pytorch as peer
from make_data import peak_bytes
from model.autoencoder import Relaxed
from model.config import (
    ArchitectureConfig,
    DiscreteVAEConfig,
    DVAEConfig,
    LossConfig,
    OptimConfig,
    Ramp,
    ScheduleConfig,
)
from model.discrete_vae import DiscreteVAE
from model.dvae import DVAE
from model.trainer import Trainer
from plain_bottleneck import plain_latent

MARKS = {"times_as_fast": 1.5, "share_of_memory": 0.5}


@dataclass(frozen=True)
class Setting:
    """One comparison: what all rows share."""

    size: int
    batch: int
    codes: int
    hidden: int
    code_dim: int
    threads: int
    dalle_pytorch: str | None  # its folder

    @property
    def num_positions(self) -> int:
        return (self.size // 8) ** 2

    def theirs(self) -> Any:
        kind = peer.discrete_vae(self.dalle_pytorch)
        model = {**peer.MODEL, "num_tokens": self.codes, "hidden_dim": self.hidden, "codebook_dim": self.code_dim}
        return kind(image_size=self.size, **model)

    def pixels(self) -> np.ndarray:
        return np.random.default_rng(0).integers(0, 256, (self.batch, self.size, self.size, 3), dtype=np.uint8)


class PeerLayers(DiscreteVAE):
    """DALLE-pytorch's own modules on both sides of our bottleneck."""

    def __init__(self, vae: Any) -> None:
        nn.Module.__init__(self)
        self.config = DiscreteVAEConfig(codebook_size=vae.num_tokens)
        self.encoder, self.codebook, self.decoder = vae.encoder, vae.codebook, vae.decoder

    def reset_parameters(self, seed: int) -> None:
        """They are as their class makes them."""


class PlainPeerLayers(PeerLayers):
    """The same with all (N, K) tensors whole, as before the fused bottleneck came."""

    def forward(self, x_BCHW: Tensor, noise_keys_B2: Tensor, temperature: float) -> Relaxed:
        latent_ND, codes = plain_latent(self.encode(x_BCHW), self.tables(), noise_keys_B2, temperature)
        return Relaxed(self.decode(latent_ND, self.grid_of(x_BCHW)), codes)


def our_trainer(config: ArchitectureConfig, precision: Any = "fp32", **options: Any) -> Trainer:
    """Its loss (L2, a KL that is computed and weighs nothing) and learning rate; AdamW and a moving average as ours."""
    schedules = ScheduleConfig(kl_weight=Ramp(0.0, 0.0, 1))
    given: dict[str, Any] = {"seed": 0, "device": torch.device("cpu"), "precision": precision, **options}
    return Trainer(config, LossConfig("l2"), OptimConfig(lr=1e-3), schedules, **given)


def our_step(trainer: Trainer, pixels_BHWC: np.ndarray) -> Callable[[], object]:
    slots_B = np.arange(len(pixels_BHWC))
    return lambda: trainer.train_step(pixels_BHWC, slots_B)


@dataclass(frozen=True)
class Row:
    """One side of the comparison, ready to take steps."""

    step: Callable[[], object]
    num_parameters: int
    flops: int  # of one image, forward


def theirs(setting: Setting) -> Row:
    vae, images_BCHW = setting.theirs(), peer.as_images(setting.pixels())
    trainer = peer.PeerTrainer(vae, peer.TRAINER)
    return Row(lambda: trainer.train_step(images_BCHW, 1), num_parameters(vae), peer_flops(setting))


def same_layers(setting: Setting, kind: type[PeerLayers] = PeerLayers) -> Row:
    model = kind(setting.theirs()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with patch("model.trainer.build", lambda _: model):
        trainer = our_trainer(model.config)
    return Row(our_step(trainer, setting.pixels()), num_parameters(model), peer_flops(setting))


def same_flops(setting: Setting, precision: str = "fp32", **options: Any) -> Row:
    config = equal_flops(setting)
    trainer = our_trainer(config, precision, **options)
    return Row(our_step(trainer, setting.pixels()), num_parameters(trainer.model), our_flops(config, setting.size))


ROWS: dict[str, Callable[[Setting], Row]] = {
    "theirs": theirs,
    "plain": lambda setting: same_layers(setting, PlainPeerLayers),
    "same_layers": same_layers,
    "same_flops": same_flops,
    "same_flops_bf16": lambda setting: same_flops(setting, "bf16"),
}


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def peer_flops(setting: Setting) -> int:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        setting.theirs()(torch.empty(1, 3, setting.size, setting.size), return_loss=True, temp=1.0)
    return int(counter.get_total_flops())


def our_flops(config: DVAEConfig, size: int) -> int:
    """Both convolutional halves, and the two products with the codes."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = DVAE(config)
        z_NC = model.latents(torch.empty(1, 3, size, size))
        tables = model.tables()
        model.decode(torch.empty(len(z_NC), tables.codes_KD.shape[1]), (1, *config.grid(size)))
    products = 2 * len(z_NC) * config.codebook_size * (z_NC.shape[1] + tables.codes_KD.shape[1])
    return int(counter.get_total_flops()) + products


def equal_flops(setting: Setting) -> DVAEConfig:
    """Of our architectures with a strided stem, the one whose forward pass costs most nearly what its does."""
    made = (
        DVAEConfig(codebook_size=setting.codes, width=width, decoder_init=setting.code_dim, stem="strided")
        for width in range(16, 1025, 16)
    )
    wanted = peer_flops(setting)
    return min(made, key=lambda config: abs(our_flops(config, setting.size) - wanted))


class Process:
    """A child that takes one step for each line it is sent."""

    def __init__(self, name: str, arguments: Sequence[str]) -> None:
        command = [sys.executable, __file__, *arguments, "--child", name]
        self._name = name
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._answer()

    def step(self) -> dict[str, float]:
        assert self._child.stdin is not None
        self._child.stdin.write("\n")
        self._child.stdin.flush()
        answer = self._answer()
        sys.stderr.write(f"{self._name}: {answer['seconds']:.2f} s, peak {answer['peak_bytes'] / 1e6:.0f} MB\n")
        return answer

    def end(self) -> None:
        self._child.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"a child ended with {self._child.wait()}; its message is above")
        return dict(json.loads(line))


def be_child(name: str, setting: Setting) -> None:
    torch.set_num_threads(setting.threads)
    before_bytes = peak_bytes()
    row = ROWS[name](setting)
    say({"parameters": row.num_parameters, "gflop_forward": round(row.flops / 1e9, 2), "before_bytes": before_bytes})
    for _ in sys.stdin:
        started, cpu_s = time.perf_counter(), time.process_time()
        row.step()
        seconds = time.perf_counter() - started
        say({"seconds": seconds, "cpu_s": time.process_time() - cpu_s, "peak_bytes": peak_bytes()})


def say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def compare(names: Sequence[str], rounds: int, arguments: Sequence[str]) -> dict[str, Any]:
    children: dict[str, Process] = {}
    try:
        for name in names:
            children[name] = Process(name, arguments)
        for child in children.values():
            child.step()  # the first one makes the optimiser's state and chooses kernels
        taken = [{name: child.step() for name, child in children.items()} for _ in range(rounds)]
        return {name: figures(name, child.about, taken) for name, child in children.items()}
    finally:
        for child in children.values():
            child.end()


def figures(name: str, about: dict[str, Any], taken: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Medians over the rounds; ratios are of steps of the same round, with the least and the most."""
    mine, first = [each[name] for each in taken], [next(iter(each.values())) for each in taken]
    faster = [theirs["seconds"] / ours["seconds"] for ours, theirs in zip(mine, first, strict=True)]
    peak, peak_first = mine[-1]["peak_bytes"], first[-1]["peak_bytes"]
    return {
        **about,
        "step_s": round(statistics.median(each["seconds"] for each in mine), 3),
        "cpu_s": round(statistics.median(each["cpu_s"] for each in mine), 3),
        "times_as_fast": [round(each, 2) for each in (statistics.median(faster), min(faster), max(faster))],
        "training_mb": round((peak - about["before_bytes"]) / 1e6),
        "share_of_memory": round((peak - about["before_bytes"]) / (peak_first - about["before_bytes"]), 3),
        "whole_process_mb": round(peak / 1e6),
        "share_of_memory_whole_process": round(peak / peak_first, 3),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dalle-pytorch", metavar="PEER", help=peer.HOW_TO_GET_IT)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="theirs comes first")
    for name, value in {"size": 256, "batch": 8, "codes": 8192, "hidden": 256, "code-dim": 512, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--child", choices=list(ROWS), help=argparse.SUPPRESS)
    chosen = parser.parse_args(given)
    try:
        peer.discrete_vae(chosen.dalle_pytorch)
    except ImportError as error:
        parser.error(str(error))
    names = [field.name for field in dataclasses.fields(Setting)]
    setting = Setting(**{name: getattr(chosen, name) for name in names})
    if chosen.child:
        return be_child(chosen.child, setting)
    rows = ["theirs", *(name for name in chosen.rows if name != "theirs")]
    found = compare(rows, chosen.rounds, given)
    report = {"setting": dataclasses.asdict(setting), "torch": torch.__version__, "rows": found, "marks": MARKS}
    json.dump(report, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
