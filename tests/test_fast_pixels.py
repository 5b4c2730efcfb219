"""The fast libraries give Pillow's pixels, byte for byte, or leave the image to it: with them or without, every image
has the same pixels or the same reason for having none."""

from __future__ import annotations

import importlib.util
import io
import logging
import math
import random
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fuzz_images import damaged_image, good_images
from make_data import encoded, pixels
from pipeline import fast_resize, images, jpeg, turbo_jpeg
from pipeline.images import ImageSpec, SampleError, decode_image, training_crop

pytest.importorskip("simplejpeg")
pytest.importorskip("numba")
import simplejpeg

from pipeline import resize_kernels

END = b"\xff\xd9"
Outcome = tuple[bytes | str, int | str, int]


def outcome(data: bytes, spec: ImageSpec, decode: Callable[..., Any] = decode_image) -> Outcome:
    try:
        decoded = decode(data, spec)
    except SampleError as error:
        return error.reason.value, error.message, 0
    assert decoded.pixels_HWC.shape == (spec.size, spec.size, 3) and decoded.pixels_HWC.flags.c_contiguous
    return decoded.pixels_HWC.tobytes(), decoded.width, decoded.height


def is_fast(data: bytes, spec: ImageSpec) -> bool:
    """Asserts that the outcome is Pillow's, and says whether the fast libraries had a part in it."""
    assert outcome(data, spec) == outcome(data, spec, images._decoded_by_pillow)
    return images._decoded_fast(data, spec) is not None


def textured(seed: int, width: int, height: int) -> Image.Image:
    """Smooth and rough in one, so that blocks have few coefficients and many."""
    rng = np.random.default_rng(seed)
    rough = rng.normal(0, 25, (height, width, 3)) * (np.arange(width) > width / 2)[None, :, None]
    return Image.fromarray(np.clip(pixels(seed, width, height) + rough, 0, 255).astype(np.uint8))


def any_jpeg(rng: random.Random, most: int = 200) -> bytes:
    width, height = (rng.choice([rng.randint(1, 40), rng.randint(1, most)]) for _ in range(2))
    image = textured(rng.randrange(1000), width, height)
    if rng.random() < 0.2:
        return bytes(simplejpeg.encode_jpeg(np.array(image), rng.randint(5, 100), "RGB", rng.choice(["440", "411"])))
    options: dict[str, Any] = {"quality": rng.randint(1, 100), "subsampling": rng.choice([0, 1, 2])}
    if rng.random() < 0.3:
        options["progressive"] = True
    if rng.random() < 0.3:
        options["restart_marker_blocks"] = rng.randint(1, 9)
    if rng.random() < 0.2:
        options["optimize"] = True
    if rng.random() < 0.3:
        exif = Image.Exif()
        exif[0x0112] = rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 60000])
        options["exif"] = exif
    if rng.random() < 0.2:
        options |= {"icc_profile": rng.randbytes(500), "comment": b"a comment", "dpi": (72, 72)}
    return encoded(image.convert("L") if rng.random() < 0.2 else image, "JPEG", **options)


def any_spec(rng: random.Random) -> ImageSpec:
    return ImageSpec(size=rng.choice([8, 16, 33, 64, 128]), small=rng.choice(["refuse", "upscale", "upscale"]))


def test_they_are_used_here() -> None:
    assert turbo_jpeg.usable() and fast_resize.usable()
    assert is_fast(encoded(textured(1, 400, 300), "JPEG"), ImageSpec(size=128))


def test_any_jpeg_has_the_pixels_or_the_failure_that_it_has_without_them() -> None:
    rng = random.Random(1)
    fast = sum(is_fast(any_jpeg(rng), any_spec(rng)) for _ in range(400))
    assert fast > 100  # most of the others are too small or too tall


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_cut_at_any_place_has_the_failure_that_it_has_without_them(progressive: bool, mode: str) -> None:
    data, spec = encoded(textured(3, 70, 50).convert(mode), "JPEG", progressive=progressive), ImageSpec(size=16)
    for cut in [*range(2, len(data), 23), *range(len(data) - 40, len(data))]:
        for end in (b"", END, bytes(30)):
            is_fast(data[:cut] + end, spec)


