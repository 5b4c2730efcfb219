"""A JPEG that was cut is an error, end marker or not, and a whole one gives the same pixels as without the check."""

from __future__ import annotations

import io
import random
import struct
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

from make_data import encoded
from pipeline.images import ImageSpec, SampleError, open_rgb
from pipeline.jpeg import MAX_SCANS, with_open_end

END = b"\xff\xd9"
SEQUENTIAL: list[dict[str, Any]] = [
    {"quality": 90}, {"quality": 30}, {"quality": 100, "subsampling": 0}, {"quality": 95, "optimize": True},
    {"quality": 90, "restart_marker_rows": 1}, {"quality": 90, "restart_marker_blocks": 3},
]  # fmt: skip
MODES = ("RGB", "L", "CMYK")


def noise(width: int = 200, height: int = 150) -> Image.Image:
    """Enough detail that every block has many bytes."""
    values = np.random.default_rng(5).normal(0, 20, (height, width, 3)).cumsum(1) % 256
    return Image.fromarray(values.astype(np.uint8))


def plain(data: bytes) -> np.ndarray:
    """What Pillow makes of it by itself."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def decoded(data: bytes) -> np.ndarray:
    with open_rgb(data, ImageSpec()) as image:
        return np.array(image)


def outcome(data: bytes) -> np.ndarray | str:
    try:
        return decoded(data)
    except SampleError as error:
        return error.reason.value


def data_start(data: bytes) -> int:
    """Where the last scan's data begin."""
    at = data.rindex(b"\xff\xda")
    return at + 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [*SEQUENTIAL, {"quality": 90, "progressive": True}], ids=str)
def test_a_whole_picture_has_the_pixels_that_pillow_gives_it(options: dict[str, Any], mode: str) -> None:
    for size in ((200, 150), (1, 1), (17, 9)):
        data = encoded(noise(*size).convert(mode), "JPEG", **options)
        for behind in (b"", b"\0", b"junk", END, data, data[:50]):  # cameras put a second picture there
            assert np.array_equal(decoded(data + behind), plain(data)), (size, behind[:4])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", SEQUENTIAL, ids=str)
def test_a_picture_cut_anywhere_is_truncated_even_with_its_end_marker_put_back(
    options: dict[str, Any], mode: str
) -> None:
    data = encoded(noise(112, 72).convert(mode), "JPEG", **options)
    whole, start = plain(data), data_start(data)
    for cut in [*range(20, len(data) - 2, 251), *range(len(data) - 90, len(data) - 2)]:
        found = outcome(data[:cut] + END)
        if isinstance(found, np.ndarray):  # so little is missing that it lies in the last block or two
            found[-16:, -24:] = whole[-16:, -24:]
            assert np.array_equal(found, whole) and cut > len(data) - 400
        else:  # without the header of its frame it is no image that anyone could know
            assert found == "truncated_image" or (found == "not_an_image" and cut < start), cut
        if cut > start:
            assert plain(data[:cut] + END).shape == whole.shape  # Pillow by itself fills up with grey


@pytest.mark.parametrize("mode", MODES)
def test_a_progressive_picture_that_lacks_a_scan_is_truncated_and_never_grey(mode: str) -> None:
    data = encoded(noise().convert(mode), "JPEG", quality=90, progressive=True)
    whole, last = plain(data).astype(int), data_start(data)
    for cut in range(20, len(data) - 2, 151):
        found = outcome(data[:cut] + END)
        if cut < last - 2:
            assert isinstance(found, str) and found in ("truncated_image", "not_an_image"), cut
        elif isinstance(found, np.ndarray):  # the last bit of the finer details is missing in a part of it
            assert np.abs(found - whole).mean() < 8, cut


def test_a_picture_whose_tail_became_zeros_is_truncated() -> None:
    """What a crash leaves of a file whose blocks were never written."""
    for progressive in (False, True):
        data = encoded(noise(), "JPEG", progressive=progressive)
        for cut in range(2, len(data) - 2, 151):
            assert isinstance(outcome(data[:cut] + bytes(len(data) - cut)), str), cut


def test_a_picture_of_many_scans_is_complete_only_with_all_of_its_components() -> None:
    data = encoded(noise(), "JPEG", progressive=True)
    scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    assert with_open_end(data) == data and len(scans) > 5
    for at in scans:
        with pytest.raises(OSError, match="truncated"):
            with_open_end(data[:at] + END)


def test_a_thumbnail_in_the_metadata_is_not_taken_for_the_picture() -> None:
    thumbnail = encoded(noise(16, 16), "JPEG")
    body = b"Exif\0\0" + thumbnail
    segment = b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
    data = encoded(noise(), "JPEG")
    assert np.array_equal(decoded(data[:2] + segment + data[2:]), plain(data))


def test_hostile_markers_end_soon() -> None:
    rng, started = random.Random(3), time.thread_time()
    data = encoded(noise(64, 64), "JPEG")
    heads = [b"\xff" * 100_000, b"\xff\xd8" * 50_000, b"\xff\xc0\0\x02" * 20_000, b"\xff\xda\0\x02" * 20_000]
    heads += [
        b"\xff\xc0\0\x0b\x08\0\x10\0\x10\xff" + b"\xff" * 9,
        b"\xff\xda\0\x08\xff" + bytes(5),
        b"\xff\xfe\xff\xff",
    ]
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 9)):
            damaged[rng.randrange(len(damaged))] = rng.choice([0xFF, 0xDA, 0xC0, 0xC2, 0xD9, rng.randrange(256)])
        outcome(bytes(damaged))
    for head in heads:
        outcome(b"\xff\xd8" + head + data[2:])
        outcome(b"\xff\xd8\xff" + head)
    assert time.thread_time() - started < 20


def test_many_scans_are_refused_as_undecodable_in_no_time() -> None:
    data = encoded(Image.new("RGB", (8, 8)), "JPEG", progressive=True)
    first = data.index(b"\xff\xda")
    scan = b"\xff\xda\0\x08\x01\x01\0\0\0\0" + bytes(10)
    assert with_open_end(data[:first] + scan * (MAX_SCANS - 50) + data[first:])
    started = time.thread_time()
    with pytest.raises(OSError, match="more than 1000 scans"):
        with_open_end(data[:first] + scan * 50_000 + data[first:])
    assert time.thread_time() - started < 0.2
    assert outcome(data[:first] + scan * 50_000 + data[first:]) == "undecodable"


def test_many_scans_under_the_bound_take_time_in_proportion_to_their_bytes() -> None:
    """Not for each scan all that follows it."""
    data = encoded(Image.new("RGB", (8, 8)), "JPEG", progressive=True)
    first = data.index(b"\xff\xda")
    scans = (b"\xff\xda\0\x08\x01\x01\0\0\0\0" + b"\xff\0" * 5000) * (MAX_SCANS - 50)
    started = time.thread_time()
    with_open_end(data[:first] + scans + data[first:])
    assert time.thread_time() - started < 1


@pytest.mark.parametrize("data", [b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff", b"not a jpeg", bytes(100)])
def test_what_is_no_jpeg_comes_back_as_it_is(data: bytes) -> None:
    assert with_open_end(data) == data
