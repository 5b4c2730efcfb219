"""LPIPS and FID of reconstructions, by networks whose weights the user has; none come with this repository.

Weights are state dicts (`.pth` or `.safetensors`), read without running anything that is in them.
"""
# B images, C channels, H W rows and columns, D features

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor

from model.config import ModelError
from model.evaluation import PixelMetric
from model.inception import FidInception

Weights = dict[str, Tensor]

NOT_GIVEN = {  # figure -> why it may be missing
    "lpips_hard": "no LPIPS: it needs a network's weights, and nothing is downloaded. --lpips-weights PATH takes "
    "torchvision's alexnet-owt-7be5be79.pth or vgg16-397923af.pth",
    "rfid": "no rFID: it needs a network's weights, and nothing is downloaded. --fid-weights PATH takes pytorch-fid's "
    "pt_inception-2015-12-05-6726825d.pth",
}


@dataclass(frozen=True)
class _Stage:
    """Of a network: a pooling (its window, 0 for none), then convolutions, (number, stride, padding) each."""

    pool: int
    convs: tuple[tuple[int, int, int], ...]


def _vgg_stage(pool: int, *numbers: int) -> _Stage:
    return _Stage(pool, tuple((number, 1, 1) for number in numbers))


NETWORKS = {  # as torchvision numbers the layers under `features`
    "vgg": (
        _vgg_stage(0, 0, 2),
        _vgg_stage(2, 5, 7),
        _vgg_stage(2, 10, 12, 14),
        _vgg_stage(2, 17, 19, 21),
        _vgg_stage(2, 24, 26, 28),
    ),
    "alex": (
        _Stage(0, ((0, 4, 2),)),
        _Stage(3, ((3, 1, 2),)),
        _Stage(3, ((6, 1, 1),)),
        _Stage(0, ((8, 1, 1),)),
        _Stage(0, ((10, 1, 1),)),
    ),
}
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in [-1, 1] (richzhang/PerceptualSimilarity)


def pixel_metrics(lpips: bytes | None, fid: bytes | None, device: torch.device) -> list[PixelMetric]:
    """Those whose weights are given. Raises ModelError."""
    metrics: list[PixelMetric] = [] if lpips is None else [Lpips(lpips, device)]
    return metrics if fid is None else [*metrics, Fid(fid, device)]


class Lpips:
    """Zhang et al. 2018, v0.1: distances of unit-length features, weighed by learnt weights, mean over places."""

    def __init__(self, data: bytes, device: torch.device) -> None:
        weights = {name: each.to(device) for name, each in read_weights(data, "--lpips-weights").items()}
        self._stages, self._lines = _network(weights, device)
        self._weights, self._device = weights, device
        self._sum, self._num_images = 0.0, 0

    def add(self, x_BCHW: Tensor, made_BCHW: Tensor) -> None:
        self._sum += float(self.distance(x_BCHW, made_BCHW).sum(dtype=torch.float64))
        self._num_images += len(x_BCHW)

    def figures(self) -> dict[str, float]:
        return {"lpips_hard": self._sum / self._num_images}

    @torch.no_grad()
    def distance(self, x_BCHW: Tensor, made_BCHW: Tensor) -> Tensor:
        """(B,)"""
        total_B = torch.zeros(len(x_BCHW), device=self._device)
        pairs = zip(self._features(x_BCHW), self._features(made_BCHW), self._lines, strict=True)
        for one_BCHW, other_BCHW, line_1C11 in pairs:
            difference_BCHW = (_unit(one_BCHW) - _unit(other_BCHW)).square()
            total_B += F.conv2d(difference_BCHW, line_1C11).mean(dim=(1, 2, 3))
        return total_B

    def _features(self, x_BCHW: Tensor) -> Iterator[Tensor]:
        shift_C11, scale_C11 = (torch.tensor(v, device=self._device)[:, None, None] for v in (SHIFT, SCALE))
        x = (2 * x_BCHW - 1 - shift_C11) / scale_C11
        for stage in self._stages:
            if stage.pool:
                x = F.max_pool2d(x, stage.pool, stride=2)
            for number, stride, padding in stage.convs:
                weight, bias = (self._weights[f"features.{number}.{part}"] for part in ("weight", "bias"))
                x = F.relu(F.conv2d(x, weight, bias, stride=stride, padding=padding))
            yield x


