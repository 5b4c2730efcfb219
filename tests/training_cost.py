"""What a training step costs, in bytes and operations that are the same on every machine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


def kept_bytes_and_flops(step: Callable[[], object]) -> tuple[int, int]:
    """Of all that autograd keeps between the passes, and of both."""
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), FlopCounterMode(display=False) as n:
        step()
    return sum(kept), int(n.get_total_flops())
