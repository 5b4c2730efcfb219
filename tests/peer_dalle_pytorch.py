"""DALLE-pytorch's DiscreteVAE, made and trained as its own train_vae.py does: something to compare with.

    pip install --no-deps --target PEER dalle-pytorch==1.6.6 einops
    python tests/peer_dalle_pytorch.py --dalle-pytorch PEER --train 'photos/*-00000[0-6].tar' --val photos/last.tar

prints JSON: what it has learnt after so many minutes, measured on the held-out images. Nothing of the project needs it.
The shards are read, decoded and shuffled by our reader, so both sides pay the same for their pixels; the model, its
loss, Adam, temperature and learning rate are theirs, with their defaults.
"""
# B images, C channels, H W rows and columns of pixels, K codes

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import sys
import time
import types
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.metrics import psnr
from pipeline.held_out import held_out_images
from pipeline.images import ImageSpec
from pipeline.shard_patterns import expand
from pipeline.training_order import StreamOptions
from pipeline.training_samples import TrainingSamples

HOW_TO_GET_IT = "pip install --no-deps --target PEER dalle-pytorch==1.6.6 einops, then --dalle-pytorch PEER"
NAME = "dalle_pytorch"
# What its module imports for DALL·E's transformer and other tokenisers; DiscreteVAE uses none of it.
NOT_NEEDED = ("axial_positional_embedding", f"{NAME}.distributed_utils", f"{NAME}.vae", f"{NAME}.transformer")
# train_vae.py's arguments
TRAINER = {"batch_size": 8, "lr": 1e-3, "lr_decay": 0.98, "first_temp": 1.0, "temp_min": 0.5, "anneal_rate": 1e-6}
MODEL = {"num_layers": 3, "num_tokens": 8192, "codebook_dim": 512, "hidden_dim": 256, "num_resnet_blocks": 2}
EVERY = 100  # steps between its changes of temperature and learning rate


class _StandIn(types.ModuleType):
    """A module that has whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def discrete_vae(folder: str | None) -> type[nn.Module]:
    """Its class, from `pip install --target FOLDER`, or as installed. Raises ImportError saying how to get it."""
    if folder is not None and folder not in sys.path:
        sys.path.append(folder)  # behind what is installed: only it and einops are wanted from there
    spec = importlib.util.find_spec(NAME) if NAME not in sys.modules else sys.modules[NAME].__spec__
    if spec is None or importlib.util.find_spec("einops") is None:
        raise ImportError(f"there is no dalle-pytorch with einops here: {HOW_TO_GET_IT}")
    if NAME not in sys.modules:
        package = types.ModuleType(NAME)  # its own __init__ would import all of DALL·E
        package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations or ())
        stand_ins = {name: _StandIn(name) for name in NOT_NEEDED}
        sys.modules |= {NAME: package, **stand_ins}
        package.distributed_utils = stand_ins[f"{NAME}.distributed_utils"]  # type: ignore[attr-defined]
        package.distributed_utils.is_distributed = False  # type: ignore[attr-defined]
    found: type[nn.Module] = importlib.import_module(f"{NAME}.{NAME}").DiscreteVAE
    return found


class PeerTrainer:
    """The loop body of its train_vae.py, without its logging."""

    def __init__(self, vae: nn.Module, settings: dict[str, float]) -> None:
        self.vae, self._settings, self.step = vae, settings, 0
        self.temp = settings["first_temp"]
        self._optimizer = torch.optim.Adam(vae.parameters(), lr=settings["lr"])
        self._schedule = torch.optim.lr_scheduler.ExponentialLR(self._optimizer, gamma=settings["lr_decay"])

    def train_step(self, images_BCHW: Tensor, step_of_epoch: int) -> float:
        """Pixels in [0, 1]. The loss."""
        loss, _ = self.vae(images_BCHW, return_loss=True, return_recons=True, temp=self.temp)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        if step_of_epoch % EVERY == 0:
            # From the temperature it has, not from the first one: so it falls faster and faster.
            change = math.exp(-self._settings["anneal_rate"] * self.step)
            self.temp = max(self.temp * change, self._settings["temp_min"])
            self._schedule.step()
        self.step += 1
        return float(loss.detach())


def as_images(pixels_BHWC: np.ndarray) -> Tensor:
    """uint8 → [0, 1], channels first, as torchvision's ToTensor."""
    return torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).contiguous().float() / 255.0


