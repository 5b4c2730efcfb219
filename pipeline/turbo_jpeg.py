"""JPEG pixels by libjpeg-turbo's own interface (the package simplejpeg), where they are surely those of Pillow.

Holds the interpreter's lock for a tenth of the time that Pillow does. Never judges a picture: at any warning of the
library the answer is None, and Pillow decides. Used where it is installed and gives Pillow's own pixels for a few
pictures made here, which each process looks at once.
"""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

log = logging.getLogger(__name__)
_CANNOT = "simplejpeg cannot be used here (%s: %s): Pillow decodes every JPEG"
try:
    from simplejpeg import decode_jpeg, encode_jpeg
except Exception as error:  # noqa: BLE001 - made for another numpy (ValueError) or libc: whatever it is, Pillow does it
    decode_jpeg = encode_jpeg = None
    if not isinstance(error, ModuleNotFoundError):
        log.warning(_CANNOT, type(error).__name__, error)

_COLOURS = {3: "RGB", 4: "RGBX"}
_lock = threading.Lock()
_agrees: bool | None = None  # None: not looked at yet


def pixels(data: bytes, width: int, height: int, channels: int = 4) -> NDArray[np.uint8] | None:
    """RGB, uint8 (height, width, 3 or 4; the fourth counts for nothing), of a JPEG with a plain header (jpeg.py). None
    where Pillow must decide."""
    return _decoded(data, width, height, channels) if usable() else None


def _decoded(data: bytes, width: int, height: int, channels: int) -> NDArray[np.uint8] | None:
    # Into memory of the size that was looked at: another one in the data cannot take more.
    shape = (height, width, channels)
    try:
        found: NDArray[np.uint8] = decode_jpeg(data, _COLOURS[channels], buffer=np.empty(shape, np.uint8))
    except (ValueError, RuntimeError):  # all that libjpeg says, warnings too
        return None
    return found if found.shape == shape else None


def usable() -> bool:
    """Whether it is installed and gives Pillow's pixels here."""
    global _agrees
    if _agrees is None:
        with _lock:
            if _agrees is None:
                _agrees = decode_jpeg is not None and _works()
    return _agrees


def _works() -> bool:
    try:
        return _gives_pillows_pixels()
    except Exception as error:  # noqa: BLE001 - another version, without what is asked of it: Pillow does it
        log.warning(_CANNOT, type(error).__name__, error)
        return False


def _gives_pillows_pixels() -> bool:
    for name, data in _samples():
        with Image.open(io.BytesIO(data)) as image:
            wanted = np.asarray(image.convert("RGB"))
        found = [_decoded(data, image.width, image.height, channels) for channels in _COLOURS]
        if not all(one is not None and np.array_equal(one[..., :3], wanted) for one in found):
            log.warning("simplejpeg's pixels are not Pillow's here (%s): Pillow decodes every JPEG", name)
            return False
    return True


def _samples() -> Iterator[tuple[str, bytes]]:
    """(what it is, JPEG): each subsampling and kind of scan, in a size that fills no whole blocks."""
    values = np.random.default_rng(1).integers(0, 256, (23, 31, 3), dtype=np.uint8)
    image = Image.fromarray(values).resize((93, 67), Image.Resampling.BICUBIC)
    for sampling in ("444", "422", "420", "440", "411"):
        for quality in (35, 92):
            yield f"{sampling}, quality {quality}", encode_jpeg(np.array(image), quality, "RGB", sampling)
    for number in (0, 1, 2):
        yield f"progressive, sampling {number}", _encoded(image, subsampling=number, progressive=True)
    yield "grey", _encoded(image.convert("L"))
    yield "grey, progressive", _encoded(image.convert("L"), progressive=True)
    yield "one pixel", _encoded(image.crop((0, 0, 1, 1)))
    yield "restart markers", _encoded(image, restart_marker_blocks=2)


def _encoded(image: Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()
