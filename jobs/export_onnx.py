"""`dvae export CHECKPOINT FOLDER`: the tokenizer as ONNX files, held against our own arithmetic where onnxruntime is
installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape

from jobs.checkpoints import file_reader, find_checkpoint
from model.checkpoint import Checkpoint, read_checkpoint
from model.onnx_export import DECODER, ENCODER, onnx_files
from model.tokenizer import DVAETokenizer
from pipeline import storage

# B images, H W rows and columns (of pixels, or of tokens), C channels

NUM_IMAGES = 8
NEAR_TIE = 1e-3  # logits; a token that differs by more is no matter of rounding


@dataclass(frozen=True)
class OnnxParity:
    """Of images of noise, against fp32 here. `largest_margin`: by how much it prefers its own code where tokens
    differ; `largest_difference`: of decoded pixels, in levels of 255; None where there is no decoder."""

    num_tokens: int
    num_differing: int
    largest_margin: float
    largest_difference: int | None

    @property
    def holds(self) -> bool:
        return self.largest_margin <= NEAR_TIE and (self.largest_difference or 0) <= 1


def run_export_onnx(checkpoint: str, folder: str, *, as_json: bool) -> int:
    """Raises CheckpointNotFound, ModelError, StorageError. 1: they would not compute what the checkpoint does, and
    nothing was written."""
    found = read_checkpoint(file_reader(find_checkpoint(checkpoint)))
    files = onnx_files(found)
    parity = parity_of(found, files) if importlib.util.find_spec("onnxruntime") else None
    written = [storage.join(storage.normalize(folder), name) for name in files]
    if parity is not None and not parity.holds:
        written = []  # nobody shall serve those
    for url, data in zip(written, files.values(), strict=False):
        storage.publish(url, data)
    console = Console(soft_wrap=True, highlight=False)
    if as_json:
        checked = None if parity is None else asdict(parity)
        console.print_json(json.dumps({"tokenizer_id": found.tokenizer_id, "files": written, "parity": checked}))
    else:
        _print(written, parity, console)
    return 0 if parity is None or parity.holds else 1


def parity_of(checkpoint: Checkpoint, files: Mapping[str, bytes]) -> OnnxParity:
    tokenizer, size = DVAETokenizer(checkpoint, device="cpu", batch_size=NUM_IMAGES), checkpoint.image_spec["size"]
    pixels_BHWC = _noise(size)
    expected_BHW, tokens_BHW = tokenizer.encode(pixels_BHWC), _run(files[ENCODER], pixels_BHWC)
    difference = None
    if DECODER in files:
        made_BHWC = _run(files[DECODER], expected_BHW).astype(np.int16)
        difference = int(np.abs(made_BHWC - tokenizer.decode(expected_BHW)).max())
    return OnnxParity(
        num_tokens=expected_BHW.size,
        num_differing=int((tokens_BHW != expected_BHW).sum()),
        largest_margin=float(tokenizer.margins(pixels_BHWC, tokens_BHW).max()),
        largest_difference=difference,
    )


def _noise(size: int) -> NDArray[np.uint8]:
    """(B, size, size, 3): coarse to fine, so that many codes come up."""
    rng = np.random.default_rng(0)
    pixels_BHWC = np.empty((NUM_IMAGES, size, size, 3), np.uint8)
    for number in range(NUM_IMAGES):
        cell = 2 ** (number % 4)
        few_HWC = rng.integers(0, 256, (-(-size // cell), -(-size // cell), 3), dtype=np.uint8)
        pixels_BHWC[number] = few_HWC.repeat(cell, axis=0).repeat(cell, axis=1)[:size, :size]
    return pixels_BHWC


def _run(model: bytes, given: NDArray[Any]) -> NDArray[Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    made: NDArray[Any] = session.run(None, {session.get_inputs()[0].name: given})[0]
    return made


def _print(written: list[str], parity: OnnxParity | None, console: Console) -> None:
    for url in written:
        console.print(f"wrote {escape(storage.public_url(url))}")
    if parity is None:
        console.print(
            "note: not held against fp32 here, for onnxruntime is not installed: pip install 'dvae-ray[onnx]'"
        )
        return
    same = parity.num_tokens - parity.num_differing
    ties = f" (the others by margins of up to {parity.largest_margin:.1g})" if parity.num_differing else ""
    pixels = "there is no decoder"
    if parity.largest_difference is not None:
        pixels = f"decoded pixels are within {parity.largest_difference} of 255"
    verdict = "[green]the same[/]" if parity.holds else "[red]not the same, so nothing was written[/]"
    console.print(f"{verdict}: {same:,} of {parity.num_tokens:,} tokens are those of fp32{ties}; {pixels}")
