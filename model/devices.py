"""Which devices torch sees on this machine."""

from __future__ import annotations

import torch


def num_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
