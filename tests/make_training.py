"""A training run small enough for tests: unequal shards, a tiny dVAE, evaluation and checkpoints every few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs.train_config import TrainConfig
from jobs.train_metrics import CLOCK_FIELDS
from make_data import write_shards


def write_training_data(folder: Path) -> None:
    write_shards(folder / "train", (5, 23, 11))
    write_shards(folder / "val", (7,))


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """`changes` are laid over, section by section."""
    plain: dict[str, Any] = {
        "output": str(folder / "out"),
        "steps": 24,
        "batch_size": 8,
        "seed": 5,
        "precision": "fp32",
        "data": {
            "train_shards": str(folder / "train"),
            "val_shards": str(folder / "val"),
            "num_streams": 4,
            "augment": "flip",
            "decode_threads": 2,
        },
        "model": {"codebook_size": 32, "width": 8, "decoder_init": 8, "blocks_per_group": 1, "stem": "strided"},
        "image": {"size": 16, "small": "upscale"},
        "loss": {"likelihood": "l2"},
        "optim": {"lr": 1e-3, "ema_decay": 0.9},
        "schedule": {"temperature": {"end": 0.5, "steps": 20}, "kl_weight": {"end": 1e-3, "steps": 10}},
        "eval": {"every_steps": 9, "num_images": 6, "batch_size": 4, "num_pictures": 2},
        "checkpoint": {"every_steps": 5, "keep_last": 3},
        "log": {"every_steps": 4, "tensorboard": False},
        "ray": {"num_workers": 0, "use_gpu": False, "wait_s": 60},
    }
    for name, value in changes.items():
        plain[name] = {**plain[name], **value} if isinstance(value, dict) else value
    return plain


def config(folder: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(settings(folder, **changes))


def weights(output: Path, step: int) -> tuple[bytes, bytes, bytes]:
    """All that training leaves of its tensors: averaged weights, state to resume from, finished model."""
    checkpoint = output / "checkpoints" / f"step-{step:08d}"
    names = ("model.safetensors", "training.safetensors")
    averaged, state = ((checkpoint / name).read_bytes() for name in names)
    return averaged, state, (output / "model" / "model.safetensors").read_bytes()


def metric_lines(output: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock says."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK_FIELDS} for line in lines]
