"""The image spec, as it is stored, and what its `shrink` does to JPEGs."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager

import numpy as np
import pytest
from PIL import Image

from make_data import encoded, pixels
from pipeline import fast_resize, images
from pipeline.images import ImageSpec, SampleError, decode_image, training_crop
from pipeline.memory_budget import MemoryBudget
from pipeline.records import FailureReason


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(pixels(seed, width, height))


def reason(data: bytes, spec: ImageSpec) -> FailureReason | None:
    try:
        decode_image(data, spec)
    except SampleError as error:
        return error.reason
    return None


SHRUNK, EXACT = ImageSpec(size=32, shrink="dct"), ImageSpec(size=32)


def test_a_spec_without_shrinking_is_written_and_read_as_those_from_before_it_came() -> None:
    assert ImageSpec().to_json() == {"size": 256, "resample": "lanczos", "small": "refuse", "version": 1}
    assert ImageSpec.from_json(ImageSpec().to_json()) == ImageSpec()
    assert SHRUNK.to_json() == {**EXACT.to_json(), "shrink": "dct"}
    assert ImageSpec.from_json(SHRUNK.to_json()) == SHRUNK
    for shrink in ("none", "draft", None, 2):
        with pytest.raises(ValueError, match="shrink"):
            ImageSpec.from_json({**ImageSpec().to_json(), "shrink": shrink})


@pytest.mark.parametrize(("side", "factor"), [(31, 0), (32, 1), (63, 1), (64, 2), (128, 4), (255, 4), (700, 8)])
def test_a_jpeg_is_shrunk_as_far_as_its_shorter_side_stays_large_enough(side: int, factor: int) -> None:
    for size in ((side, side + 9), (side + 9, side)):
        data = encoded(picture(3, *size), "JPEG", quality=95)
        if not factor:
            assert reason(data, SHRUNK) == FailureReason.TOO_SMALL
            continue
        decoded, exact = decode_image(data, SHRUNK), decode_image(data, EXACT)
        image = Image.open(io.BytesIO(data))
        image.draft(None, (size[0] // factor, size[1] // factor))
        assert image.size == tuple(-(-length // factor) for length in size)
        resized = image.resize(fast_resize.scaled(*image.size, 32), Image.Resampling.LANCZOS)
        left, top = (round((length - 32) / 2) for length in resized.size)
        assert np.array_equal(decoded.pixels_HWC, np.asarray(resized.crop((left, top, left + 32, top + 32))))
        assert (decoded.width, decoded.height) == size
        difference = np.abs(decoded.pixels_HWC.astype(int) - exact.pixels_HWC)
        assert (difference.max() == 0) == (factor == 1) and difference.mean() < 8


def test_a_shrunk_jpeg_is_upright_and_its_size_is_that_of_the_original() -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(picture(4, 200, 150), "JPEG", exif=exif)
        shrunk, exact = decode_image(data, SHRUNK), decode_image(data, EXACT)
        assert (shrunk.width, shrunk.height) == (exact.width, exact.height)
        assert np.abs(shrunk.pixels_HWC.astype(int) - exact.pixels_HWC).mean() < 8


def test_only_jpegs_are_shrunk_and_none_for_a_random_crop() -> None:
    for format in ("PNG", "WEBP", "TIFF", "BMP"):
        data = encoded(picture(5, 200, 150), format)
        assert np.array_equal(decode_image(data, SHRUNK).pixels_HWC, decode_image(data, EXACT).pixels_HWC)
    data = encoded(picture(5, 200, 150), "JPEG")
    dalle = [training_crop(data, spec, "dalle", np.random.default_rng(1)) for spec in (SHRUNK, EXACT)]
    assert np.array_equal(*dalle)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_cut_jpeg_has_the_failure_that_it_has_unshrunk(progressive: bool) -> None:
    data = encoded(picture(6, 200, 150), "JPEG", progressive=progressive)
    failed = 0
    for cut in range(300, len(data), 41):
        for end in (b"", b"\xff\xd9"):
            found = [reason(data[:cut] + end, spec) for spec in (SHRUNK, EXACT)]
            assert found[0] == found[1], cut
            failed += found[0] is not None
    assert failed > len(data) // 41


def test_a_shrunk_baseline_jpeg_claims_the_memory_of_what_it_becomes(monkeypatch: pytest.MonkeyPatch) -> None:
    claims: list[int] = []

    class Watched(MemoryBudget):
        def hold(self, num_bytes: int) -> AbstractContextManager[None]:
            claims.append(num_bytes)
            return super().hold(num_bytes)

    monkeypatch.setattr(images, "DECODING", Watched(1 << 30))
    baseline, progressive = (encoded(picture(7, 800, 600), "JPEG", progressive=kind) for kind in (False, True))
    for data, each in ((baseline, 8 // 64), (baseline, 8), (progressive, 12)):
        decode_image(data, SHRUNK if each != 8 else EXACT)
    assert claims[0] < 800 * 600 // 4 < claims[1] and claims[2] >= 12 * 800 * 600
