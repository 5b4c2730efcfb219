"""Image bytes that are checked in give exactly these tokens, through pixels, encoder and argmax.

Whatever may move a token must change golden/tokens.json in the same commit, and say why: every token that
anybody stored is at stake. `python tests/test_golden_tokens.py` writes the file anew.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model import losses, quantizer
from model.checkpoint import Checkpoint, checkpoint_files, read_checkpoint
from model.config import DVAEConfig
from model.dvae import DVAE, seeded_dvae
from model.tokenizer import DVAETokenizer
from pipeline.images import ImageSpec, decode_image

GOLDEN = Path(__file__).parent / "golden"
IMAGES = ("landscape.png", "portrait.jpg")
SPEC = ImageSpec(size=64)
LEAST_MARGIN = 5e-3  # between the best and the second-best logit; fp32 kernels differ by some 1e-6 here
MODELS = {
    "conv": DVAEConfig(256, 8, 16, 1, 16, "conv"),
    "inner_product": DVAEConfig(256, 8, 16, 1, 16, "inner_product", 16, "strided"),
}


def golden_model(config: DVAEConfig) -> DVAE:
    """Seeded weights, but centred on grey and with louder blocks and logits, so that many codes are used."""
    model, first = seeded_dvae(config, 3), "encoder.blocks.input"
    with torch.no_grad():
        model.get_parameter(f"{first}.b").copy_(-2.0 * model.get_parameter(f"{first}.w").sum(dim=(1, 2, 3)))
        model.get_parameter(f"{first}.w").mul_(4.0)
        model.encoder.output.w.mul_(4.0)
    return model


def _checkpoint(config: DVAEConfig) -> Checkpoint:
    files = checkpoint_files(
        weights=dict(golden_model(config).state_dict()),
        dvae_config=config,
        image_spec=SPEC.to_json(),
        step=0,
        training_state=None,
        extra={},
    )
    return read_checkpoint(files.__getitem__)


def _pixels() -> NDArray[np.uint8]:
    return np.stack([decode_image((GOLDEN / name).read_bytes(), SPEC).pixels_HWC for name in IMAGES])


def _made() -> dict[str, Any]:
    made: dict[str, Any] = {}
    pixels_BHWC = _pixels()
    made["pixels_sha256"] = [hashlib.sha256(each.tobytes()).hexdigest() for each in pixels_BHWC]
    for name, config in MODELS.items():
        tokenizer = DVAETokenizer(_checkpoint(config), device="cpu", batch_size=2)
        made[name] = tokenizer.encode(pixels_BHWC).tolist()
    return made


def _stored() -> dict[str, Any]:
    stored: dict[str, Any] = json.loads((GOLDEN / "tokens.json").read_text())
    return stored


def test_the_image_bytes_give_the_pixels_they_always_gave():
    assert _made()["pixels_sha256"] == _stored()["pixels_sha256"]


@pytest.mark.parametrize("name", MODELS)
def test_the_image_bytes_give_the_tokens_they_always_gave(name):
    assert _made()[name] == _stored()[name]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_no_golden_token_hangs_on_a_near_tie_and_many_codes_are_used(name):
    model = golden_model(MODELS[name])
    z_NC = model.encode(losses.map_pixels(torch.from_numpy(_pixels())))
    best_N2 = quantizer.logits(z_NC, model.tables()).topk(2, dim=1).values
    assert float((best_N2[:, 0] - best_N2[:, 1]).min()) > LEAST_MARGIN
    assert len(np.unique(_stored()[name])) >= 12


if __name__ == "__main__":
    (GOLDEN / "tokens.json").write_text(json.dumps(_made()) + "\n")