def test_a_damaged_jpeg_has_the_outcome_that_it_has_without_them() -> None:
    rng, spec = random.Random(2), ImageSpec(size=16, small="upscale")
    fast = 0
    for _ in range(1500):
        data = bytearray(any_jpeg(rng, 60))
        for _ in range(rng.choice([1, 1, 1, 3])):
            place = rng.randrange(2, rng.choice([len(data), min(len(data), 700)]))
            if rng.random() < 0.8:
                data[place] ^= 1 << rng.randrange(8)
            else:
                data[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        fast += is_fast(bytes(data), spec)
    assert fast > 100


def test_what_the_fuzzer_makes_has_the_outcome_that_it_has_without_them() -> None:
    rng, spec = random.Random(3), ImageSpec(size=16)
    for _, data in good_images():
        is_fast(data, spec)
    for _ in range(600):
        is_fast(damaged_image(rng)[1], spec)


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def with_segments(data: bytes, *segments: bytes) -> bytes:
    return data[:2] + b"".join(segments) + data[2:]


def mpo() -> bytes:
    out = io.BytesIO()
    textured(1, 64, 48).save(out, "MPO", save_all=True, append_images=[textured(2, 64, 48)])
    return out.getvalue()


def adobe(transform: int) -> bytes:
    return segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform]))


def with_ids(data: bytes, ids: bytes) -> bytes:
    """The components of its frame and its scan named anew."""
    changed, frame, scan = bytearray(data), data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    changed[frame + 10 : frame + 19 : 3] = ids
    changed[scan + 5 : scan + 11 : 2] = ids
    return bytes(changed)


def without_jfif(data: bytes) -> bytes:
    return data[:2] + data[20:]


def test_colours_that_may_be_read_in_two_ways_are_left_to_pillow() -> None:
    data, spec = encoded(textured(4, 64, 48), "JPEG"), ImageSpec(size=16)
    bare = without_jfif(data)
    assert is_fast(with_segments(data, adobe(1)), spec) and is_fast(bare, spec)
    left_to_pillow = {
        "RGB by Adobe's word": with_segments(bare, adobe(0)),
        "YCCK by Adobe's word": with_segments(bare, adobe(2)),
        "RGB by its names": with_ids(bare, b"RGB"),
        "other names": with_ids(data, bytes([0, 1, 2])),
        "CMYK": encoded(textured(5, 64, 48).convert("CMYK"), "JPEG"),
        "several pictures": mpo(),
        "fill bytes": data[:2] + b"\xff" + data[2:],
        "a short JFIF header": with_segments(bare, segment(0xE0, b"JFIF\0\1")),
        "a segment behind its own end": with_segments(data, b"\xff\xfe\xff\xff"),
        "a second frame": with_segments(data, data[data.index(b"\xff\xc0") :][:19]),
    }
    for name, one in left_to_pillow.items():
        assert not is_fast(one, spec), name


def test_what_follows_the_picture_counts_for_nothing() -> None:
    data, spec = encoded(textured(6, 64, 48), "JPEG"), ImageSpec(size=16)
    for behind in (b"", b"\0", b"junk", END, data, data[:50]):
        assert is_fast(data + behind, spec)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_scan_of_one_component_or_a_missing_one_is_left_to_pillow(progressive: bool) -> None:
    data, spec = encoded(textured(7, 64, 48), "JPEG", progressive=progressive), ImageSpec(size=16)
    scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    for at in scans:
        assert not is_fast(data[:at] + END, spec)
    damaged = bytearray(data)
    damaged[scans[0] + 4] = 1
    assert not is_fast(bytes(damaged), spec)


def test_a_bomb_and_a_line_that_would_be_one_are_refused_as_ever() -> None:
    bomb = bytearray(encoded(textured(8, 64, 48), "JPEG"))
    frame = bomb.index(b"\xff\xc0") + 5
    bomb[frame : frame + 4] = struct.pack(">HH", 20_000, 20_000)
    line = encoded(Image.new("RGB", (60_000, 2)), "JPEG")
    for data in (bytes(bomb), line):
        assert not is_fast(data, ImageSpec(size=256, small="upscale"))


def test_orientation_is_applied_and_width_and_height_are_those_that_are_seen() -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for width, height in ((64, 48), (48, 64), (16, 30), (30, 16)):
            data = encoded(textured(9, width, height), "JPEG", exif=exif)
            assert is_fast(data, ImageSpec(size=16))
            decoded = decode_image(data, ImageSpec(size=16))
            assert (decoded.width, decoded.height) == ((height, width) if orientation > 4 else (width, height))


