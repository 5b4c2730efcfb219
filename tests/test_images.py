"""Each line of the policy in images.py, on real files made here."""

from __future__ import annotations

import io
import random
import struct
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFile, ImageOps
from PIL.PngImagePlugin import PngImageFile

from fuzz_images import png_chunk
from make_data import bomb_png, encoded, pixels
from pipeline import png
from pipeline.images import (
    MAX_PIXELS,
    ImageSpec,
    SampleError,
    decode_image,
    open_rgb,
    training_crop,
)
from pipeline.records import FailureReason

pytestmark = pytest.mark.filterwarnings("ignore::Warning:PIL")  # Pillow's remarks on damaged files
ORIENTATION = 0x0112
WHITE = (255, 255, 255)
ANY_SIZE = ImageSpec(size=8, small="upscale")


def picture(seed: int = 0, width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(pixels(seed, width, height))


def rgb(data: bytes) -> np.ndarray:
    """Pixels (H, W, 3) before any resizing."""
    with open_rgb(data, ANY_SIZE) as image:
        return np.array(image)


def reason(data: bytes, spec: ImageSpec = ANY_SIZE) -> FailureReason:
    with pytest.raises(SampleError) as raised:
        decode_image(data, spec)
    assert raised.value.message
    return raised.value.reason


# Size: DALL-E's preprocessing


def dalle_preprocess(image: Image.Image, size: int = 256) -> np.ndarray:
    """github.com/openai/DALL-E, notebooks/usage.ipynb, with torchvision's resize and centre crop written out."""
    shorter = min(image.size)
    ratio = size / shorter
    height, width = (round(ratio * image.size[1]), round(ratio * image.size[0]))
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    top, left = int(round((height - size) / 2.0)), int(round((width - size) / 2.0))  # noqa: RUF046 - as it is there
    return np.asarray(resized.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize(
    ("width", "height"),
    [(256, 256), (257, 256), (256, 257), (258, 259), (300, 401), (401, 300), (512, 512), (333, 777), (1023, 767),
     (256, 1000), (999, 257), (2001, 300), (261, 259)],
)  # fmt: skip
def test_pixels_are_those_of_dalles_preprocessing(width: int, height: int) -> None:
    image = picture(width, width, height)
    decoded = decode_image(encoded(image, "PNG"), ImageSpec())
    assert np.array_equal(decoded.pixels_HWC, dalle_preprocess(image))
    assert (decoded.width, decoded.height) == (width, height)
    assert decoded.pixels_HWC.shape == (256, 256, 3) and decoded.pixels_HWC.dtype == np.uint8


def test_every_aspect_ratio_gives_a_full_square() -> None:
    spec = ImageSpec(size=16)
    for width in range(16, 80, 7):
        for height in range(16, 80, 5):
            image = picture(1, width, height)
            found = decode_image(encoded(image, "BMP"), spec).pixels_HWC
            assert np.array_equal(found, dalle_preprocess(image, 16))


def test_a_shorter_side_under_the_target_is_refused_or_enlarged_as_the_spec_says() -> None:
    small = encoded(picture(0, 300, 255), "PNG")
    assert reason(small, ImageSpec()) == FailureReason.TOO_SMALL
    enlarged = decode_image(small, ImageSpec(small="upscale"))
    assert np.array_equal(enlarged.pixels_HWC, dalle_preprocess(picture(0, 300, 255)))


def test_an_image_of_one_pixel_is_refused_or_one_colour() -> None:
    one = encoded(Image.new("RGB", (1, 1), (10, 20, 30)), "PNG")
    assert reason(one, ImageSpec(size=8)) == FailureReason.TOO_SMALL
    decoded = decode_image(one, ANY_SIZE)
    assert (decoded.pixels_HWC == (10, 20, 30)).all() and (decoded.width, decoded.height) == (1, 1)


def test_other_filters_are_taken_from_the_spec() -> None:
    image = picture(0, 64, 64)
    filters = Image.Resampling
    for name, resample in (("bicubic", filters.BICUBIC), ("bilinear", filters.BILINEAR), ("box", filters.BOX)):
        spec = ImageSpec.from_json({**ImageSpec(size=16).to_json(), "resample": name})
        assert np.array_equal(decode_image(encoded(image, "PNG"), spec).pixels_HWC, image.resize((16, 16), resample))


def test_bilinear_pixels_are_those_of_torchvisions_resize_but_where_it_cuts_off() -> None:
    """T.Resize(size), T.CenterCrop(size) of a PIL image, as DALLE-pytorch's train_vae.py: the longer side is cut off
    to a whole number there, and rounded here."""
    spec, same = ImageSpec(size=32, resample="bilinear", small="upscale"), 0
    for width, height in ((32, 32), (64, 64), (20, 20), (100, 50), (50, 100), (47, 47), (61, 40), (40, 61), (33, 50)):
        image, shorter = picture(3, width, height), min(width, height)
        new = [int(32 * side / shorter) for side in (width, height)]
        left, top = (int(round((side - 32) / 2.0)) for side in new)  # noqa: RUF046 - as it is there
        wanted = image.resize(new, Image.Resampling.BILINEAR).crop((left, top, left + 32, top + 32))
        found = decode_image(encoded(image, "PNG"), spec).pixels_HWC
        rounded = [round(32 / shorter * side) for side in (width, height)]
        assert np.array_equal(found, np.asarray(wanted)) or new != rounded
        same += new == rounded
    assert same == 7


# Orientation

STORED = {  # how a camera stores an upright picture under each EXIF orientation
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2), 6: np.rot90, 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}  # fmt: skip


def stored(upright: np.ndarray, orientation: int, format: str, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    return encoded(image, format, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_exif_orientation_is_applied(orientation: int, format: str, options: dict[str, Any]) -> None:
    upright = pixels(5, 40, 24)
    assert np.array_equal(rgb(stored(upright, orientation, format, **options)), upright)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_a_jpeg_is_applied_as_pillow_does(orientation: int) -> None:
    data = stored(pixels(5, 40, 24), orientation, "JPEG")
    assert np.array_equal(rgb(data), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))
    decoded = decode_image(data, ImageSpec(size=16))
    assert (decoded.width, decoded.height) == (40, 24)  # as it is meant to be seen


def test_orientation_counts_for_other_modes_too() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    deep = Image.fromarray(np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000)
    for image in (deep, picture().convert("P"), picture().convert("LA"), picture().convert("1")):
        assert rgb(encoded(image, "PNG", exif=exif)).shape[:2] == image.size


@pytest.mark.parametrize(
    ("kind", "value"), [(3, b"\0\0\0\0"), (3, b"\x09\0\0\0"), (2, b"6\0\0\0"), (11, b"\0\0\xc0\x40")]
)
def test_an_orientation_that_is_none_leaves_the_picture_as_it_is(kind: int, value: bytes) -> None:
    """Out of range, text, a float: 6 would turn it."""
    entry = struct.pack("<HHI", ORIENTATION, kind, 2 if kind == 2 else 1) + value
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    assert rgb(encoded(picture(), "JPEG", exif=exif)).shape == (48, 64, 3)


def test_damaged_exif_beside_good_pixels_is_as_none() -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 40)
    assert rgb(data).shape == (48, 64, 3)


# Colour


def test_cmyk_jpegs_are_converted_without_profiles() -> None:
    red = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    found = rgb(encoded(red, "JPEG", quality=95))
    assert np.abs(found.astype(int) - (255, 0, 0)).max() <= 4
    with_profile = encoded(picture().convert("CMYK"), "JPEG", icc_profile=b"no profile that anyone could read")
    assert np.array_equal(rgb(with_profile), Image.open(io.BytesIO(with_profile)).convert("RGB"))


def test_a_cmyk_jpeg_means_the_same_stored_as_ycck_or_without_adobes_marker() -> None:
    data = encoded(picture().convert("CMYK"), "JPEG", quality=100, subsampling=0)
    marker = data.index(b"\xff\xee\x00\x0eAdobe")
    assert np.array_equal(rgb(data[:marker] + data[marker + 16 :]), rgb(data))  # Adobe's convention is assumed
    ycck = bytearray(data)
    ycck[marker + 15] = 2  # the same four values read as Y Cb Cr K
    raw = 255.0 - np.asarray(Image.open(io.BytesIO(data)))  # Adobe stores them inverted
    y, cb, cr, k = raw[..., 0], raw[..., 1] - 128, raw[..., 2] - 128, raw[..., 3]
    colours = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=2)  # T.871
    expected = (255 - np.clip(colours, 0, 255)) * (k / 255)[..., None]  # libjpeg inverts to C M Y, Pillow again
    assert np.abs(rgb(bytes(ycck)) - expected).max() <= 3