@torch.no_grad()
def evaluate(vae: Any, pixels_NHWC: np.ndarray, temp: float) -> dict[str, float]:
    """The figures that our own evaluation gives."""
    vae.eval()
    mean_C, std_C = (torch.tensor(each)[:3].view(1, 3, 1, 1) for each in vae.normalization)
    squared = {"soft": 0.0, "hard": 0.0}
    histogram_K = np.zeros(vae.num_tokens)
    torch.manual_seed(0)
    for pixels_BHWC in np.array_split(pixels_NHWC, range(16, len(pixels_NHWC), 16)):
        x_BCHW = as_images(pixels_BHWC)
        tokens_BN = vae.get_codebook_indices(x_BCHW)
        made = {"soft": vae(x_BCHW, temp=temp), "hard": vae.decode(tokens_BN)}
        for name, out_BCHW in made.items():
            squared[name] += float(((out_BCHW * std_C + mean_C).clamp(0, 1) - x_BCHW).square().sum())
        histogram_K += np.bincount(tokens_BN.flatten().numpy(), minlength=vae.num_tokens)
    vae.train()
    share_K = histogram_K[histogram_K > 0] / histogram_K.sum()
    return {
        "psnr_soft": psnr(squared["soft"] / pixels_NHWC.size), "psnr_hard": psnr(squared["hard"] / pixels_NHWC.size),
        "used_share": float((histogram_K > 0).mean()), "perplexity": float(np.exp(-(share_K * np.log(share_K)).sum())),
        "temperature": temp,
    }  # fmt: skip


def train(vae: nn.Module, shards: Sequence[Any], spec: ImageSpec, minutes: float, settings: dict[str, float]) -> dict:
    """For so long by the clock, reading included; then what the last steps were like."""
    trainer = PeerTrainer(vae, settings)
    size = int(settings["batch_size"])
    options = StreamOptions(image_spec=spec, seed=0, batch_size=size, num_streams=min(4, size), augment="none")
    losses: list[float] = []
    with closing(TrainingSamples(shards, options, decode_threads=1)) as samples:
        started = time.monotonic()
        while time.monotonic() - started < 60 * minutes:
            images_BCHW = as_images(samples.next_batch().pixels_BHWC)
            losses.append(trainer.train_step(images_BCHW, trainer.step))
    last = losses[-50:]
    return {
        "steps": trainer.step, "images": trainer.step * size, "minutes": round((time.monotonic() - started) / 60, 2),
        "temperature": trainer.temp, "loss": sum(last) / len(last),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dalle-pytorch", metavar="PEER", help=HOW_TO_GET_IT)
    parser.add_argument("--train", nargs="+", required=True, help="shards to learn from")
    parser.add_argument("--val", nargs="+", required=True, help="shards held out")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--num-images", type=int, default=512, help="held out")
    parser.add_argument("--threads", type=int, default=2)
    for name, value in {**MODEL, **TRAINER}.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    chosen = vars(parser.parse_args(arguments))
    try:
        kind = discrete_vae(chosen["dalle_pytorch"])
    except ImportError as error:
        parser.error(str(error))
    torch.set_num_threads(chosen["threads"])
    torch.manual_seed(0)
    vae = kind(image_size=chosen["image_size"], **{name: chosen[name] for name in MODEL})
    spec = ImageSpec(size=chosen["image_size"], small="upscale")
    held_out = held_out_images(expand(chosen["val"]), spec, chosen["num_images"])
    settings = {name: chosen[name] for name in TRAINER}
    ran = train(vae, expand(chosen["train"]), spec, chosen["minutes"], settings)
    figures = evaluate(vae, held_out.pixels_NHWC, ran["temperature"])
    json.dump({**ran, **figures, "num_images": len(held_out.pixels_NHWC)}, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
