"""Which images `dvae parity` encodes: good ones from some of the shards, each as the tokenizers want it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.errors import PipelineError
from pipeline.images import ImageSpec, SampleError, decode_image
from pipeline.records import ObjectInfo
from pipeline.shards import read_samples

# B images, H W rows and columns, C channels

MAX_SHARDS = 8  # the images come from so many, evenly spaced: neighbours in a shard are often alike


class NoImages(PipelineError):
    """The shards hold no image that can be decoded."""


@dataclass(frozen=True)
class ParityImages:
    """`names`: (shard, key) of each. `pixels`: by image spec, uint8 (B, H, W, C)."""

    names: list[tuple[str, str]]
    pixels: dict[ImageSpec, NDArray[np.uint8]]


def choose_images(shards: Sequence[ObjectInfo], specs: Sequence[ImageSpec], num_images: int) -> ParityImages:
    """Those that every spec takes, from the starts of some shards; fewer than asked for where these hold fewer."""
    chosen = [shards[i * len(shards) // MAX_SHARDS] for i in range(MAX_SHARDS)] if len(shards) > MAX_SHARDS else shards
    names: list[tuple[str, str]] = []
    pixels: dict[ImageSpec, list[NDArray[np.uint8]]] = {spec: [] for spec in specs}
    for number, shard in enumerate(chosen):
        share = -(-(num_images - len(names)) // (len(chosen) - number))  # what is left, evenly
        with closing(_good_images(shard, list(pixels))) as images:
            for key, of_specs in islice(images, share):
                names.append((storage.public_url(shard.url), key))
                for spec, pixels_HWC in zip(pixels, of_specs, strict=True):
                    pixels[spec].append(pixels_HWC)
    if not names:
        raise NoImages(f"none of the images in {len(chosen)} shards can be decoded; name other shards")
    return ParityImages(names, {spec: np.stack(each) for spec, each in pixels.items()})


def _good_images(
    shard: ObjectInfo, specs: Sequence[ImageSpec]
) -> Generator[tuple[str, list[NDArray[np.uint8]]], None, None]:
    with closing(read_samples(shard, require_end_marker=False)) as samples:
        for sample in samples:
            if sample.image is None:
                continue
            try:
                yield sample.key, [decode_image(sample.image, spec).pixels_HWC for spec in specs]
            except SampleError:  # counted where tokens are made; here another image does as well
                continue
