"""Which side of a run is starved, from where its workers' time went: one line, and what would help. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.stage_times import StageTimes

ENOUGH_S = 5.0  # of open shards; before that the start is all that was seen
BUSY = 0.85  # of the time: the encoder has hardly anything to wait for
_WAITS = {"pixels_s": "pixels", "read_s": "bytes from the store", "write_s": "parts to be written"}


def in_short(times: StageTimes) -> str:
    """For the line of progress; "" while too little was seen."""
    if times.open_s < ENOUGH_S:
        return ""
    what = _awaited(times)
    return f"encoder busy {times.encoder_busy:.0%}" + (f", waits for {what}" if what else "")


def in_full(times: StageTimes, *, on_gpu: bool, in_tasks: bool) -> str:
    """For the end of a run; "" where too little was seen."""
    if times.open_s < ENOUGH_S:
        return ""
    what, busy = _awaited(times), f"encoder busy {times.encoder_busy:.0%}"
    if what is None:
        return f"{busy}: the encoder sets the pace"
    return f"{busy}: it waits for {what}; {_help(on_gpu=on_gpu, in_tasks=in_tasks)[what]}"


def _awaited(times: StageTimes) -> str | None:
    """What shards spend the most of their time on beside encoding; None where the encoder has all it can do."""
    if times.encoder_busy >= BUSY:
        return None
    return _WAITS[max(_WAITS, key=lambda name: float(getattr(times, name)))]


def _help(*, on_gpu: bool, in_tasks: bool) -> Mapping[str, str]:
    if in_tasks:
        pixels = "more CPUs for decode tasks (nodes, ray.shards_in_flight, ray.decode_threads) would help"
    elif on_gpu:
        pixels = "more decoding CPUs (ray.decode_threads; ray.decode=tasks for those of other machines) would help"
    else:
        pixels = "the CPUs that encode also decode: more of them would help"
    more_shards = "more shards at once (ray.shards_in_flight) would help"
    return {_WAITS["pixels_s"]: pixels, _WAITS["read_s"]: more_shards, _WAITS["write_s"]: more_shards}
