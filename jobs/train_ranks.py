"""The workers of one training run among each other: who they are, what they agree on. torch.distributed's one door.

Everything goes over the CPU (Gloo), also beside NCCL, and in the order of ranks, so that sums are repeatable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pipeline.errors import PipelineError

OutOfMemory = torch.OutOfMemoryError
T = TypeVar("T")


class NoGpu(PipelineError):
    """Training was to use a GPU, and torch sees none."""


@dataclass(frozen=True)
class Ranks:
    """Alone in a process, or one of the process group that Ray Train has set up."""

    rank: int
    world_size: int
    device: torch.device
    _group: Any = None

    @classmethod
    def join(cls, *, use_gpu: bool, threads: int) -> Ranks:
        """Also fixes torch's threads: Ray sets OMP_NUM_THREADS, and another number may pick another kernel."""
        torch.set_num_threads(threads)
        if not dist.is_initialized():
            return cls(0, 1, _device(use_gpu))
        group = dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else dist.group.WORLD
        return cls(dist.get_rank(), dist.get_world_size(), _device(use_gpu), group)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks, on every rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def agree(self, value: T) -> T:
        """The first rank's value, on every rank."""
        if self._group is None:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=self._group, device=torch.device("cpu"))
        agreed: T = box[0]
        return agreed


def _device(use_gpu: bool) -> torch.device:
    if not use_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise NoGpu("ray.use_gpu is true, but torch sees no CUDA device here; set ray.use_gpu=false to train on CPUs")
    return torch.device("cuda", torch.cuda.current_device())
