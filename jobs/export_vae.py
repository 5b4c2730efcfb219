"""`dvae export CHECKPOINT vae.pt`: the checkpoint of a DiscreteVAE as the file that DALLE-pytorch reads."""

from __future__ import annotations

import json

from rich.console import Console
from rich.markup import escape

from jobs.checkpoints import file_reader, find_checkpoint
from model.checkpoint import read_checkpoint
from model.discrete_vae import vae_pt
from pipeline import storage
from pipeline.errors import PipelineError


class FileIsThere(PipelineError):
    """It may be what somebody trained for weeks."""


def run_export_vae(checkpoint: str, file: str, *, as_json: bool) -> int:
    """Raises CheckpointNotFound, FileIsThere, StorageError, and ModelError where its class could not hold the model."""
    found = read_checkpoint(file_reader(find_checkpoint(checkpoint)))
    size, url = found.image_spec["size"], storage.normalize(file)
    _publish(url, vae_pt(found.dvae_config, found.weights, size))
    console, shown = Console(soft_wrap=True, highlight=False), storage.public_url(url)
    if as_json:
        console.print_json(json.dumps({"tokenizer_id": found.tokenizer_id, "files": [url]}))
    else:
        console.print(f"wrote {escape(shown)}: DALLE-pytorch's DiscreteVAE for images of {size} × {size} pixels")
    return 0


def _publish(url: str, data: bytes) -> None:
    """Once more over the same file, but over no other."""
    if storage.stat(url) is not None and storage.read_bytes(url) != data:
        raise FileIsThere(f"{storage.public_url(url)} is there already: give another name, or remove it first")
    storage.publish(url, data)
