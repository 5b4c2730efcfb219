"""Metrics -> TensorBoard event files, as bytes. One immutable file for each publication, so that any store serves
(TensorBoard reads the files of a folder in name order) and a resumed run leaves no figure double."""

from __future__ import annotations

import importlib.util
import io
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.errors import PipelineError


class TensorBoardMissing(PipelineError):
    """Event files were asked for, and the package that writes them isn't there."""


def wants_events(setting: bool | None) -> bool:
    """`log.tensorboard`: true, false, or null for "where it is installed"."""
    installed = importlib.util.find_spec("tensorboard") is not None
    if setting and not installed:
        raise TensorBoardMissing(
            "log.tensorboard is true, but tensorboard is not installed: pip install 'dvae-ray[tensorboard]', "
            "or set log.tensorboard=false"
        )
    return installed if setting is None else setting


def event_file(lines: Sequence[Mapping[str, Any]], png: bytes | None = None) -> bytes:
    """The scalars of some lines of metrics.jsonl (at least one), and a picture that goes with the last."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    events = [Event(wall_time=lines[0]["unix_s"], file_version="brain.Event:2")]
    for line in lines:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in _scalars(line)]
        events.append(Event(wall_time=line["unix_s"], step=line["step"], summary=Summary(value=values)))
    if png is not None:
        width, height = struct.unpack(">II", png[16:24])  # of the header chunk, which comes first
        image = Summary.Image(encoded_image_string=png, height=height, width=width, colorspace=3)
        events[-1].summary.value.append(Summary.Value(tag="reconstructions", image=image))
    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    for event in events:
        writer.write(event.SerializeToString())
    return buffer.getvalue()


def _scalars(line: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    for name, value in line.items():
        if name not in ("kind", "step", "unix_s") and value is not None:
            yield f"{line['kind']}/{name}", float(value)