def test_other_filters_and_other_formats_are_left_to_pillow() -> None:
    data = encoded(textured(10, 64, 48), "JPEG")
    assert not is_fast(data, ImageSpec(size=16, resample="bicubic"))
    assert not is_fast(data, ImageSpec(size=16, resample="box"))
    assert not is_fast(encoded(textured(10, 64, 48), "PNG"), ImageSpec(size=16))


def test_training_crops_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data, spec = encoded(textured(11, 200, 150), "JPEG"), ImageSpec(size=64)
    found = [training_crop(data, spec, augment, np.random.default_rng(1)) for augment in ("none", "flip", "dalle")]
    monkeypatch.setattr(images, "_decoded_fast", lambda data, spec: None)
    wanted = [training_crop(data, spec, augment, np.random.default_rng(1)) for augment in ("none", "flip", "dalle")]
    assert all(np.array_equal(*pair) for pair in zip(found, wanted, strict=True))


# The resize alone


def by_pillow(pixels_HWX: np.ndarray, size: int) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(pixels_HWX[..., :3]))
    resized = image.resize(fast_resize.scaled(*image.size, size), Image.Resampling.LANCZOS)
    left, top = (round((side - size) / 2) for side in resized.size)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def sizes() -> Iterator[tuple[int, int, int]]:
    rng = random.Random(4)
    for n in range(20, 60):
        yield from ((n, 31, 16), (31, n, 16), (n, n, 19))
    for _ in range(600):
        size = rng.choice([8, 16, 17, 32, 64, 128, 256])
        short = rng.randint(max(1, size // 3), size * 4)
        long = round(short * rng.choice([1, rng.uniform(1, 1.2), rng.uniform(1, 2.2), rng.uniform(1, 9)]))
        yield (short, long, size) if rng.random() < 0.5 else (long, short, size)


def test_the_resize_gives_pillows_bytes_at_every_size() -> None:
    rng, suiting = np.random.default_rng(5), 0
    noise = rng.integers(0, 256, (2500, 2500, 4), dtype=np.uint8)
    noise[::7, ::3] = 255  # sums beyond 8 bits, both ways
    noise[::5, 1::3] = 0
    for width, height, size in sizes():
        if not fast_resize.suits(width, height, size):
            assert height > 2 * width - 4 or width > 10 * height
            continue
        suiting += 1
        pixels_HWX = np.ascontiguousarray(noise[:height, :width])
        assert np.array_equal(fast_resize.shorter_side_crop(pixels_HWX, size), by_pillow(pixels_HWX, size)), (
            width, height, size,
        )  # fmt: skip
    assert suiting > 450


def test_the_weights_are_pillows_to_the_last_bit() -> None:
    """The same formula in Python, whose floating point is C's."""

    def sinc(x: float) -> float:
        return 1.0 if x == 0.0 else math.sin(x * math.pi) / (x * math.pi)

    def lanczos(x: float) -> float:
        return sinc(x) * sinc(x / 3) if -3.0 <= x < 3.0 else 0.0

    rng = random.Random(6)
    for _ in range(60):
        length, target = rng.randint(1, 900), rng.randint(8, 300)
        first, taps, k = fast_resize._weights(length, target, 0, target)
        scale = length / target
        wide = max(scale, 1.0)
        for n in range(target):
            center = (n + 0.5) * scale
            low, high = max(0, int(center - 3 * wide + 0.5)), min(length, int(center + 3 * wide + 0.5))
            raw = [lanczos((t + low - center + 0.5) * (1.0 / wide)) for t in range(high - low)]
            total = 0.0
            for one in raw:
                total += one
            shares = [one / total * (1 << 22) for one in raw]
            assert (first[n], taps[n]) == (low, high - low)
            assert k[n, : high - low].tolist() == [int(one - 0.5) if one < 0 else int(one + 0.5) for one in shares]
            assert not k[n, high - low :].any()


# Where they cannot be had, or differ


def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (turbo_jpeg, fast_resize):
        monkeypatch.setattr(module, "_agrees", None)


def test_libraries_whose_pixels_differ_are_not_used_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh(monkeypatch)

    def other(data: bytes, colours: str, **options: Any) -> np.ndarray:
        return np.bitwise_xor(simplejpeg.decode_jpeg(data, colours), 1)

    monkeypatch.setattr(turbo_jpeg, "decode_jpeg", other)
    resample = resize_kernels.resample
    monkeypatch.setattr(resize_kernels, "resample", lambda *a: (resample(*a), np.bitwise_xor(a[-1], 1, out=a[-1])))
    data = encoded(textured(12, 64, 48), "JPEG")
    with caplog.at_level(logging.WARNING):
        assert not any(is_fast(data, ImageSpec(size=16)) for _ in range(3))
        assert not turbo_jpeg.usable()
    assert [record.module for record in caplog.records] == ["fast_resize", "turbo_jpeg"]


def test_without_the_libraries_pillow_does_it_all(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (turbo_jpeg, fast_resize):
        fresh(monkeypatch)
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            if module is turbo_jpeg:
                patch.setattr(turbo_jpeg, "decode_jpeg", None)
            else:
                patch.setattr(fast_resize, "_is_there", lambda: False)
            assert not is_fast(encoded(textured(13, 64, 48), "JPEG"), ImageSpec(size=16))
            assert not module.usable()
    assert not caplog.records


class Broken:
    """A library that is installed and cannot be imported."""

    __spec__ = object()

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        raise self._error


@pytest.mark.parametrize("error", [ImportError("Numba needs NumPy 2.2 or less"), OSError("no libllvmlite.so")])
def test_a_numba_that_cannot_be_imported_leaves_it_to_pillow_and_it_is_said_once(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh(monkeypatch)
    monkeypatch.delitem(sys.modules, "pipeline.resize_kernels")
    monkeypatch.setitem(sys.modules, "numba", Broken(error))  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        assert not any(is_fast(encoded(textured(13, 64, 48), "JPEG"), ImageSpec(size=16)) for _ in range(2))
    assert [str(error) in record.getMessage() for record in caplog.records] == [True]


def test_a_numba_that_cannot_compile_leaves_it_to_pillow(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh(monkeypatch)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resize_kernels, "resample", full)
    with caplog.at_level(logging.WARNING):
        assert not is_fast(encoded(textured(13, 64, 48), "JPEG"), ImageSpec(size=16))
    assert "No space left" in caplog.text


def turbo_jpeg_anew() -> ModuleType:
    spec = importlib.util.spec_from_file_location("turbo_jpeg_anew", turbo_jpeg.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_simplejpeg_that_cannot_be_imported_or_is_another_leaves_it_to_pillow_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old = SimpleNamespace(decode_jpeg=lambda data, colours: None, encode_jpeg=lambda *options: {}["440"])
    for library, said in ((Broken(ValueError("numpy.dtype size changed")), "size changed"), (old, "KeyError")):
        monkeypatch.setitem(sys.modules, "simplejpeg", library)  # type: ignore[arg-type]
        caplog.clear()
        module = turbo_jpeg_anew()
        assert not module.usable() and module.pixels(b"", 1, 1) is None
        assert [said in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("progressive", [False, True])
def test_as_much_memory_is_claimed_for_a_jpeg_as_pillow_would_take_its_enlarging_too(
    progressive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, claims = encoded(textured(13, 64, 48), "JPEG", progressive=progressive), list[int]()
    monkeypatch.setattr(images, "DECODING", SimpleNamespace(hold=lambda n: claims.append(n) or nullcontext()))
    for spec in (ImageSpec(size=16), ImageSpec(size=256, small="upscale")):
        assert images._decoded_fast(data, spec) is not None
        assert claims.pop() - len(data) == images._bytes_to_decode(Image.open(io.BytesIO(data)), spec)


def test_a_header_that_is_plain_is_told_from_others() -> None:
    data = encoded(textured(14, 64, 48), "JPEG", progressive=True)
    assert jpeg.plain_header(data) == jpeg.Header(64, 48, is_progressive=True, has_more=False)
    with_more = with_segments(data, segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\0\0"))
    assert jpeg.plain_header(with_more) == jpeg.Header(64, 48, is_progressive=True, has_more=True)
    for cut in range(data.rindex(b"\xff\xda")):
        assert jpeg.plain_header(data[:cut]) is None
