"""Metrics -> TensorBoard event files, as bytes. One immutable file for each publication, so that any store serves
(TensorBoard reads the files of a folder in name order) and a resumed run leaves no figure double.

tensorboardX has the format's messages and checksum, and comes with ray[train]; TensorBoard itself is only for looking.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NOT_SCALARS = ("kind", "step", "unix_s")


def event_file(lines: Sequence[Mapping[str, Any]], pictures: Mapping[str, bytes] | None = None) -> bytes:
    """The scalars of some lines of metrics.jsonl (at least one), and PNGs that go with the last, by name."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    events = [Event(wall_time=lines[0]["unix_s"], file_version="brain.Event:2")]
    for line in lines:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(line)]
        events.append(Event(wall_time=line["unix_s"], step=line["step"], summary=Summary(value=values)))
    for tag, png in (pictures or {}).items():
        width, height = struct.unpack(">II", png[16:24])  # of the header chunk, which comes first
        image = Summary.Image(encoded_image_string=png, height=height, width=width, colorspace=3)
        events[-1].summary.value.append(Summary.Value(tag=tag, image=image))
    return b"".join(_record(event.SerializeToString()) for event in events)


def scalars(line: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    """(`kind/name`, value) of each figure of a line of metrics.jsonl."""
    for name, value in line.items():
        if name not in NOT_SCALARS and isinstance(value, int | float):
            yield f"{line['kind']}/{name}", float(value)


def _record(data: bytes) -> bytes:
    """TFRecord: length, its checksum, the data, its checksum; all little-endian."""
    length = struct.pack("<Q", len(data))
    return length + _checksum(length) + data + _checksum(data)


def _checksum(data: bytes) -> bytes:
    from tensorboardX.record_writer import masked_crc32c

    return struct.pack("<I", masked_crc32c(data))
