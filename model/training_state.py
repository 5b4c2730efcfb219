"""Weights, moving average and optimiser <-> one flat dict of tensors: training goes on bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from model.config import ModelError

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def kept(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU, which later steps leave alone."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def state_tensors(model: nn.Module, average: AveragedModel, optimizer: Optimizer) -> dict[str, Tensor]:
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {f"ema.{name}": tensor for name, tensor in average.module.state_dict().items()}
    state["ema.num_averaged"] = average.n_averaged
    for name, parameter in model.named_parameters():
        for moment, tensor in optimizer.state.get(parameter, {}).items():
            state[f"optim.{name}.{moment}"] = tensor
    return {name: kept(tensor) for name, tensor in state.items()}


def load_state_tensors(
    state: dict[str, Tensor], model: nn.Module, average: AveragedModel, optimizer: Optimizer
) -> None:
    """Refuses other names or shapes than these modules' own, naming the first that differs."""
    _load_module(model, state, "model.")
    _load_module(average.module, state, "ema.")
    with torch.no_grad():
        average.n_averaged.copy_(taken(state, "ema.num_averaged", average.n_averaged.shape))
    if any(name.startswith("optim.") for name in state):
        _load_moments(model, optimizer, state)


def taken(state: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    if name not in state:
        raise ModelError(f"the training state lacks the tensor {name!r}: it is of another model or version")
    if state[name].shape != shape:
        found, wanted = tuple(state[name].shape), tuple(shape)
        raise ModelError(f"the training state's {name!r} has the shape {found}; this model needs {wanted}")
    return state[name]


def _load_module(module: nn.Module, state: dict[str, Tensor], prefix: str) -> None:
    own = module.state_dict()
    given = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    if extra := sorted(given - set(own) - {"num_averaged"}):
        raise ModelError(f"the training state has the tensor {prefix + extra[0]!r}, which this model lacks")
    module.load_state_dict({name: taken(state, prefix + name, own[name].shape) for name in own})


def _load_moments(model: nn.Module, optimizer: Optimizer, state: dict[str, Tensor]) -> None:
    """Laid out in memory like their parameters: the fused optimiser walks both side by side."""
    moments = {}
    for i, (name, parameter) in enumerate(model.named_parameters()):
        each = {m: taken(state, f"optim.{name}.{m}", _shape(m, parameter)) for m in MOMENTS}
        like = {m: torch.empty_like(parameter) for m in MOMENTS[1:]}
        moments[i] = {"step": each["step"]} | {m: like[m].detach().copy_(each[m]) for m in like}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _shape(moment: str, parameter: Tensor) -> torch.Size:
    return torch.Size(()) if moment == "step" else parameter.shape
