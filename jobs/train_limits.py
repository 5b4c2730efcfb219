"""What ends a training run before its last step: too much bad data, too many steps without a finite loss.

All ranks decide alike, from figures that all of them have.
"""

from __future__ import annotations

from jobs.train_config import TrainConfig
from pipeline import storage
from pipeline.errors import PipelineError
from pipeline.records import ObjectInfo
from pipeline.training_order import StreamCursor

MIN_SAMPLES_JUDGED = 100  # before the share of bad ones says anything


class TooMuchBadData(PipelineError):
    """More bad images or damaged shards than the run allows."""

    exit_code = 1


class Diverged(PipelineError):
    """Step after step without a finite loss and gradient."""

    exit_code = 1


class TooLittleMemory(PipelineError):
    """A step does not fit into the GPU; another attempt would not either."""

    exit_code = 1


def too_little_memory(error: BaseException) -> TooLittleMemory:
    return TooLittleMemory(
        "a step does not fit into the GPU's memory: lower micro_batch_size (the global batch stays as it is), or set "
        f"checkpoint_activations=true or precision=bf16 ({str(error).partition(chr(10))[0]})"
    )


def counts(cursors: tuple[StreamCursor, ...]) -> dict[str, int]:
    """Since step 0, over all streams."""
    return {
        "num_images": sum(cursor.num_used for cursor in cursors),
        "num_bad_images": sum(cursor.num_bad for cursor in cursors),
        "num_failed_shards": len({place for cursor in cursors for place in cursor.failed_shards}),
    }


def judge_data(config: TrainConfig, shards: tuple[ObjectInfo, ...], cursors: tuple[StreamCursor, ...]) -> None:
    """Raises TooMuchBadData."""
    data, counted = config.data, counts(cursors)
    bad, failed = counted["num_bad_images"], counted["num_failed_shards"]
    seen = counted["num_images"] + bad
    if seen >= MIN_SAMPLES_JUDGED and bad > data.max_failed_samples * seen:
        raise TooMuchBadData(
            f"{bad} of {seen} training images are bad, over the limit data.max_failed_samples="
            f"{data.max_failed_samples:g}; the workers' logs name the first ones"
        )
    if failed > data.max_failed_shards:
        places = sorted({place for cursor in cursors for place in cursor.failed_shards})
        names = ", ".join(storage.public_url(shards[place].url) for place in places[:3])
        raise TooMuchBadData(
            f"{failed} training shards are damaged ({names}{', …' if failed > 3 else ''}), over the limit "
            f"data.max_failed_shards={data.max_failed_shards}; repair them, or raise the limit to go on without them"
        )


def judge_skips(config: TrainConfig, step: int, skipped_in_a_row: int) -> None:
    """`step`: how many are done. Raises Diverged."""
    if skipped_in_a_row < config.max_skipped_steps:
        return
    raise Diverged(
        f"the last {skipped_in_a_row} of {step} steps had a NaN or Inf in the loss or its gradients and were skipped, "
        f"the limit max_skipped_steps={config.max_skipped_steps}. Going on from the newest checkpoint meets the same "
        "steps again: unless a machine was at fault, train anew into another output with a lower optim.lr, a longer "
        "schedule.lr.warmup, a smaller optim.grad_clip or precision=fp32"
    )
