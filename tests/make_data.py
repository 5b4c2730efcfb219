"""Makes the images, shards, tokenizers and runs that tests work on."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline import storage
from pipeline.records import ObjectInfo


def pixels(seed: int, width: int = 24, height: int = 20) -> np.ndarray:
    """Smooth noise, uint8 (height, width, 3): compresses well, and no two seeds look alike."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def image_bytes(seed: int, format: str = "JPEG", width: int = 24, height: int = 20) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels(seed, width, height)).save(out, format)
    return out.getvalue()


def tar_bytes(members: Iterable[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of (name, data), as other tools write it: with end-of-archive blocks."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def sample_members(first: int, count: int) -> list[tuple[str, bytes]]:
    """`count` samples of a JPEG, a caption and a JSON each, keys `img00000` on."""
    members: list[tuple[str, bytes]] = []
    for n in range(first, first + count):
        key = f"img{n:05d}"
        members += [
            (f"{key}.jpg", image_bytes(n)),
            (f"{key}.txt", f"picture {n}".encode()),
            (f"{key}.json", b'{"source": "made", "score": %d.5}' % n),
        ]
    return members


def write_shards(folder: Path, counts: Sequence[int]) -> list[ObjectInfo]:
    """One shard `made-00000N.tar` for each count of samples; keys go on from shard to shard."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for number, count in enumerate(counts):
        (folder / f"made-{number:06d}.tar").write_bytes(tar_bytes(sample_members(first, count)))
        first += count
    return storage.expand([str(folder)]) if counts else []


def listed(path: Path) -> ObjectInfo:
    """One file as its store lists it."""
    (info,) = storage.expand([str(path)])
    return info


class FakeTokenizer:
    """A tokenizer in six lines: the top left pixel of each cell, red channel."""

    grid, codebook_size, tokenizer_id = (2, 2), 256, "fake"

    def encode(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        step = pixels_BHWC.shape[1] // 2
        return pixels_BHWC[:, ::step, ::step, 0].astype(np.int64)


def folder_bytes(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    """File name -> bytes, of the files in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern)) if path.is_file()}


def write_checkpoint(folder: Path, seed: int = 0, size: int = 16, width: int = 16) -> Path:
    """A small dVAE with random weights: 2x2 tokens of 64 codes for images of 16 pixels; smaller ones are enlarged."""
    import torch

    from model.checkpoint import checkpoint_files
    from model.config import DVAEConfig
    from model.dvae import DVAE
    from pipeline.images import ImageSpec

    torch.manual_seed(seed)
    config = DVAEConfig(codebook_size=64, width=width, decoder_init=16, blocks_per_group=1, stem="strided")
    files = checkpoint_files(
        weights=DVAE(config).state_dict(), dvae_config=config, image_spec=ImageSpec(size=size, small="upscale").to_json(), step=0,
        training_state=None, extra={},
    )  # fmt: skip
    for name, data in files.items():
        storage.publish(str(folder / name), data)
    return folder
