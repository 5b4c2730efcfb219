"""What a training checkpoint holds, and going on from the newest one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.checkpoints import file_reader
from jobs.train_config import TrainConfig
from jobs.train_metrics import Row
from jobs.train_output import TrainOutput
from jobs.train_ranks import Ranks
from model.checkpoint import Checkpoint, CheckpointError, checkpoint_files, read_checkpoint
from model.trainer import Trainer
from pipeline import storage
from pipeline.training_order import StreamCursor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """What, beside the trainer's tensors, must go on where it was."""

    cursors: tuple[StreamCursor, ...]  # of all streams
    rows: tuple[Row, ...] = ()  # of the metrics line begun

    def to_json(self) -> dict[str, Any]:
        return {"cursors": [cursor.to_json() for cursor in self.cursors], "rows": list(self.rows)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Progress:
        return cls(tuple(map(StreamCursor.from_json, value["cursors"])), tuple(value["rows"]))


def new_trainer(config: TrainConfig, ranks: Ranks) -> Trainer:
    return Trainer(
        config.model,
        config.loss,
        config.optim,
        config.schedule,
        seed=config.seed,
        device=ranks.device,
        precision=config.precision,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        compile=config.compile,
        checkpoint_activations=config.checkpoint_activations,
    )


def resume(trainer: Trainer, config: TrainConfig, output: TrainOutput, ranks: Ranks) -> Progress:
    """Load the newest whole checkpoint into the trainer. All ranks take the one that the first one found. Raises
    CheckpointError where there are some, and none is whole."""
    found, checkpoint = _newest_whole(output) if ranks.is_first else (None, None)
    found = ranks.agree(found)
    if found is None:
        return Progress((StreamCursor(),) * config.data.num_streams)
    checkpoint = checkpoint or _read(found)
    assert checkpoint.training_state is not None
    trainer.load_state_tensors(checkpoint.training_state)
    log.info("going on from %s", found)
    return Progress.from_json(checkpoint.extra["progress"])


def _newest_whole(output: TrainOutput) -> tuple[str | None, Checkpoint | None]:
    """Going on from an earlier one costs time, and gives the same bits."""
    found = output.checkpoints()
    for url in found:
        try:
            return url, _read(url)
        except CheckpointError as error:
            log.warning("%s is passed over: %s", url, error)
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints of {output.url} is whole; remove them to begin anew"
        )
    return None, None


def _read(url: str) -> Checkpoint:
    return read_checkpoint(file_reader(url), with_training_state=True)


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint before it is bytes: copies on the CPU, which later steps leave alone."""

    step: int
    weights: dict[str, Any]  # tensors by name, like the state
    state: dict[str, Any] | None
    config: TrainConfig
    extra: dict[str, Any]

    def files(self) -> dict[str, bytes]:
        """In the order in which to publish them. May be made on another thread."""
        return checkpoint_files(
            weights=self.weights,
            dvae_config=self.config.model,
            image_spec=self.config.image.to_json(),
            step=self.step,
            training_state=self.state,
            extra=self.extra,
        )


def checkpoint_of(trainer: Trainer, config: TrainConfig, ranks: Ranks, progress: Progress) -> Snapshot:
    """To go on from."""
    extra = {"progress": progress.to_json(), **_origin(config, ranks)}
    return Snapshot(trainer.step, trainer.averaged_weights(), trainer.state_tensors(), config, extra)


def model_of(trainer: Trainer, config: TrainConfig, ranks: Ranks) -> Snapshot:
    """The finished model alone."""
    return Snapshot(trainer.step, trainer.averaged_weights(), None, config, _origin(config, ranks))


def _origin(config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    """How the weights came to be. The numerics are those of the last attempt."""
    numerics = {"workers": ranks.world_size, "device": ranks.device.type, "threads": config.threads}
    return {"training_config": public_settings(config), "numerics": numerics}


def public_settings(config: TrainConfig) -> dict[str, Any]:
    """Without the credentials of its URLs."""
    settings = config.model_dump(mode="json")
    settings["output"] = storage.public_url(config.output)
    for name in ("train_shards", "val_shards"):
        settings["data"][name] = [storage.public_url(pattern) for pattern in settings["data"][name]]
    if (mlflow := settings["log"]["mlflow"]) and mlflow["tracking_uri"]:
        mlflow["tracking_uri"] = storage.public_url(mlflow["tracking_uri"])
    return settings


def merged(shares: Sequence[dict[int, StreamCursor]]) -> tuple[StreamCursor, ...]:
    """The cursors of all streams out of each rank's."""
    cursors = {number: cursor for share in shares for number, cursor in share.items()}
    return tuple(cursors[number] for number in range(len(cursors)))