def test_ycbcr_and_lab_are_converted() -> None:
    for mode in ("YCbCr", "LAB"):
        image = Image.new(mode, (16, 16), (200, 128, 128))
        found = rgb(encoded(image, "TIFF"))
        assert np.ptp(found[0, 0].astype(int)) <= 60 and found.shape == (16, 16, 3)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_and_one_bit_become_equal_channels(mode: str) -> None:
    image = picture().convert(mode)
    found = rgb(encoded(image, "PNG"))
    assert np.array_equal(found[..., 0], np.asarray(image.convert("L")))
    assert (found == found[..., :1]).all()


def over_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:].astype(float) / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


def with_alpha(mode: str) -> Image.Image:
    image = picture().convert(mode)
    image.putalpha(Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))))
    return image


@pytest.mark.parametrize(("mode", "format"), [("RGB", "PNG"), ("L", "PNG"), ("RGB", "WEBP"), ("RGB", "TIFF")])
def test_alpha_is_laid_over_white(mode: str, format: str) -> None:
    image = with_alpha(mode)
    data = encoded(image, format, **({"lossless": True, "exact": True} if format == "WEBP" else {}))
    assert np.abs(rgb(data) - over_white(np.asarray(image.convert("RGBA")))).max() <= 1.01
    assert (rgb(data)[:, 0] == WHITE).all()  # fully transparent, whatever colour lies below


