"""What is to become of an image: the part of a model's identity that is about pixels. images.py carries it out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

IMAGE_SPEC_VERSION = 1

Resample = Literal["lanczos", "bicubic", "box"]
Small = Literal["refuse", "upscale"]


@dataclass(frozen=True)
class ImageSpec:
    """What becomes of an image before the encoder sees it. The default is DALL-E's: shorter side to `size`
    with Lanczos, centre crop (github.com/openai/DALL-E, notebooks/usage.ipynb)."""

    size: int = 256
    resample: Resample = "lanczos"
    small: Small = "refuse"
    version: int = IMAGE_SPEC_VERSION

    def __post_init__(self) -> None:
        if not 8 <= self.size <= 4096:
            raise ValueError(f"size {self.size} is not between 8 and 4096")
        if self.resample not in get_args(Resample) or self.small not in get_args(Small):
            raise ValueError(f"resample {self.resample!r} or small {self.small!r} is unknown here")
        if self.version != IMAGE_SPEC_VERSION:
            raise ValueError(f"version {self.version} is unknown here: this is {IMAGE_SPEC_VERSION}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ImageSpec:
        """Raises ValueError on an unknown or missing field, for then the pixels would be others."""
        wanted = {field.name for field in fields(cls)}
        if set(value) != wanted:
            raise ValueError(f"no image spec that this version knows: it has {sorted(value)}, not {sorted(wanted)}")
        try:
            return cls(**value)
        except TypeError as error:
            raise ValueError(f"an image spec has a field of another type: {error}") from error
