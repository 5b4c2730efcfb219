"""From an architecture's config to its module: the one place that knows both."""

from __future__ import annotations

from model.autoencoder import Autoencoder
from model.config import ArchitectureConfig, DiscreteVAEConfig, DVAEConfig
from model.discrete_vae import DiscreteVAE
from model.dvae import DVAE


def build(config: ArchitectureConfig) -> Autoencoder:
    """With weights that mean nothing yet."""
    if isinstance(config, DVAEConfig):
        return DVAE(config)
    assert isinstance(config, DiscreteVAEConfig)
    return DiscreteVAE(config)
