"""How alike two pictures are to the eye: SSIM (Wang et al. 2004: a Gaussian window of 11 pixels, σ 1.5).

The same figure as torchmetrics', which is what it is tested against, and which takes longer over a batch than a small
model takes to evaluate it: it convolves with the whole window, and imports for seconds.
"""
# B images, C channels, H W rows and columns of pixels

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

WINDOW = 11  # pixels of a side; a picture is mirrored at its borders, so it must be larger than half of that
SIGMA = 1.5
C1, C2 = 0.01**2, 0.03**2


def has_ssim(height: int, width: int) -> bool:
    return min(height, width) > WINDOW // 2


def ssim(made_BCHW: Tensor, original_BCHW: Tensor) -> Tensor:
    """(B,): mean over channels and pixels. fp32 in [0, 1]."""
    x, y = made_BCHW, original_BCHW
    mean_x, mean_y = _windowed(x), _windowed(y)
    squares, product = mean_x.square().add_(mean_y.square()), mean_x.mul_(mean_y)
    spreads = _windowed(x.square().addcmul_(y, y)).sub_(squares).clamp_min_(0.0)
    covariance = _windowed(x * y).sub_(product)
    likeness = product.mul_(2).add_(C1).mul_(covariance.mul_(2).add_(C2))
    return likeness.div_(squares.add_(C1).mul_(spreads.add_(C2))).flatten(1).mean(dim=1)


def _windowed(x_BCHW: Tensor) -> Tensor:
    """The weighted mean around each pixel. The window is separable, and a product with a matrix of bands is what
    processors do fastest."""
    rows_HH, columns_WW = (_bands(side).to(x_BCHW) for side in x_BCHW.shape[2:])
    return rows_HH @ (x_BCHW @ columns_WW.T)


@lru_cache(maxsize=4)
def _bands(side: int) -> Tensor:
    """(side, side): the weights of each place's window, mirrored where it goes over the border."""
    half = WINDOW // 2
    offset_O = torch.arange(-half, half + 1)
    weight_O = torch.exp(-0.5 * (offset_O / SIGMA).double().square())
    place_HO = (torch.arange(side)[:, None] + offset_O).abs()
    place_HO = side - 1 - (side - 1 - place_HO).abs()
    weight_HO = (weight_O / weight_O.sum()).expand(side, -1)
    return torch.zeros(side, side, dtype=torch.float64).scatter_add_(1, place_HO, weight_HO)
