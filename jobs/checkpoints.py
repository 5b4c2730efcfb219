"""Checkpoints by URL: what one is (read without torch), and the weights (with it)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.config import NO_DECODER, ModelError, model_config
from pipeline import storage
from pipeline.errors import PipelineError
from pipeline.images import ImageSpec

if TYPE_CHECKING:
    from model.tokenizer import DVAETokenizer

log = logging.getLogger(__name__)
RECORD = "checkpoint.json"
TRAINED_MODEL = "model"  # where `dvae train` puts the finished model below its output


class CheckpointNotFound(PipelineError):
    """There is no checkpoint at that URL."""


@dataclass(frozen=True)
class CheckpointHead:
    """What the driver must know of a checkpoint; the weights are checked against it where they are loaded."""

    url: str
    tokenizer_id: str
    grid: tuple[int, int]
    codebook_size: int
    image_spec: dict[str, Any]
    step: int
    has_decoder: bool = True

    def require_decoder(self) -> None:
        """Raises ModelError."""
        if not self.has_decoder:
            raise ModelError(f"{storage.public_url(self.url)} cannot make pictures: {NO_DECODER}")


def find_checkpoint(url: str) -> str:
    """The checkpoint at `url`: itself, the finished model of a training output, or its newest whole checkpoint.
    Raises CheckpointNotFound naming what was looked for."""
    url = storage.normalize(url)
    if storage.exists(storage.join(url, RECORD)):
        return url
    if storage.stat(url) is not None:
        raise CheckpointNotFound(
            f"{storage.public_url(url)} is a file, and a checkpoint is a folder: if these are weights from elsewhere, "
            f"`dvae import {storage.public_url(url)} FOLDER` makes a checkpoint of them"
        )
    files = storage.list_files(storage.join(url, "checkpoints"))
    records = [info.url for info in files if storage.base_name(info.url) == RECORD]
    newest = max(records).rpartition("/")[0] if records else None
    finished = storage.join(url, TRAINED_MODEL)
    if storage.exists(storage.join(finished, RECORD)):
        _tell_of_a_newer_one(finished, newest)
        return finished
    if newest is not None:
        return newest
    raise CheckpointNotFound(
        f"no checkpoint at {storage.public_url(url)}: looked for {RECORD} there, in {TRAINED_MODEL}/ and in "
        "checkpoints/*/; name a folder that `dvae train` wrote"
    )


def _tell_of_a_newer_one(finished: str, newest: str | None) -> None:
    """A finished run may have been taken further. (A record that is damaged is its reader's business.)"""
    with suppress(ValueError, KeyError, TypeError):
        step = int(json.loads(storage.read_bytes(storage.join(finished, RECORD)))["step"])
        if newest is not None and int(storage.base_name(newest).rpartition("-")[2]) > step:
            log.warning("taking the model of step %d; training went on to %s", step, storage.public_url(newest))


def read_head(url: str) -> CheckpointHead:
    """Raises CheckpointNotFound, or ModelError when what is there is no checkpoint of ours."""
    found = find_checkpoint(url)
    try:
        record = json.loads(storage.read_bytes(storage.join(found, RECORD)))
        config = model_config(record["model"])
        image_spec = ImageSpec.from_json(record["image_spec"])
        grid = config.grid(image_spec.size)
        return CheckpointHead(
            found,
            str(record["tokenizer_id"]),
            grid,
            config.codebook_size,
            record["image_spec"],
            int(record["step"]),
            record.get("has_decoder") is not False,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{found}/{RECORD} is no checkpoint of ours ({type(error).__name__}: {error})") from error


def file_reader(url: str) -> Callable[[str], bytes]:
    """`read(name)` for model.checkpoint.read_checkpoint."""
    return lambda name: storage.read_bytes(storage.join(url, name))


@dataclass(frozen=True)
class TokenizerSource:
    """How a worker gets its tokenizer; small, so that it travels instead of the weights."""

    checkpoint: str
    device: str
    precision: str
    batch_size: int
    threads: int
    compile: bool = False

    def numerics(self) -> dict[str, Any]:
        """As DVAETokenizer.numerics, known before anything is loaded."""
        return {
            "device": self.device,
            "precision": self.precision,
            "compiled": self.compile,
            "batch_size": self.batch_size,
            "threads": self.threads,
        }

    def load(self) -> DVAETokenizer:
        from model.checkpoint import read_checkpoint
        from model.tokenizer import DVAETokenizer

        checkpoint = read_checkpoint(file_reader(self.checkpoint))
        return DVAETokenizer(
            checkpoint,
            device=self.device,
            precision=self.precision,  # type: ignore[arg-type]  # checked by TokenizeConfig
            batch_size=self.batch_size,
            threads=self.threads,
            compile=self.compile,
        )
