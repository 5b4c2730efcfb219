"""The demo's tiles: cut from the photographs inside scikit-image's wheel, training and held-out kept apart.

Every photograph has one hand-picked region that training never sees. Held-out tiles lie inside it; a training
tile keeps at least MARGIN_PX of the photograph between itself and that region.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.errors import PipelineError
from pipeline.pictures import Box, crop_to_square, encode_jpeg, read_picture

TILE_PX = 128
STRIDE_PX = 20  # between neighbouring tiles, in tile pixels
MARGIN_PX = 16  # photograph pixels between a held-out region and every training tile

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Photo:
    file: str
    caption: str
    held_out: Box
    scale: int = 1  # pixels of the photograph for one of the tile: more than 1 for large photographs

    @property
    def name(self) -> str:
        return Path(self.file).stem


# Left out: text, drawings and test patterns; motorcycle_right (the stereo twin of motorcycle_left: a region
# held out of one would be seen in the other); cell, clock_motion and microaneurysms (small or nearly empty).
PHOTOS = (
    Photo("astronaut.png", "an astronaut in an orange suit, before a flag and a shuttle", (112, 0, 288, 176)),
    Photo("brick.png", "a pavement of grey bricks", (336, 336, 512, 512)),
    Photo("camera.png", "a man with a camera on a tripod, on a lawn", (160, 48, 336, 224)),
    Photo("chelsea.png", "a tabby cat", (275, 30, 451, 206)),
    Photo("coffee.png", "a cup of espresso on a red saucer, on a wooden table", (304, 80, 480, 256)),
    Photo("coins.png", "ancient coins on a dark cloth", (208, 127, 384, 303)),
    Photo("grass.png", "grass", (168, 168, 344, 344)),
    Photo("gravel.png", "gravel", (168, 168, 344, 344)),
    Photo("hubble_deep_field.jpg", "galaxies of the deep field", (400, 320, 752, 672), scale=2),
    Photo("ihc.png", "stained tissue under a microscope", (320, 200, 496, 376)),
    Photo("moon.png", "craters of the moon", (32, 0, 208, 176)),
    Photo("motorcycle_left.png", "a red motorcycle in a garage", (536, 264, 712, 440)),
    Photo("retina.jpg", "the retina of an eye", (60, 380, 588, 908), scale=3),
    Photo("rocket.jpg", "a rocket on its launch pad at dusk", (240, 200, 416, 376)),
)


@dataclass(frozen=True)
class Tile:
    """Where a tile comes from, in pixels of its photograph; what its .json holds."""

    source: str
    split: Split
    x: int
    y: int
    region_px: int  # side of the square region

    @property
    def box(self) -> Box:
        return (self.x, self.y, self.x + self.region_px, self.y + self.region_px)

    @property
    def name(self) -> str:
        return f"{Path(self.source).stem}-x{self.x:04d}-y{self.y:04d}"


@dataclass(frozen=True)
class TileCounts:
    train: int
    heldout: int


def make_tiles(folder: Path) -> TileCounts:
    """Write `folder`/train/<photo>/ and `folder`/heldout/<photo>/: a .jpg, .txt and .json for each tile."""
    counts = {"train": 0, "heldout": 0}
    for photo in PHOTOS:
        pixels_HWC = read_picture(photograph_folder() / photo.file)
        for tile in tiles_of(photo, pixels_HWC.shape[1], pixels_HWC.shape[0]):
            write_tile(folder / tile.split / photo.name, tile, photo, pixels_HWC)
            counts[tile.split] += 1
    return TileCounts(**counts)


def photograph_folder() -> Path:
    """Where the installed scikit-image keeps the photographs of its wheel: no import, no download."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise PipelineError("the demo's photographs come with scikit-image: pip install 'dvae-ray[demo]'")
    return Path(spec.submodule_search_locations[0]) / "data"


def tiles_of(photo: Photo, width: int, height: int) -> Iterator[Tile]:
    """Every tile of one photograph: on a grid over the held-out region, then over the rest."""
    region, stride = TILE_PX * photo.scale, STRIDE_PX * photo.scale
    for x, y in _grid(photo.held_out, region, stride):
        yield Tile(photo.file, "heldout", x, y, region)
    for x, y in _grid((0, 0, width, height), region, stride):
        if not overlaps((x, y, x + region, y + region), grown(photo.held_out, MARGIN_PX)):
            yield Tile(photo.file, "train", x, y, region)


def overlaps(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def grown(box: Box, margin: int) -> Box:
    return (box[0] - margin, box[1] - margin, box[2] + margin, box[3] + margin)


def _grid(area: Box, region: int, stride: int) -> Iterator[tuple[int, int]]:
    """Corners of squares of side `region` inside `area`, `stride` apart, the last row and column flush."""
    for y in _positions(area[1], area[3] - region, stride):
        for x in _positions(area[0], area[2] - region, stride):
            yield x, y


def _positions(first: int, last: int, stride: int) -> list[int]:
    return sorted({*range(first, last + 1, stride), *([last] if last >= first else [])})


def write_tile(folder: Path, tile: Tile, photo: Photo, pixels_HWC: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / tile.name
    caption = f"{photo.caption}: {_place(tile, pixels_HWC)}"
    path.with_suffix(".jpg").write_bytes(encode_jpeg(crop_to_square(pixels_HWC, tile.box, TILE_PX)))
    path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(asdict(tile)), encoding="utf-8")


def _place(tile: Tile, pixels_HWC: np.ndarray) -> str:
    height, width = pixels_HWC.shape[:2]
    row = ("top", "middle", "bottom")[(2 * tile.y + tile.region_px) * 3 // (2 * height)]
    column = ("left", "centre", "right")[(2 * tile.x + tile.region_px) * 3 // (2 * width)]
    return f"{row} {column}"
