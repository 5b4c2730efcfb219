"""LPIPS and rFID with networks of random weights: the arithmetic, the files that are taken and those refused."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from model.config import ModelError
from model.inception import FidInception
from model.perceptual import NETWORKS, Fid, Lpips, read_weights

CPU = torch.device("cpu")
KERNELS = {"alex": {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}}


def alexnet(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Names and shapes as torchvision's, with its classifier."""
    weights = {"classifier.1.weight": torch.zeros(2, 2)}
    for number, (n_out, n_in, kernel) in KERNELS["alex"].items():
        fan_in = n_in * kernel * kernel
        weights[f"features.{number}.weight"] = (
            torch.randn(n_out, n_in, kernel, kernel, generator=generator) / fan_in**0.5
        )
        weights[f"features.{number}.bias"] = torch.zeros(n_out)
    return weights


def pictures(seed: int, size: int = 64) -> torch.Tensor:
    return torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_lpips_is_the_weighed_distance_of_unit_features_by_the_weights_that_torchmetrics_has() -> None:
    pytest.importorskip("torchmetrics")
    weights = alexnet(torch.Generator().manual_seed(0))
    lpips, x, y = Lpips(save(weights), CPU), pictures(1), pictures(2)
    assert lpips.distance(x, x) == pytest.approx(torch.zeros(4))
    near, far = lpips.distance(x, (x + 0.02).clamp(0, 1)), lpips.distance(x, y)
    assert (near > 0).all() and (near < far).all()
    assert lpips.distance(y, x) == pytest.approx(far, rel=1e-5)
    assert far == pytest.approx(by_torchmetrics(weights, x, y), rel=1e-4)
    lpips.add(x, y)
    lpips.add(x[:2], y[:2])
    assert lpips.figures()["lpips_hard"] == pytest.approx(float(torch.cat([far, far[:2]]).mean()), rel=1e-5)


def by_torchmetrics(weights: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The same weights in torch's own layers, as torchvision's AlexNet stacks them; the rest is torchmetrics'."""
    import torchmetrics
    from torch import nn
    from torchmetrics.functional.image.lpips import ScalingLayer, _normalize_tensor, _spatial_average

    pool, relu = nn.MaxPool2d(3, 2), nn.ReLU()
    layers: list[nn.Module] = []
    for number, stride, padding, pooled in ((0, 4, 2, 0), (3, 1, 2, 1), (6, 1, 1, 1), (8, 1, 1, 0), (10, 1, 1, 0)):
        n_out, n_in, kernel = KERNELS["alex"][number]
        conv = nn.Conv2d(n_in, n_out, kernel, stride, padding)
        conv.weight.data, conv.bias.data = weights[f"features.{number}.weight"], weights[f"features.{number}.bias"]
        layers.append(nn.Sequential(*([pool] if pooled else []), conv, relu))
    folder = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models"
    lines = torch.load(folder / "alex.pth", map_location="cpu", weights_only=True)
    total, scale = torch.zeros(len(x)), ScalingLayer()
    one, other = scale(2 * x - 1), scale(2 * y - 1)
    for n, layer in enumerate(layers):
        one, other = layer(one), layer(other)
        difference = (_normalize_tensor(one) - _normalize_tensor(other)) ** 2
        total += _spatial_average((difference * lines[f"lin{n}.model.1.weight"]).sum(1, keepdim=True), False).flatten()
    return total.detach()


@pytest.fixture(scope="module")
def inception_file() -> bytes:
    """As pytorch-fid's: with its classifier, without counters of batches."""
    torch.manual_seed(0)
    state = {name: each for name, each in FidInception().state_dict().items() if "num_batches" not in name}
    buffer = io.BytesIO()
    torch.save({**state, "fc.weight": torch.zeros(2, 2)}, buffer)
    return buffer.getvalue()


@pytest.mark.slow
def test_rfid_is_nothing_for_the_same_pictures_and_more_for_others(inception_file: bytes) -> None:
    pytest.importorskip("torchmetrics")
    same, other = Fid(inception_file, CPU), Fid(inception_file, CPU)
    same.add(pictures(1), pictures(1))
    other.add(pictures(1), pictures(2) ** 4)
    assert same.figures()["rfid"] == pytest.approx(0.0, abs=1e-3)
    assert other.figures()["rfid"] > 10 * abs(same.figures()["rfid"])


def test_inception_takes_the_file_of_pytorch_fid_and_gives_its_2048_features(inception_file: bytes) -> None:
    pytest.importorskip("torchmetrics")
    fid = Fid(inception_file, CPU)
    assert fid.figures() == {}, "no image, no covariance"
    assert FidInception().eval()((pictures(1) * 255).to(torch.uint8)).shape == (4, 2048)
    shapes = {name: tuple(each.shape) for name, each in FidInception().state_dict().items()}
    assert shapes["Mixed_6b.branch7x7dbl_2.conv.weight"] == (128, 128, 7, 1)
    assert shapes["Mixed_7c.branch3x3dbl_3b.bn.running_var"] == (384,)
    assert sum(math.prod(shape) for name, shape in shapes.items() if "running" not in name and shape) == 21_785_568


def test_a_pickle_with_code_in_it_is_refused_and_does_not_run() -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return pytest.fail, ("the file's code ran",)

    buffer = io.BytesIO()
    torch.save({"features.0.weight": Bomb()}, buffer)
    with pytest.raises(ModelError, match="not a file of weights"):
        read_weights(buffer.getvalue(), "--lpips-weights")


def test_both_networks_have_five_stages() -> None:
    assert {name: len(stages) for name, stages in NETWORKS.items()} == {"vgg": 5, "alex": 5}
