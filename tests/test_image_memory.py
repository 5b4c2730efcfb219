"""Huge images: what one takes is what its header says, its pixels do not depend on the strips, and they take turns."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fuzz_images import good_images
from make_data import encoded, pixels
from pipeline import images
from pipeline.images import ImageSpec, SampleError, decode_image
from pipeline.memory_budget import MemoryBudget

SPEC = ImageSpec(size=16)
PEAK = """
import io, sys
from PIL import Image
from make_data import peak_bytes
from pipeline.images import ImageSpec, _bytes_to_decode, decode_image
data = open(sys.argv[1], "rb").read()
small = open(sys.argv[2], "rb").read()
decode_image(small, ImageSpec())  # what the first image of a kind loads stays
before = peak_bytes()
decode_image(data, ImageSpec())
print(peak_bytes() - before, _bytes_to_decode(Image.open(io.BytesIO(data)), ImageSpec()) + 2 * len(data))
"""


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


KINDS: list[tuple[str, str, dict[str, Any]]] = [
    ("RGB", "PNG", {}), ("RGBA", "PNG", {}), ("LA", "PNG", {}), ("P", "PNG", {"transparency": 0}), ("I;16", "PNG", {}),
    ("1", "PNG", {}), ("RGB", "JPEG", {}), ("RGB", "JPEG", {"progressive": True, "subsampling": 0}),
    ("RGB", "JPEG", {"exif": exif(6)}), ("CMYK", "JPEG", {}), ("CMYK", "JPEG", {"progressive": True}),
    ("RGB", "WEBP", {}), ("RGBA", "WEBP", {}), ("RGB", "AVIF", {}), ("RGB", "TIFF", {}), ("P", "GIF", {}),
]  # fmt: skip


def blank(mode: str, side: int) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.full((side, side), 1234, np.uint16))
    image = Image.new(mode, (side, side))
    if mode == "P":
        image.putpalette([10, 20, 30, 200, 100, 0])
    return image


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_an_image_takes_is_known_from_its_header_for_every_mode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """25 million pixels each; the count goes with the pixels."""
    here = Path(__file__).parent  # `python -c` looks for modules there
    for mode, format, options in KINDS:
        for name, side in (("large", 5000), ("small", 300)):
            (tmp_path / name).write_bytes(encoded(blank(mode, side), format, **options))
        command = [sys.executable, "-c", PEAK, str(tmp_path / "large"), str(tmp_path / "small")]
        peak, claim = map(
            int, subprocess.run(command, capture_output=True, text=True, check=True, cwd=here).stdout.split()
        )
        with capsys.disabled():
            print(f"\n{mode} {format} {[*options]}: {peak >> 20} MiB, said {claim >> 20} MiB", end="")  # noqa: T201
        assert 50 << 20 < peak <= 1.1 * claim + (16 << 20), (mode, format, options)


def test_the_pixels_do_not_depend_on_the_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    rgba = Image.fromarray(pixels(1, 61, 47)).convert("RGBA")
    rgba.putalpha(Image.fromarray(np.random.default_rng(0).integers(0, 256, (47, 61), dtype=np.uint8)))
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 65536, (47, 61), dtype=np.uint16))
    palette = rgba.convert("RGB").quantize(20)
    made = [
        encoded(rgba, "PNG"), encoded(rgba.convert("LA"), "PNG"), encoded(wide, "PNG"), encoded(wide, "TIFF"),
        encoded(palette, "PNG", transparency=3), encoded(palette, "PNG", transparency=bytes(range(0, 200, 10))),
        encoded(rgba.convert("RGB"), "PNG", transparency=(9, 9, 9)), encoded(rgba, "WEBP"), encoded(rgba, "TIFF"),
        encoded(rgba, "PNG", exif=exif(5)), encoded(palette, "GIF", transparency=4),
        encoded(rgba.convert("L"), "PNG", transparency=90), encoded(rgba.convert("1"), "PNG", transparency=1),
    ]  # fmt: skip
    for data in [*made, *(data for _, data in good_images())]:
        found = []
        for strip in (1 << 20, 1, 61, 150, 61 * 46):
            monkeypatch.setattr(images, "STRIP_PIXELS", strip)
            found.append(decode_image(data, SPEC).pixels_HWC)
        assert all(np.array_equal(one, found[0]) for one in found)


def test_huge_images_are_decoded_one_at_a_time_and_small_ones_beside_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(images, "DECODING", MemoryBudget(60 * 60 * 8 * 3))
    decoded, lock, inside, most = images._decoded, threading.Lock(), list[int](), dict[int, int]()
    two_small = threading.Event()

    def watched(image: Image.Image, data: bytes) -> Image.Image:
        with lock:
            inside.append(image.width)
            for width in {60, 100}:
                most[width] = max(most.get(width, 0), inside.count(width))
            assert inside.count(100) * 100 * 100 + inside.count(60) * 60 * 60 <= 60 * 60 * 3
            if most[60] == 2:
                two_small.set()
        assert two_small.wait(60), "the first small one waits for a second"
        time.sleep(0.01)
        with lock:
            inside.remove(image.width)
        return decoded(image, data)

    monkeypatch.setattr(images, "_decoded", watched)
    small, large = (encoded(Image.new("RGB", (side, side)), "PNG") for side in (60, 100))
    with ThreadPoolExecutor(6) as executor:
        list(executor.map(lambda data: decode_image(data, SPEC), [small] * 8 + [large, small] * 6 + [small] * 8))
    assert most == {60: 2, 100: 1}  # two small ones and their bytes; the third is above it by these


def test_an_image_that_cannot_be_decoded_gives_its_share_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "DECODING", MemoryBudget(1))
    cut = encoded(Image.fromarray(pixels(1, 64, 64)), "PNG")[:-60]
    for _ in range(3):
        with pytest.raises(SampleError):
            decode_image(cut, SPEC)
    assert images.DECODING._free == 1


def test_what_enlarging_takes_is_counted() -> None:
    line = Image.open(io.BytesIO(encoded(Image.new("L", (1, 2000)), "PNG")))
    assert images._bytes_to_decode(line, ImageSpec(small="upscale")) > 256 * 2000 * 256 * 4
    assert images._bytes_to_decode(line, ImageSpec(small="refuse")) == 2000 * 8