def test_transparent_colours_of_palettes_grey_and_rgb_are_white() -> None:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.paste(1, (0, 0, 8, 16))
    for data in (
        encoded(image, "PNG", transparency=1),
        encoded(image, "GIF", transparency=1),
        encoded(image.convert("RGB"), "PNG", transparency=(0, 200, 0)),
    ):
        assert (rgb(data)[0, 0] == WHITE).all() and (rgb(data)[0, 15] == (200, 0, 0)).all()
    half = encoded(image, "PNG", transparency=bytes([255, 128]))
    assert np.abs(rgb(half)[0, 0].astype(int) - (127, 227, 127)).max() <= 1
    grey = Image.new("L", (16, 16), 7)
    assert (rgb(encoded(grey, "PNG", transparency=7)) == 255).all()


def test_sixteen_bit_grey_is_scaled_with_rounding() -> None:
    values = np.array([[0, 128, 129, 385, 386, 32767, 32768, 65535] * 2] * 16, np.uint16)
    expected = np.round(values / 257).astype(np.uint8)
    for format in ("PNG", "TIFF"):
        found = rgb(encoded(Image.fromarray(values), format))
        assert np.array_equal(found[..., 1], expected)
    big_endian = encoded(Image.frombytes("I;16B", (16, 16), values.astype(">u2").tobytes()), "TIFF")
    assert np.array_equal(rgb(big_endian)[..., 0], expected)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_sixteen_bit_colour_keeps_its_upper_eight_bits(channels: int) -> None:
    values = np.random.default_rng(1).integers(0, 65536, (16, 16, channels)).astype(">u2")
    if channels != 3:
        values[..., -1] = 65535  # opaque
    kind = {2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 16, 16, 16, kind, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows))
    found = rgb(data + png_chunk(b"IEND", b""))
    assert np.array_equal(found, values[..., [0, 0, 0] if channels == 2 else [0, 1, 2]] >> 8)