class Fid:
    """Fréchet distance of Inception features between originals and reconstructions, both as uint8 pictures."""

    def __init__(self, data: bytes, device: torch.device) -> None:
        network = FidInception()
        _load_inception(network, read_weights(data, "--fid-weights"))
        self._distance = _frechet(network.requires_grad_(False).eval()).to(device)

    def add(self, x_BCHW: Tensor, made_BCHW: Tensor) -> None:
        for pixels_BCHW, real in ((x_BCHW, True), (made_BCHW, False)):
            self._distance.update((pixels_BCHW * 255).round().to(torch.uint8), real=real)

    def figures(self) -> dict[str, float]:
        """Nothing for fewer than two images, which have no covariance."""
        return {"rfid": float(self._distance.compute())} if self._distance.real_features_num_samples > 1 else {}


def read_weights(data: bytes, option: str) -> Weights:
    """A state dict, of safetensors or of torch.save. Raises ModelError."""
    try:
        return load(data) if data[8:9] == b"{" else _torch_load(data)
    except Exception as error:
        raise ModelError(f"{option}: not a file of weights; give a state dict as .pth or .safetensors") from error


def _torch_load(data: bytes) -> Weights:
    found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not all(isinstance(each, Tensor) for each in found.values()):
        raise ValueError("it holds something else than tensors by name")
    return found


def _network(weights: Weights, device: torch.device) -> tuple[tuple[_Stage, ...], list[Tensor]]:
    """The stages that these weights belong to, and the learnt weights of their features."""
    for name, stages in NETWORKS.items():
        numbers = [number for stage in stages for number, _, _ in stage.convs]
        if all(f"features.{number}.weight" in weights for number in numbers):
            lines = _lines(name)
            ends = [weights[f"features.{stage.convs[-1][0]}.weight"].shape[0] for stage in stages]
            if ends == [line.shape[1] for line in lines]:
                return stages, [line.to(device) for line in lines]
    raise ModelError(
        f"--lpips-weights: {len(weights)} tensors that are neither torchvision's AlexNet nor its VGG-16: give "
        "alexnet-owt-7be5be79.pth or vgg16-397923af.pth"
    )


def _lines(name: str) -> list[Tensor]:
    """LPIPS' own weights, (1, C, 1, 1) each, which torchmetrics has with it."""
    spec = importlib.util.find_spec("torchmetrics")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError("LPIPS needs torchmetrics: pip install 'dvae-ray[eval]'")
    path = Path(spec.submodule_search_locations[0], "functional", "image", "lpips_models", f"{name}.pth")
    return [line for _, line in sorted(_torch_load(path.read_bytes()).items())]


def _unit(x_BCHW: Tensor) -> Tensor:
    return x_BCHW / (x_BCHW.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)


def _load_inception(network: FidInception, weights: Weights) -> None:
    """Refuses another network's, naming the first tensor that differs."""
    expected = {name: each for name, each in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    for name, tensor in expected.items():
        if name not in weights or weights[name].shape != tensor.shape:
            found = f"{tuple(weights[name].shape)}" if name in weights else "nothing"
            raise ModelError(
                f"--fid-weights: {name} is {found} where {tuple(tensor.shape)} is needed: give pytorch-fid's "
                "pt_inception-2015-12-05-6726825d.pth"
            )
    network.load_state_dict({name: weights[name] for name in expected}, strict=False)


def _frechet(network: FidInception) -> Any:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ModelError("rFID needs torchmetrics: pip install 'dvae-ray[eval]'") from error
    return FrechetInceptionDistance(feature=network)
