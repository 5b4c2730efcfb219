"""The training loop, as each worker runs it: in this process, or as one of many under Ray Train.

Driven by steps, never by the end of a shard list, so unequal shards or fewer shards than workers cannot block.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal, Protocol

from jobs.checkpoints import RECORD
from jobs.model_card import CARD, card_of_training
from jobs.train_config import TrainConfig
from jobs.train_evaluation import Evaluation
from jobs.train_limits import counts, judge_data, judge_skips, too_little_memory
from jobs.train_metrics import Journal, Window
from jobs.train_output import TrainOutput
from jobs.train_progress import Status, Wish, strongest
from jobs.train_ranks import OutOfMemory, Ranks
from jobs.train_state import Progress, Snapshot, checkpoint_of, merged, model_of, new_trainer, public_settings, resume
from jobs.train_trackers import open_trackers, run_facts
from jobs.train_uploads import Uploads
from pipeline import storage
from pipeline.errors import PipelineError, RunHeld
from pipeline.records import ObjectInfo
from pipeline.training_order import StreamCursor, StreamOptions
from pipeline.training_samples import TrainingSamples

log = logging.getLogger(__name__)
Ending = Literal["finished", "stopped", "left"]  # left: to go on elsewhere
ENDS: tuple[Wish, ...] = ("leave", "stop")
BEAT_S = 1.0


@dataclass(frozen=True)
class TrainJob:
    """What every worker is given; the shard lists are expanded once, by the driver."""

    config: TrainConfig
    train_shards: tuple[ObjectInfo, ...]
    val_shards: tuple[ObjectInfo, ...]


class Driver(Protocol):
    def report(self, status: Status) -> Wish:
        """From rank 0."""

    def must_leave(self) -> bool:
        """Whether this worker's machine is about to go; asked on every rank."""


def train(job: TrainJob, ranks: Ranks, driver: Driver) -> Ending:
    """From the newest checkpoint (or the start) to the last step, or until the workers are to stop or to leave."""
    config = job.config
    with TrainingRun(job, ranks, driver) as run:
        wish = run.heartbeat()
        while run.step < config.steps and wish not in ENDS:
            run.update()
            if run.is_due(config.log.every_steps):
                run.log()
            if run.is_due(config.eval.every_steps):
                run.evaluate()
            wish = run.heartbeat()
            if run.is_due(config.checkpoint.every_steps) or wish != "go on":
                run.save()
        return run.finish(wish)


