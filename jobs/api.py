"""The Python API: `load_tokenizer(url)` gives an object that encodes images and decodes tokens, `TokenDataset` and
`TokenLoader` the token rows of a run for training.

from jobs.api import load_tokenizer
tokenizer = load_tokenizer("s3://models/dvae")
tokens_BHW = tokenizer.encode(["cat.jpg", "dog.png"])
pixels_BHWC = tokenizer.decode(tokens_BHW)

from jobs.api import TokenDataset, TokenLoader
loader = TokenLoader(TokenDataset("s3://tokens/images", batch_size=64, columns=["caption"]))
for batch in loader:  # one epoch
    batch.tokens, batch.columns["caption"], loader.state_dict()
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from jobs.checkpoints import TokenizerSource, read_head
from jobs.token_dataset import TokenDataset as TokenDataset
from jobs.token_dataset import TokenLoader as TokenLoader
from jobs.token_dataset import TokenRows as TokenRows
from model.tokenizer import DVAETokenizer
from pipeline import storage
from pipeline.images import ImageSpec, decode_image

# B images, H W token rows and columns (in pixels_BHWC: pixels), C channels

Image = str | os.PathLike[str] | bytes | NDArray[np.uint8]


def load_tokenizer(
    url: str,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32",
    batch_size: int = 32,
    threads: int = 1,
    compile: bool = False,
) -> Tokenizer:
    """The tokenizer of a checkpoint, or of a training output's finished model. Raises CheckpointNotFound, or
    ModelError when what is there is damaged."""
    head = read_head(url)
    source = TokenizerSource(head.url, device, precision, batch_size, threads, compile)
    return Tokenizer(source.load())


class Tokenizer:
    """Encodes images as the offline job does: same pixels, same tokens."""

    def __init__(self, model: DVAETokenizer) -> None:
        self._model = model
        self.image_spec = ImageSpec.from_json(model.image_spec)
        self.grid = model.grid
        self.codebook_size = model.codebook_size
        self.tokenizer_id = model.tokenizer_id
        self.numerics: dict[str, Any] = model.numerics

    def encode(self, images: Sequence[Image] | NDArray[np.uint8]) -> NDArray[np.int32]:
        """Tokens (B, H, W). Images are URLs or paths, bytes of an image file, or uint8 arrays that are already
        (size, size, 3) as the image spec says. Raises SampleError for bytes that are no usable image."""
        if isinstance(images, str | bytes | os.PathLike):
            raise TypeError("encode takes a list of images; wrap a single one: encode([image])")
        pixels = [self._pixels(image) for image in images]
        size = self.image_spec.size
        return self._model.encode(np.stack(pixels) if pixels else np.empty((0, size, size, 3), np.uint8))

    def decode(self, tokens_BHW: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        """RGB pixels (B, height, width, 3). Token rows from Parquet, (B, H·W), are accepted too."""
        tokens = np.asarray(tokens_BHW)
        return self._model.decode(tokens.reshape(-1, *self.grid) if tokens.ndim == 2 else tokens)

    def _pixels(self, image: Image) -> NDArray[np.uint8]:
        if isinstance(image, np.ndarray):
            return image
        data = image if isinstance(image, bytes) else storage.read_bytes(os.fspath(image))
        return decode_image(data, self.image_spec).pixels_HWC
