"""A checkpoint: a folder of whole files, written together and read with every byte checked.

`model.safetensors` holds the weights that tokenise (the moving average), `training.safetensors` what a resume
needs, and `checkpoint.json`, written last, says what they are. This module maps all that to and from named
bytes; storing them is the caller's. `tokenizer_id` is made here: the identity that every token carries.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from model.architectures import build
from model.config import ArchitectureConfig, ModelError, model_config

FORMAT = "dvae-checkpoint"
FORMAT_VERSION = 1
WEIGHTS, TRAINING, RECORD = "model.safetensors", "training.safetensors", "checkpoint.json"
RECORD_FIELDS = {"model": dict, "image_spec": dict, "step": int, "tokenizer_id": str, "files": dict, "extra": dict}


class CheckpointError(ModelError):
    """Not a checkpoint of ours, or not whole; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """`extra` is what the caller asked to be kept beside the weights: how they were trained."""

    weights: dict[str, Tensor]
    dvae_config: ArchitectureConfig
    image_spec: dict[str, Any]
    step: int
    tokenizer_id: str
    extra: dict[str, Any] = field(default_factory=dict)
    training_state: dict[str, Tensor] | None = None

    @property
    def has_decoder(self) -> bool:
        """An encoder alone makes tokens, and can be asked for nothing else."""
        return any(map(_is_decoders, self.weights))


def tokenizer_id(weights: dict[str, Tensor], dvae_config: ArchitectureConfig, image_spec: dict[str, Any]) -> str:
    """32 hex digits of a sha256 over encoder (and shared codebook), its architecture and the image spec."""
    described = {"architecture": dvae_config.encoder_side(), "image_spec": image_spec}
    digest = hashlib.sha256(_canonical(described))
    for name in sorted(each for each in weights if each.startswith("encoder.") or each == "codebook"):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(_canonical([name, str(tensor.dtype), list(tensor.shape)]))
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:32]


def checkpoint_files(
    *,
    weights: dict[str, Tensor],
    dvae_config: ArchitectureConfig,
    image_spec: dict[str, Any],
    step: int,
    training_state: dict[str, Tensor] | None,
    extra: dict[str, Any],
    has_decoder: bool = True,
) -> dict[str, bytes]:
    """File name → bytes, in the order in which to publish them: the record that the others exist is last."""
    _check_tensors(weights, dvae_config, has_decoder)
    files = {WEIGHTS: save(_contiguous(weights))}
    if training_state is not None:
        files[TRAINING] = save(_contiguous(training_state))
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "tokenizer_id": tokenizer_id(weights, dvae_config, image_spec),
        "step": step,
        "model": dvae_config.to_json(),
        "image_spec": image_spec,
        "files": {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in files.items()},
        "extra": extra,
        **({} if has_decoder else {"has_decoder": False}),
    }
    record["record_sha256"] = _sha256(_canonical(record))
    files[RECORD] = json.dumps(record, indent=2, ensure_ascii=False).encode() + b"\n"
    return files


def read_checkpoint(read: Callable[[str], bytes], *, with_training_state: bool = False) -> Checkpoint:
    """`read(name)` returns that file's bytes. Raises CheckpointError naming the first thing that is wrong."""
    record = _read_record(read)
    config = _read_config(record)
    weights = _read_tensors(read, record, WEIGHTS)
    _check_tensors(weights, config, record.get("has_decoder", True))
    found = tokenizer_id(weights, config, record["image_spec"])
    if found != record["tokenizer_id"]:
        raise CheckpointError(f"{RECORD} says tokenizer_id {record['tokenizer_id']}; its weights give {found}")
    return Checkpoint(
        weights=weights,
        dvae_config=config,
        image_spec=record["image_spec"],
        step=record["step"],
        tokenizer_id=found,
        extra=record["extra"],
        training_state=_read_tensors(read, record, TRAINING) if with_training_state else None,
    )


def _read_record(read: Callable[[str], bytes]) -> dict[str, Any]:
    data = _read(read, RECORD)
    try:
        record = json.loads(data)
    except ValueError as error:
        raise CheckpointError(f"{RECORD} is not JSON ({error}): not a checkpoint, or cut short") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CheckpointError(f"{RECORD} lacks format {FORMAT!r}: this is not a checkpoint of dvae")
    if record.get("format_version") != FORMAT_VERSION:
        version = record.get("format_version")
        raise CheckpointError(f"{RECORD} has format_version {version!r}; this dvae reads {FORMAT_VERSION}")
    stated = record.pop("record_sha256", None)
    if stated != _sha256(_canonical(record)):
        raise CheckpointError(f"{RECORD} was changed after it was written: its record_sha256 does not match")
    for name, kind in RECORD_FIELDS.items():
        if not isinstance(record.get(name), kind):
            raise CheckpointError(f"{RECORD} has {name} {record.get(name)!r}; it must be a {kind.__name__}")
    for name, each in record["files"].items():
        if not isinstance(each, dict) or not {"bytes", "sha256"} <= each.keys():
            raise CheckpointError(f"{RECORD} does not say how many bytes {name} has, and their sha256")
    return record


def _read_config(record: dict[str, Any]) -> ArchitectureConfig:
    try:
        return model_config(record["model"])
    except ModelError as error:
        raise CheckpointError(f"{RECORD}: {error}") from error


def _read_tensors(read: Callable[[str], bytes], record: dict[str, Any], name: str) -> dict[str, Tensor]:
    if name not in record["files"]:
        raise CheckpointError(f"the checkpoint has no {name}: it was published for tokenising, not to resume")
    data, expected = _read(read, name), record["files"][name]
    if len(data) != expected["bytes"]:
        raise CheckpointError(f"{name} has {len(data)} bytes; {RECORD} says {expected['bytes']}")
    if _sha256(data) != expected["sha256"]:
        raise CheckpointError(f"{name} is not the file that was published: its sha256 differs from {RECORD}'s")
    try:
        tensors: dict[str, Tensor] = load(data)
    except SafetensorError as error:
        raise CheckpointError(f"{name} is not a safetensors file: {error}") from error
    return tensors


def _read(read: Callable[[str], bytes], name: str) -> bytes:
    try:
        return read(name)
    except FileNotFoundError as error:
        raise CheckpointError(f"{name} is missing: not a checkpoint, or one that was never finished") from error


def _is_decoders(name: str) -> bool:
    return name.startswith("decoder.")


def _check_tensors(weights: dict[str, Tensor], config: ArchitectureConfig, has_decoder: bool) -> None:
    """The weights are exactly this architecture's: names, shapes and fp32."""
    expected = _expected(config)
    if not has_decoder:
        expected = {name: each for name, each in expected.items() if not _is_decoders(name)}
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights:
            raise CheckpointError(f"{WEIGHTS} lacks the tensor {name!r}")
        if name not in expected:
            raise CheckpointError(f"{WEIGHTS} has the tensor {name!r}, which this architecture lacks")
        found, wanted = weights[name], expected[name]
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise CheckpointError(
                f"{WEIGHTS}: {name!r} is {found.dtype} {tuple(found.shape)}; "
                f"this architecture needs {wanted.dtype} {tuple(wanted.shape)}"
            )


def _expected(config: ArchitectureConfig) -> dict[str, Tensor]:
    """Without memory behind them."""
    try:
        with torch.device("meta"):
            return build(config).state_dict()
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{RECORD} describes a model that no memory could hold: {config}") from error


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