def test_thirty_two_bit_integers_and_floats_are_refused() -> None:
    for mode in ("I", "F"):
        assert reason(encoded(Image.new(mode, (16, 16)), "TIFF")) == FailureReason.UNSUPPORTED_MODE
    deep_pgm = b"P5\n16 16\n65535\n" + bytes(512)  # Pillow gives it as 32 bits
    assert reason(deep_pgm) == FailureReason.UNSUPPORTED_MODE


def test_animations_give_their_first_frame() -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for format, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert (rgb(data) == (255, 0, 0)).all(), format


# What is refused


def test_a_bomb_is_refused_by_its_header_alone() -> None:
    tracemalloc.start()
    started = time.thread_time()  # tracemalloc makes all of it slow
    assert reason(bomb_png(20_000, 20_000)) == FailureReason.TOO_MANY_PIXELS
    assert time.thread_time() - started < 1
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_the_bound_is_the_stated_number_of_pixels() -> None:
    assert reason(bomb_png(MAX_PIXELS + 1, 1)) == FailureReason.TOO_MANY_PIXELS
    assert reason(bomb_png(MAX_PIXELS // 2 + 1, 2)) == FailureReason.TOO_MANY_PIXELS
    assert reason(bomb_png(1000, 1000)) == FailureReason.TRUNCATED_IMAGE  # small enough: its pixels are missing


def test_a_line_that_would_become_a_bomb_when_enlarged_is_refused() -> None:
    line = encoded(Image.new("L", (1, 30_000)), "PNG")
    assert reason(line, ImageSpec(small="upscale")) == FailureReason.TOO_MANY_PIXELS
    assert reason(line, ImageSpec()) == FailureReason.TOO_SMALL


@pytest.mark.parametrize(
    ("format", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True}),
     ("GIF", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PPM", {}), ("AVIF", {})],
)  # fmt: skip
def test_a_file_cut_anywhere_is_refused_or_has_all_its_pixels(format: str, options: dict[str, Any]) -> None:
    whole = encoded(picture(3, 24, 16), format, **options)
    expected = decode_image(whole, ANY_SIZE).pixels_HWC
    for cut in range(0, len(whole), max(1, len(whole) // 150)):
        try:
            found = decode_image(whole[:cut], ANY_SIZE).pixels_HWC
        except SampleError as error:
            assert error.reason in ("not_an_image", "truncated_image", "undecodable")
        else:
            assert np.array_equal(found, expected), cut  # only what stands behind the pixels is missing


def test_a_cut_in_the_pixels_is_told_as_that() -> None:
    for format in ("JPEG", "PNG", "GIF", "BMP", "TIFF"):
        whole = encoded(picture(3, 240, 160), format)
        assert reason(whole[: len(whole) * 3 // 4], ImageSpec(size=16)) == FailureReason.TRUNCATED_IMAGE, format
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize(("format", "end"), [("JPEG", b"\xff\xd9"), ("PNG", png_chunk(b"IEND", b"")), ("GIF", b"\0;")])
def test_a_cut_in_the_pixels_is_told_even_where_the_end_marker_was_put_back(format: str, end: bytes) -> None:
    whole = encoded(picture(3, 240, 160), format)
    for cut in range(len(whole) // 3, len(whole) - 300, 97):
        assert reason(whole[:cut] + end) == FailureReason.TRUNCATED_IMAGE, cut


def test_a_png_whose_pixels_were_changed_is_refused_by_its_checksum() -> None:
    """Pillow does not look at it: a tail of zeros would be a black one, or anything else."""
    whole = encoded(picture(3, 240, 160), "PNG")
    first = whole.index(b"IDAT") + 4
    for place in range(first, len(whole) - 16, 511):
        zeros = whole[:place] + bytes(len(whole) - place)
        flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        assert reason(zeros) in (FailureReason.TRUNCATED_IMAGE, FailureReason.UNDECODABLE)
        assert reason(flipped) == FailureReason.UNDECODABLE
    Image.open(io.BytesIO(whole[:-16] + b"\0\0\0\0" + whole[-12:])).load()


def png_of(rows: bytes, width: int, height: int, bits: int = 8, colours: int = 2, interlaced: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, interlaced)
    chunks = [(b"IHDR", header), *([(b"PLTE", bytes(range(6)))] if colours == 3 else [])]
    packed = zlib.compress(rows)
    chunks += [(b"IDAT", packed[:5]), (b"IDAT", packed[5:]), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


@pytest.mark.parametrize("value", [0, 255])  # black rows are no missing ones
@pytest.mark.parametrize(
    ("colours", "bits"),
    [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (3, 1), (3, 2), (4, 8), (4, 16), (6, 8), (6, 16)],
)
def test_a_png_whose_stream_ends_too_early_is_truncated_and_never_black(colours: int, bits: int, value: int) -> None:
    """With right checksums, and an end of its own."""
    width, height = 37, 21
    row = b"\0" + bytes([value & (0b01010101 if colours == 3 else 255)]) * -(-width * bits * CHANNELS[colours] // 8)
    assert rgb(png_of(row * height, width, height, bits, colours)).shape == (height, width, 3)
    for missing in (1, len(row), len(row) * 10 + 3, len(row) * (height - 1)):
        data = png_of((row * height)[:-missing], width, height, bits, colours)
        if missing % len(row) == 0:
            Image.open(io.BytesIO(data)).load()  # Pillow by itself fills up
        assert reason(data) == FailureReason.TRUNCATED_IMAGE, missing


@pytest.mark.parametrize(("width", "height"), [(37, 21), (8, 8), (5, 5), (1, 1), (1, 9), (4, 1), (2, 3)])
def test_an_interlaced_png_whose_stream_ends_too_early_is_truncated(width: int, height: int) -> None:
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    values = pixels(5, width, height)
    parts = [values[top::down, left::across] for left, top, across, down in passes]
    rows = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    assert np.array_equal(rgb(png_of(rows, width, height, interlaced=1)), values)
    for missing in {1, len(rows) // 10 + 1, len(rows) // 2 + 1, len(rows) - 1}:
        data = png_of(rows[:-missing], width, height, interlaced=1)
        assert reason(data) == FailureReason.TRUNCATED_IMAGE, missing


def test_the_rows_of_a_black_png_are_counted_in_little_memory() -> None:
    data = encoded(Image.new("RGB", (4000, 3000)), "PNG")  # 36 MB, unpacked
    tracemalloc.start()
    png.check_rows(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"not an image", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7", bytes(1000), b"\xff\xd8"],
    ids=["empty", "zero", "text", "svg", "pdf", "zeros", "jpeg marker"],
)
def test_what_is_no_image_is_said_to_be_none(data: bytes) -> None:
    assert reason(data) in (FailureReason.NOT_AN_IMAGE, FailureReason.UNDECODABLE)


def test_formats_that_run_programs_or_take_any_bytes_are_no_images(tmp_path: Path) -> None:
    drawing = Image.new("RGB", (32, 32))
    ImageDraw.Draw(drawing).ellipse((4, 4, 28, 28), fill="red")
    for format in ("EPS", "TGA", "JPEG2000", "ICO", "PCX"):
        assert reason(encoded(drawing, format)) == FailureReason.NOT_AN_IMAGE, format


FUZZED = [
    ("JPEG", {}), ("PNG", {}), ("WEBP", {}), ("GIF", {}), ("BMP", {}), ("TIFF", {}), ("PPM", {}), ("AVIF", {}),
    ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "jpeg"}),
]  # fmt: skip


@pytest.mark.parametrize(("format", "options"), FUZZED)
def test_damaged_bytes_give_pixels_or_a_sample_error_and_nothing_else(
    format: str, options: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    whole = encoded(picture(4, 24, 16), format, **options)
    rng = random.Random(11)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(min(len(damaged), rng.choice((80, 1 << 20))))
            damaged[place : place + rng.choice((0, 1, 1, 1, 9))] = rng.randbytes(rng.choice((0, 1, 1, 1, 9)))
        try:
            decode_image(bytes(damaged), ImageSpec(size=8))
        except SampleError as error:
            assert isinstance(error.reason, FailureReason)


@pytest.mark.parametrize("step", ["open", "load"])
@pytest.mark.parametrize(
    ("error", "expected"),
    [(AssertionError(), FailureReason.UNDECODABLE), (Image.DecompressionBombError("x"), FailureReason.TOO_MANY_PIXELS)],
)
def test_a_failed_assertion_or_a_bomb_found_late_costs_one_image_and_not_its_shard(
    monkeypatch: pytest.MonkeyPatch, error: Exception, expected: FailureReason, step: str
) -> None:
    data = encoded(picture(), "PNG")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(PngImageFile, {"open": "_open", "load": "load"}[step], fail)
    assert reason(data) == expected


# The spec


def test_the_spec_survives_json_and_refuses_what_it_does_not_know() -> None:
    spec = ImageSpec(size=64, small="upscale")
    assert ImageSpec.from_json(spec.to_json()) == spec
    for change in ({"size": 4}, {"size": "64"}, {"version": 2}, {"resample": "nearest"}, {"small": "pad"}, {"new": 1}):
        with pytest.raises(ValueError):
            ImageSpec.from_json({**spec.to_json(), **change})
    for name in spec.to_json():
        with pytest.raises(ValueError, match=name):
            ImageSpec.from_json({k: v for k, v in spec.to_json().items() if k != name})


# Training crops


def test_a_training_crop_without_augmentation_is_the_evaluation_crop() -> None:
    data, spec = encoded(picture(2, 90, 60), "PNG"), ImageSpec(size=32)
    view = training_crop(data, spec, "none", np.random.default_rng(0))
    assert np.array_equal(view, decode_image(data, spec).pixels_HWC)


def test_flips_mirror_about_half_of_the_views() -> None:
    data, spec = encoded(picture(2, 90, 60), "PNG"), ImageSpec(size=32)
    plain = decode_image(data, spec).pixels_HWC
    views = [training_crop(data, spec, "flip", np.random.default_rng(seed)) for seed in range(40)]
    mirrored = sum(np.array_equal(view, plain[:, ::-1]) for view in views)
    assert mirrored + sum(np.array_equal(view, plain) for view in views) == 40
    assert 10 <= mirrored <= 30


@pytest.mark.parametrize(("width", "height"), [(32, 32), (33, 90), (90, 60), (500, 40), (32, 300)])
def test_dalles_augmentation_gives_whole_crops_that_follow_the_generator(width: int, height: int) -> None:
    data, spec = encoded(picture(2, width, height), "PNG"), ImageSpec(size=32)
    views = [training_crop(data, spec, "dalle", np.random.default_rng(seed)) for seed in (1, 1, 2, 3)]
    assert all(view.shape == (32, 32, 3) and view.dtype == np.uint8 for view in views)
    assert np.array_equal(views[0], views[1])
    assert width == height == 32 or not all(np.array_equal(views[0], view) for view in views)


def test_training_refuses_what_tokenising_refuses() -> None:
    for augment in ("none", "flip", "dalle"):
        with pytest.raises(SampleError) as raised:
            training_crop(encoded(picture(0, 90, 31), "PNG"), ImageSpec(size=32), augment, np.random.default_rng(0))
        assert raised.value.reason == FailureReason.TOO_SMALL
