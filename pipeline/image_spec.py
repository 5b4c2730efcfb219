"""What is to become of an image: the part of a model's identity that is about pixels. images.py carries it out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

IMAGE_SPEC_VERSION = 1

Resample = Literal["lanczos", "bicubic", "bilinear", "box"]
Small = Literal["refuse", "upscale"]
Shrink = Literal["none", "dct"]


@dataclass(frozen=True)
class ImageSpec:
    """What becomes of an image before the encoder sees it. The default is DALL-E's: shorter side to `size`
    with Lanczos, centre crop (github.com/openai/DALL-E, notebooks/usage.ipynb). `shrink: dct`: before that, libjpeg
    makes a JPEG smaller by 2, 4 or 8 while it decodes, as far as its shorter side stays at least `size`: faster where
    pictures are large, and other pixels."""

    size: int = 256
    resample: Resample = "lanczos"
    small: Small = "refuse"
    version: int = IMAGE_SPEC_VERSION
    shrink: Shrink = "none"

    def __post_init__(self) -> None:
        if not 8 <= self.size <= 4096:
            raise ValueError(f"size {self.size} is not between 8 and 4096")
        if self.resample not in get_args(Resample) or self.small not in get_args(Small):
            raise ValueError(f"resample {self.resample!r} or small {self.small!r} is unknown here")
        if self.shrink not in get_args(Shrink):
            raise ValueError(f"shrink {self.shrink!r} is none of {', '.join(get_args(Shrink))}")
        if self.version != IMAGE_SPEC_VERSION:
            raise ValueError(f"version {self.version} is unknown here: this is {IMAGE_SPEC_VERSION}")

    def to_json(self) -> dict[str, Any]:
        """Part of the tokenizer's id. Without `shrink` where it is none, for so are the specs from before it came."""
        value = asdict(self)
        return value if self.shrink != "none" else {name: each for name, each in value.items() if name != "shrink"}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ImageSpec:
        """Raises ValueError on an unknown or missing field, for then the pixels would be others."""
        left_out = {"shrink"} if value.get("shrink", "none") == "none" else set()
        wanted = {field.name for field in fields(cls)} - left_out
        if set(value) != wanted:
            raise ValueError(f"no image spec that this version knows: it has {sorted(value)}, not {sorted(wanted)}")
        try:
            return cls(**value)
        except TypeError as error:
            raise ValueError(f"an image spec has a field of another type: {error}") from error
