"""A tokenizer as ONNX: `encoder.onnx` (pixels → tokens) and `decoder.onnx` (tokens → pixels), in fp32.

Pixels are uint8 (B, size, size, 3) as the image spec gives them, tokens int32 (B, H, W), for any number B of images:
what comes before and after the network's own arithmetic is in the files. Each says in its metadata whose tokens they
are. Another runtime rounds in its own way, so a token that is nearly tied may fall otherwise.
"""
# B images, H W rows and columns (of pixels, or of tokens), C channels, N positions

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from model import losses, quantizer
from model.autoencoder import Autoencoder
from model.checkpoint import Checkpoint
from model.config import ModelError
from model.inference import inference_model

ENCODER, DECODER = "encoder.onnx", "decoder.onnx"


class OnnxEncoder(nn.Module):
    def __init__(self, model: Autoencoder, grid: tuple[int, int]) -> None:
        super().__init__()
        self._model, self._grid = model, grid

    def forward(self, pixels_BHWC: Tensor) -> Tensor:
        z_NC = self._model.encode(self._model.map_pixels(pixels_BHWC))
        tokens_N = quantizer.logits(z_NC, self._model.tables()).argmax(dim=1)
        return tokens_N.to(torch.int32).reshape(-1, *self._grid)


class OnnxDecoder(nn.Module):
    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self._model = model

    def forward(self, tokens_BHW: Tensor) -> Tensor:
        batch, rows, columns = tokens_BHW.shape
        stats_BCHW = self._model.decode_tokens(tokens_BHW.flatten().long(), (batch, rows, columns))
        return losses.to_uint8(self._model.reconstruction(stats_BCHW))


def onnx_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """File name → bytes; of an encoder alone just its own. Raises ModelError where the exporter is not installed."""
    size, grid = checkpoint.image_spec["size"], checkpoint.dvae_config.grid(checkpoint.image_spec["size"])
    model = inference_model(checkpoint, torch.device("cpu"), torch.float32)
    pixels_BHWC = torch.zeros((2, size, size, 3), dtype=torch.uint8)
    tokens_BHW = torch.zeros((2, *grid), dtype=torch.int32)
    facts = {
        "tokenizer_id": checkpoint.tokenizer_id,
        "image_spec": json.dumps(checkpoint.image_spec, sort_keys=True),
        "codebook_size": str(checkpoint.dvae_config.codebook_size),
    }
    files = {ENCODER: _exported(OnnxEncoder(model, grid), pixels_BHWC, ("pixels", "tokens"), facts)}
    if checkpoint.has_decoder:
        files[DECODER] = _exported(OnnxDecoder(model), tokens_BHW, ("tokens", "pixels"), facts)
    return files


def _exported(module: nn.Module, example: Tensor, names: tuple[str, str], facts: dict[str, str]) -> bytes:
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad(), _quietly(), _exporter_there():
        program = torch.onnx.export(
            module.eval(),
            (example,),
            dynamo=True,
            verbose=False,
            input_names=names[:1],
            output_names=names[1:],
            dynamic_shapes=({0: batch},),
        )
    assert program is not None
    program.model.metadata_props.update(facts)
    data: bytes = program.model_proto.SerializeToString()
    return data


@contextmanager
def _exporter_there() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ModelError(f"ONNX needs what is not installed ({error}): pip install 'dvae-ray[onnx]'") from error


@contextmanager
def _quietly() -> Iterator[None]:
    """The exporter talks about other libraries, and about its own future."""
    said = logging.getLogger("torch.onnx")
    before = said.level
    said.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        said.setLevel(before)
