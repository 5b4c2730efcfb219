"""What a training run leaves under its output URL, and how it is found again. Neither torch nor Ray.

run.json            what this run is; written first. Another model, data or seed in the same output is refused
checkpoints/step-00001000/      to resume from; checkpoint.json comes last and says that the rest is whole
metrics.jsonl       published whole at each evaluation and checkpoint (object stores cannot append)
pictures/step-00001000-*.png    reconstructions (original | soft | hard), codes (how often each is used)
tensorboard/        one events file for each publication of the metrics
trackers.json       by what name Weights & Biases and MLflow know the run, where they are told of it; wandb/ is its own
model/              the finished model, for `dvae tokenize`, with a card; its checkpoint.json is the end of the run
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.checkpoints import RECORD, TRAINED_MODEL
from jobs.train_config import TrainConfig
from pipeline import storage
from pipeline.errors import RunMismatch
from pipeline.output import read_json
from pipeline.records import ObjectInfo

RUN_FORMAT = 1
TRACKERS = "trackers.json"
Line = dict[str, Any]  # of metrics.jsonl
_STEP = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def _step_in(url: str) -> int | None:
    match = _STEP.search(url.rpartition("/")[2])
    return int(match[1]) if match else None


@dataclass(frozen=True)
class TrainOutput:
    """The files of one training run. Only rank 0 and the driver write."""

    url: str

    def file(self, *names: str) -> str:
        return storage.join(self.url, *names)

    def model_folder(self) -> str:
        return self.file(TRAINED_MODEL)

    def checkpoints(self) -> list[str]:
        """The URLs of those with a record, the newest first."""
        found = self._whole_checkpoints()
        return [found[step] for step in sorted(found, reverse=True)]

    def newest_step(self) -> int:
        """Of the checkpoints; 0 where there is none."""
        return max(self._whole_checkpoints(), default=0)

    def save_checkpoint(self, step: int, files: Mapping[str, bytes], keep_last: int) -> None:
        """Publish in the order given, the record last; then remove all before it but the newest `keep_last`, and what
        kills left of others, whole or not."""
        self._publish(self.file("checkpoints", step_name(step)), files)
        kept = sorted(self._whole_checkpoints())[-keep_last:]
        found = (_step_in(info.url.rpartition("/")[0]) for info in storage.list_files(self.file("checkpoints")))
        for old in {each for each in found if each is not None and each < step} - set(kept):
            self._remove_checkpoint(old)

    def save_model(self, files: Mapping[str, bytes]) -> None:
        self._publish(self.model_folder(), files)

    def finished_step(self) -> int | None:
        """How many steps the finished model has; None while there is none."""
        record = read_json(self.file(TRAINED_MODEL, RECORD))
        return None if record is None else int(record["step"])

    def has_begun(self) -> bool:
        """Whether anything is there that a run of other settings could be mixed with."""
        folders = (self.file("checkpoints"), self.model_folder())
        return storage.exists(self.file("metrics.jsonl")) or any(storage.list_files(url) for url in folders)

    def read_metrics(self) -> list[Line]:
        try:
            data = storage.read_bytes(self.file("metrics.jsonl"))
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in data.splitlines()]

    def write_metrics(self, lines: Iterable[Line]) -> None:
        storage.publish(self.file("metrics.jsonl"), b"".join(json.dumps(line).encode() + b"\n" for line in lines))

    def save_picture(self, step: int, name: str, png: bytes) -> None:
        storage.publish(self.file("pictures", f"{step_name(step)}-{name}.png"), png)

    def save_events(self, step: int, events: bytes) -> None:
        storage.publish(self.file("tensorboard", f"events.out.tfevents.{step_name(step)}"), events)

    def run_id(self) -> str:
        """By which trackers know this run again; made the first time it is asked for."""
        stored = read_json(self.file(TRACKERS))
        if stored is None:
            stored = {"run_id": uuid.uuid4().hex}
            storage.publish(self.file(TRACKERS), json.dumps(stored).encode())
        return str(stored["run_id"])

    def forget_after(self, step: int) -> None:
        """Remove what a killed run published after the checkpoint from which it goes on: it comes again."""
        for folder in ("pictures", "tensorboard"):
            for info in storage.list_files(self.file(folder)):
                if (_step_in(info.url) or 0) > step:
                    storage.remove(info.url)

    def _publish(self, folder: str, files: Mapping[str, bytes]) -> None:
        storage.remove(storage.join(folder, RECORD))  # never an old record beside new files
        for name, data in files.items():
            storage.publish(storage.join(folder, name), data)

    def _whole_checkpoints(self) -> dict[int, str]:
        urls = (info.url for info in storage.list_files(self.file("checkpoints")))
        folders = (url.rpartition("/")[0] for url in urls if storage.base_name(url) == RECORD)
        return {step: folder for folder in folders if (step := _step_in(folder)) is not None}

    def _remove_checkpoint(self, step: int) -> None:
        """The record first: what is left of a half removed one is no checkpoint."""
        folder = self.file("checkpoints", step_name(step))
        storage.remove(storage.join(folder, RECORD))
        storage.remove_folder(folder)


def identity(config: TrainConfig, train: list[ObjectInfo], val: list[ObjectInfo]) -> dict[str, Any]:
    """What the weights depend on, by dotted name. (Steps may grow; workers, and what is logged, may change.)"""
    settings = {**config.model_dump(mode="json"), "image": config.image.to_json()}
    kept = ("model", "image", "loss", "optim", "schedule", "seed", "batch_size", "precision")
    order = {name: settings["data"][name] for name in ("num_streams", "shuffle_shards", "augment")}
    shards = {"train_shards": _fingerprint(train), "val_shards": _fingerprint(val)}
    return _flat({**{name: settings[name] for name in kept}, "data": {**order, **shards}})


def claim(output: TrainOutput, mine: dict[str, Any]) -> None:
    """Write run.json. Only for whoever holds the output's lease. Raises RunMismatch."""
    check(output, mine)
    record = {"kind": "train", "format": RUN_FORMAT, "identity": mine}
    if read_json(output.file("run.json")) != record:
        storage.publish(output.file("run.json"), json.dumps(record, indent=2).encode())


def check(output: TrainOutput, mine: dict[str, Any]) -> None:
    """Raises RunMismatch naming the field and both values where the output holds another run. One that was refused
    before it left anything but run.json holds nothing: the remedy may be other settings."""
    stored = read_json(output.file("run.json"))
    if stored is None:
        return
    if stored.get("kind") != "train" or stored.get("format") != RUN_FORMAT:
        raise RunMismatch(f"{output.url} holds a run of another kind, not of `dvae train`; choose another output")
    if not output.has_begun():
        return
    theirs = stored["identity"]
    for name in [*mine, *(name for name in theirs if name not in mine)]:
        if mine.get(name) != theirs.get(name):
            raise RunMismatch(
                f"{output.url} holds another run: {name} is {theirs.get(name)!r} there and {mine.get(name)!r} here; "
                "choose another output, or go back to the settings of that run"
            )


def _fingerprint(shards: list[ObjectInfo]) -> str:
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{storage.public_url(shard.url)} {shard.size_bytes}\n".encode())
    return f"{len(shards)} shards, {sum(s.size_bytes for s in shards)} bytes, sha256 {digest.hexdigest()[:16]}"


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, each in value.items():
        flat |= _flat(each, f"{prefix}{name}.") if isinstance(each, dict) else {prefix + name: each}
    return flat
