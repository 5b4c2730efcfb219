"""torch.compile for training: the convolutions of encoder and decoder, for the shapes that they are first given."""

from __future__ import annotations

import torch

from model.autoencoder import Autoencoder
from model.inference import compiling

MAX_GRAPHS = 128  # of one function: groups × shapes


def compile_convolutions(model: Autoencoder, device: torch.device) -> None:
    """Before the first step, and after every copy that is to stay as it is. Names of weights don't change, losses may
    round differently. Raises ModelError where nothing can be compiled: now, and not in the first step."""
    with compiling():
        torch.compile(_probe, fullgraph=True)(torch.ones(16, device=device))
    # Each group is a graph of its own, so its gradients are ready, and sent to the other ranks, before the next one's.
    torch._dynamo.config.optimize_ddp = False
    # All groups share one `forward`, for each shape that they are given; beyond the limit (8) torch goes on uncompiled.
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    torch._dynamo.config.accumulated_recompile_limit = 4 * MAX_GRAPHS
    for group in (*model.encoder_body(), *model.decoder_body()):
        group.compile(dynamic=False)


def _probe(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x) + 1.0
