"""Inception-v3 as the FID is defined on: the network of pytorch-fid's weights file, up to the last pooling.

The file is `pt_inception-2015-12-05-6726825d.pth` (a state dict, converted from TensorFlow's 2015 graph). It differs
from torchvision's network in its poolings: averages leave the padding out, and the last block takes a maximum
(mseitzer/pytorch-fid, inception.py). No weights come with this repository.
"""
# B images, C channels, H W rows and columns

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 2048
INPUT_SIZE = 299  # pixels of a side


class BasicConv2d(nn.Module):
    def __init__(
        self, n_in: int, n_out: int, kernel: int | tuple[int, int], stride: int = 1, padding: object = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, kernel, stride, padding, bias=False)  # type: ignore[arg-type]
        self.bn = nn.BatchNorm2d(n_out, eps=0.001)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x_BCHW)), inplace=True)


def _mean3(x_BCHW: Tensor) -> Tensor:
    return F.avg_pool2d(x_BCHW, 3, stride=1, padding=1, count_include_pad=False)


class InceptionA(nn.Module):
    def __init__(self, n_in: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(n_in, 64, 1)
        self.branch5x5_1 = BasicConv2d(n_in, 48, 1)
        self.branch5x5_2 = BasicConv2d(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = BasicConv2d(n_in, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, padding=1)
        self.branch_pool = BasicConv2d(n_in, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_mean3(x))], 1)


class InceptionB(nn.Module):
    def __init__(self, n_in: int) -> None:
        super().__init__()
        self.branch3x3 = BasicConv2d(n_in, 384, 3, stride=2)
        self.branch3x3dbl_1 = BasicConv2d(n_in, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, F.max_pool2d(x, 3, stride=2)], 1)


class InceptionC(nn.Module):
    def __init__(self, n_in: int, inner: int) -> None:
        super().__init__()
        wide, tall = ((1, 7), (0, 3)), ((7, 1), (3, 0))
        self.branch1x1 = BasicConv2d(n_in, 192, 1)
        self.branch7x7_1 = BasicConv2d(n_in, inner, 1)
        self.branch7x7_2 = BasicConv2d(inner, inner, wide[0], padding=wide[1])
        self.branch7x7_3 = BasicConv2d(inner, 192, tall[0], padding=tall[1])
        self.branch7x7dbl_1 = BasicConv2d(n_in, inner, 1)
        self.branch7x7dbl_2 = BasicConv2d(inner, inner, tall[0], padding=tall[1])
        self.branch7x7dbl_3 = BasicConv2d(inner, inner, wide[0], padding=wide[1])
        self.branch7x7dbl_4 = BasicConv2d(inner, inner, tall[0], padding=tall[1])
        self.branch7x7dbl_5 = BasicConv2d(inner, 192, wide[0], padding=wide[1])
        self.branch_pool = BasicConv2d(n_in, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(_mean3(x))], 1)


class InceptionD(nn.Module):
    def __init__(self, n_in: int) -> None:
        super().__init__()
        self.branch3x3_1 = BasicConv2d(n_in, 192, 1)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2)
        self.branch7x7x3_1 = BasicConv2d(n_in, 192, 1)
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], 1)


class InceptionE(nn.Module):
    def __init__(self, n_in: int, *, takes_maximum: bool) -> None:
        super().__init__()
        self._takes_maximum = takes_maximum
        self.branch1x1 = BasicConv2d(n_in, 320, 1)
        self.branch3x3_1 = BasicConv2d(n_in, 384, 1)
        self.branch3x3_2a = BasicConv2d(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = BasicConv2d(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = BasicConv2d(n_in, 448, 1)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = BasicConv2d(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = BasicConv2d(n_in, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once, twice = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self._takes_maximum else _mean3(x)
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(once), self.branch3x3_2b(once),
                self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice),
                self.branch_pool(pooled),
            ],
            1,
        )  # fmt: skip


class FidInception(nn.Module):
    """uint8 pictures (B, 3, H, W) → features (B, 2048)."""

    num_features = FEATURES

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = InceptionA(192, 32), InceptionA(256, 64), InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b, self.Mixed_6c = InceptionC(768, 128), InceptionC(768, 160)
        self.Mixed_6d, self.Mixed_6e = InceptionC(768, 160), InceptionC(768, 192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, takes_maximum=False)
        self.Mixed_7c = InceptionE(2048, takes_maximum=True)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x = F.interpolate(pixels_BCHW / 255, size=(INPUT_SIZE, INPUT_SIZE), mode="bilinear", align_corners=False)
        x = 2 * x - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean(dim=(2, 3))
