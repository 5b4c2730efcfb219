"""Weights & Biases as a tracker. The API key is its client's business (WANDB_API_KEY, or `wandb login`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import wandb

from jobs.train_config import WandbConfig
from jobs.train_tensorboard import scalars
from jobs.train_trackers import Line, RunFacts, newer
from pipeline.pictures import decode_png


class WandbTracker:
    """One run there for one output here; a resumed run goes on in it."""

    def __init__(self, config: WandbConfig, facts: RunFacts) -> None:
        Path(facts.folder).mkdir(parents=True, exist_ok=True)
        wandb.setup(settings=wandb.Settings(silent=True))  # else it asks for a key, where there is a terminal
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=config.name or facts.name,
            mode=config.mode,
            id=facts.run_id,
            resume="allow",
            dir=facts.folder,
            config=dict(facts.settings),
            # Neither the command line (which may name URLs with credentials), nor code, nor the machine.
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, disable_code=True, x_disable_meta=True,
                x_disable_stats=True,
            ),
        )  # fmt: skip
        self._sent = self._run.starting_step - 1

    def send(self, lines: Sequence[Line], pictures: Mapping[str, bytes]) -> None:
        new = newer(lines, self._sent)
        by_step: dict[int, dict[str, object]] = {}
        for line in new:
            by_step.setdefault(line["step"], {}).update(scalars(line))
        if new and pictures:
            by_step[new[-1]["step"]] |= {name: wandb.Image(decode_png(png)) for name, png in pictures.items()}
        for step, figures in sorted(by_step.items()):
            self._run.log(figures, step=step)
            self._sent = step

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0)