class TrainingRun:
    """One worker's part of the run. All ranks call the same methods at the same steps."""

    def __init__(self, job: TrainJob, ranks: Ranks, driver: Driver) -> None:
        config = job.config
        self._job, self._config, self._ranks, self._driver = job, config, ranks, driver
        self._output = TrainOutput(storage.normalize(config.output))
        self._evaluation = Evaluation(config, job.val_shards, ranks) if config.eval.every_steps else None
        self._trainer = new_trainer(config, ranks)
        progress = resume(self._trainer, config, self._output, ranks)
        self._samples = _samples(job, ranks, progress.cursors)
        self._window = Window(progress.rows)
        self._journal = self._new_journal() if ranks.is_first else None
        self._speed, self._line_speed = Speed(self.step), Speed(self.step)
        self._status = Status(step=self.step, num_workers=ranks.world_size)
        self._next_beat = self.step
        self._uploads, self._saved_step = Uploads(), self.step

    def __enter__(self) -> TrainingRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._samples.close()
        if isinstance(
            error, KeyboardInterrupt | RunHeld
        ):  # the second Ctrl-C waits for nothing; the output is another's
            return
        if error is not None:
            self._uploads.wait_beside(error)
        if self._journal is not None:
            if isinstance(error, PipelineError):
                self._journal.publish_beside(error, self.step)
            self._journal.close(finished=error is None and self.step == self._config.steps)

    def _new_journal(self) -> Journal:
        config, output = self._config, self._output
        trackers = open_trackers(config.log, lambda: run_facts(output.url, output.run_id(), public_settings(config)))
        return Journal(output, self.step, events=config.log.tensorboard, trackers=trackers)

    @property
    def step(self) -> int:
        return self._trainer.step

    def is_due(self, every_steps: int) -> bool:
        """Every so many steps and at the last one; never for 0."""
        return bool(every_steps) and (self.step % every_steps == 0 or self.step == self._config.steps)

    def update(self) -> None:
        """One step. Raises Diverged, on all ranks alike, and TooLittleMemory."""
        batch = self._samples.next_batch()
        try:
            self._window.add(self._trainer.train_step(batch.pixels_BHWC, batch.slots_B))
        except OutOfMemory as error:
            raise too_little_memory(error) from error
        judge_skips(self._config, self.step, self._trainer.skipped_in_a_row)

    def log(self) -> None:
        """One training line. Raises TooMuchBadData, on all ranks alike."""
        cursors = self._all_cursors()
        figures, counted = self._window.close(), counts(cursors)
        figures |= {"skipped_steps": self._trainer.skipped_steps, **self._trainer.take_code_use()}
        figures |= counted
        if self._journal is not None:
            images_per_s = round(self._line_speed.lap(self.step) * self._config.batch_size, 1)
            self._journal.add("train", self.step, {**figures, "images_per_s": images_per_s})
        self._status = replace(
            self._status, loss=figures["loss"], num_bad_images=counted["num_bad_images"], figures=figures
        )
        judge_data(self._config, self._job.train_shards, cursors)

    def evaluate(self) -> None:
        assert self._evaluation is not None
        evaluated = self._evaluation.evaluate(self._trainer)
        soft, hard = evaluated.figures["psnr_soft"], evaluated.figures["psnr_hard"]
        self._status = replace(self._status, psnr_soft=soft, psnr_hard=hard)
        if self._journal is not None:
            self._journal.add("eval", self.step, evaluated.figures)
            config = self._config
            news = self._journal.judge(config.schedule, config.steps, config.model.codebook_size)
            told = [f"step {self.step:,}: {words}" for words in news]
            self._status = replace(self._status, warnings=(*self._status.warnings, *told))
            self._journal.publish(self.step, self._evaluation.pictures(self._trainer, evaluated.histogram_K))

    def heartbeat(self) -> Wish:
        """About once a second: tell the driver, and agree on what is wished and on the step of the next beat."""
        if self.step < self._next_beat:
            return "go on"
        said = self._ranks.gather(self._beat())
        self._next_beat = said[0][1]
        return strongest(wish for wish, _ in said)

    def save(self) -> None:
        """A checkpoint to go on from; before it the metrics up to here, so that no line is lost. The state is copied
        now, and published beside the steps that follow. Raises what the checkpoint before could not be saved for."""
        progress = Progress(self._all_cursors(), self._window.rows())
        self._trainer.gather_code_counts()
        if self._journal is not None:
            self._uploads.wait()
            self._journal.publish(self.step)
            checkpoint = checkpoint_of(self._trainer, self._config, self._ranks, progress)
            self._uploads.start(lambda: self._publish(checkpoint))

    def finish(self, wish: Wish) -> Ending:
        """Wait for the last checkpoint, and tell the driver; publish the finished model, if this is the end."""
        self._uploads.wait()
        self._beat()
        if self.step < self._config.steps:
            return "left" if wish == "leave" else "stopped"
        if self._journal is not None:
            files = model_of(self._trainer, self._config, self._ranks).files()
            self._output.save_model({**_card(files, self._journal), **files})
        return "finished"

    def _publish(self, checkpoint: Snapshot) -> None:
        """On the uploads' thread."""
        self._output.save_checkpoint(checkpoint.step, checkpoint.files(), self._config.checkpoint.keep_last)
        self._saved_step = checkpoint.step

    def _beat(self) -> tuple[Wish, int]:
        own: Wish = "leave" if self._driver.must_leave() else "go on"
        if not self._ranks.is_first:
            return own, 0
        self._uploads.check()
        steps_per_s = self._speed.lap(self.step)
        images_per_s = steps_per_s * self._config.batch_size
        self._status = replace(self._status, step=self.step, images_per_s=images_per_s, saved_step=self._saved_step)
        wish = strongest((own, self._driver.report(self._status)))
        return wish, self.step + max(1, int(steps_per_s * BEAT_S))

    def _all_cursors(self) -> tuple[StreamCursor, ...]:
        return merged(self._ranks.gather(self._samples.cursors()))


def _card(files: Mapping[str, bytes], journal: Journal) -> dict[str, bytes]:
    """A model is no worse for lacking one."""
    try:
        return {CARD: card_of_training(json.loads(files[RECORD]), journal.lines)}
    except Exception:
        log.exception("no model card could be made of metrics.jsonl; `dvae eval --card` makes one")
        return {}


class Speed:
    """Steps a second since the last lap."""

    def __init__(self, step: int) -> None:
        self._step, self._at_s = step, time.monotonic()

    def lap(self, step: int) -> float:
        now_s = time.monotonic()
        steps_per_s = (step - self._step) / max(now_s - self._at_s, 1e-9)
        self._step, self._at_s = step, now_s
        return steps_per_s


def _samples(job: TrainJob, ranks: Ranks, cursors: tuple[StreamCursor, ...]) -> TrainingSamples:
    config, data = job.config, job.config.data
    options = StreamOptions(
        image_spec=config.image,
        seed=config.seed,
        batch_size=config.batch_size,
        num_streams=data.num_streams,
        shuffle_shards=data.shuffle_shards,
        augment=data.augment,
    )
    return TrainingSamples(
        job.train_shards,
        options,
        rank=ranks.rank,
        world_size=ranks.world_size,
        cursors=cursors,
        decode_threads=data.decode_threads,
        prefetch_batches=data.prefetch_batches,
    )
