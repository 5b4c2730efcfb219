"""A checkpoint is read whole or refused by the name of its first fault; its tokenizer_id is the tokens' own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from model.checkpoint import (
    CheckpointError,
    checkpoint_files,
    read_checkpoint,
    tokenizer_id,
)
from model.config import DVAEConfig, ModelError
from model.dvae import seeded_dvae

CONFIG = DVAEConfig(codebook_size=32, width=8, blocks_per_group=1, decoder_init=8, code_dim=4)
SPEC = {"size": 64, "resample": "lanczos", "version": 1}
STATE = {"trainer.step": torch.tensor(7), "optim.moment": torch.arange(5.0)}


def _weights(config: DVAEConfig = CONFIG) -> dict[str, Tensor]:
    return dict(seeded_dvae(config, 0).state_dict())


def _files(training_state: dict[str, Tensor] | None = STATE, **changes: Any) -> dict[str, bytes]:
    given = {"weights": _weights(), "dvae_config": CONFIG, "image_spec": SPEC, "step": 7, "extra": {"note": "é"}}
    return checkpoint_files(training_state=training_state, **(given | changes))


def test_everything_comes_back_as_it_was_written():
    files = _files()
    checkpoint = read_checkpoint(files.__getitem__, with_training_state=True)
    assert (checkpoint.dvae_config, checkpoint.image_spec, checkpoint.step) == (CONFIG, SPEC, 7)
    assert checkpoint.extra == {"note": "é"}
    assert checkpoint.tokenizer_id == tokenizer_id(_weights(), CONFIG, SPEC)
    assert all(torch.equal(checkpoint.weights[name], each) for name, each in _weights().items())
    assert checkpoint.training_state is not None
    assert all(torch.equal(checkpoint.training_state[name], each) for name, each in STATE.items())


def test_the_record_is_last_so_that_it_implies_the_other_files():
    assert list(_files()) == ["model.safetensors", "training.safetensors", "checkpoint.json"]
    assert list(_files(training_state=None)) == ["model.safetensors", "checkpoint.json"]


def test_the_same_state_gives_the_same_bytes():
    assert _files() == _files()


def test_weights_laid_out_channels_last_are_the_same_checkpoint():
    model = seeded_dvae(CONFIG, 0).to(memory_format=torch.channels_last)
    assert _files(weights=model.state_dict()) == _files()


def test_the_training_state_is_read_only_when_asked_for():
    files = _files()
    del files["training.safetensors"]
    assert read_checkpoint(files.__getitem__).training_state is None
    with pytest.raises(CheckpointError, match=r"no training\.safetensors.*not to resume"):
        read_checkpoint(_files(training_state=None).__getitem__, with_training_state=True)


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "longer", "another file"])
def test_a_damaged_file_is_refused_by_name(name, damage):
    files = _files()
    data = bytearray(files[name])
    if damage == "one bit":
        data[len(data) // 2] ^= 1
    made = {"truncated": data[:-10], "one bit": data, "empty": b"", "longer": data + b"}", "another file": b"GIF89a"}
    files[name] = bytes(made[damage])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        read_checkpoint(files.__getitem__, with_training_state=True)


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "checkpoint.json"])
def test_a_missing_file_is_refused_by_name(name):
    files = _files()

    def read(wanted: str) -> bytes:
        if wanted == name:
            raise FileNotFoundError(wanted)
        return files[wanted]

    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        read_checkpoint(read, with_training_state=True)


@pytest.mark.parametrize("foreign", [b"[1, 2]", b"{}", b'{"format": "other"}', b'"dvae-checkpoint"', b"\x80\x04"])
def test_a_folder_of_something_else_is_not_a_checkpoint(foreign):
    with pytest.raises(CheckpointError, match=r"checkpoint\.json.*not a checkpoint"):
        read_checkpoint({"checkpoint.json": foreign}.__getitem__)


def _rewritten(given: dict[str, bytes], **changes: Any) -> dict[str, bytes]:
    """A record that somebody changed and signed again, as a faulty writer would."""
    record = json.loads(given["checkpoint.json"]) | changes
    del record["record_sha256"]
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    record["record_sha256"] = hashlib.sha256(canonical).hexdigest()
    return given | {"checkpoint.json": json.dumps(record).encode()}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 99}, "format_version 99; this dvae reads 1"),
        ({"model": CONFIG.to_json() | {"width": 10}}, "width 10"),
        ({"model": CONFIG.to_json() | {"depth": 10}}, "unknown field 'depth'"),
        ({"model": CONFIG.to_json() | {"width": 16}}, r"'decoder\.blocks\.group_1\.block_1\.id_path\.b'"),
        ({"model": CONFIG.to_json() | {"blocks_per_group": 2}}, "lacks the tensor"),
        ({"image_spec": SPEC | {"size": 128}}, "tokenizer_id"),
        ({"files": None}, "files"),
        ({"files": {"model.safetensors": None}}, "does not say how many bytes model.safetensors has"),
        ({"model": CONFIG.to_json() | {"blocks_per_group": 10**9}}, "blocks_per_group 1000000000 must be at most 256"),
        ({"model": CONFIG.to_json() | {"width": 1 << 40}}, "a model that no memory could hold"),
        ({"model": CONFIG.to_json() | {"width": 1 << 400}}, "a model that no memory could hold"),
        ({"model": {"architecture": "dalle_pytorch", "num_layers": 10**8}}, "num_layers 100000000 must be at most 16"),
        ({"tokenizer_id": "0" * 32}, "tokenizer_id 0000"),
    ],
)
def test_a_record_that_does_not_fit_its_weights_is_refused(changes, words):
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(_rewritten(_files(), **changes).__getitem__)


def test_weights_that_are_no_safetensors_are_refused_even_if_the_record_vouches_for_them():
    data = b"not tensors at all"
    entry = {"model.safetensors": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    files = _rewritten(_files(training_state=None), files=entry) | {"model.safetensors": data}
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a safetensors file"):
        read_checkpoint(files.__getitem__)


@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "dtype"])
def test_weights_of_another_architecture_are_never_written(fault):
    weights, name = _weights(), "encoder.blocks.input.b"
    if fault == "missing":
        del weights[name]
    else:
        made = {"extra": torch.zeros(1), "shape": torch.zeros(9), "dtype": torch.zeros(8, dtype=torch.float16)}
        weights[name + "x" if fault == "extra" else name] = made[fault]
    with pytest.raises(CheckpointError, match=r"encoder\.blocks\.input\.b"):
        _files(weights=weights)


def test_checkpoint_errors_are_model_errors():
    assert issubclass(CheckpointError, ModelError) and issubclass(ModelError, ValueError)


def _id(config: DVAEConfig = CONFIG, spec: dict[str, Any] = SPEC, change: str | None = None) -> str:
    weights = _weights(config)
    if change is not None:
        weights[change] = weights[change] + 1e-6
    return tokenizer_id(weights, config, spec)


def test_the_tokenizer_id_does_not_change_with_the_decoder():
    wider_decoder = dataclasses.replace(CONFIG, decoder_init=12)
    encoder = {name: each for name, each in _weights().items() if name.startswith("encoder.")}
    assert _id(change="decoder.blocks.output.conv.w") == _id()
    assert tokenizer_id(_weights(wider_decoder) | encoder, wider_decoder, SPEC) == _id()


def test_the_tokenizer_id_changes_with_encoder_codebook_architecture_and_image_spec():
    shared = dataclasses.replace(CONFIG, head="inner_product")
    ids = [
        _id(),
        _id(change="encoder.blocks.input.w"),
        _id(change="encoder.blocks.output.conv.b"),
        _id(spec=SPEC | {"size": 128}),
        _id(spec=SPEC | {"version": 2}),
        _id(shared),
        _id(shared, change="codebook"),
        _id(dataclasses.replace(CONFIG, stem="strided")),
    ]
    assert len(set(ids)) == len(ids)


def test_the_tokenizer_id_depends_on_neither_order_nor_layout_nor_a_trip_through_a_file():
    weights = _weights()
    shuffled = dict(reversed(weights.items()))
    channels_last = {
        name: each.to(memory_format=torch.channels_last) if each.ndim == 4 else each for name, each in weights.items()
    }
    read = read_checkpoint(_files().__getitem__)
    ids = {tokenizer_id(each, CONFIG, SPEC) for each in (weights, shuffled, channels_last, read.weights)}
    assert ids == {_id()}
    assert tokenizer_id(weights, CONFIG, dict(reversed(SPEC.items()))) == _id()


def test_the_tokenizer_id_is_the_same_on_every_machine():
    """Checked in, so that a change of how it is made doesn't pass unseen: it would orphan every stored token."""
    weights = {name: (torch.arange(each.numel()) / 4096).reshape(each.shape) for name, each in _weights().items()}
    assert tokenizer_id(weights, CONFIG, SPEC) == "c7161458ff215995c56dfd774ff33171"
