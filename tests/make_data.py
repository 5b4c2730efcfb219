"""Makes the images, shards, tokenizers and runs that tests work on."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from pipeline import storage
from pipeline.images import ImageSpec
from pipeline.records import ObjectInfo
from pipeline.shard_patterns import expand
from pipeline.token_table import TableSpec


def pixels(seed: int, width: int = 24, height: int = 20) -> np.ndarray:
    """Smooth noise, uint8 (height, width, 3): compresses well, and no two seeds look alike."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def image_bytes(seed: int, format: str = "JPEG", width: int = 24, height: int = 20) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels(seed, width, height)).save(out, format)
    return out.getvalue()


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def bomb_png(width: int = 20_000, height: int = 20_000) -> bytes:
    """A PNG of 57 bytes whose header declares that many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


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
    return expand([str(folder)]) if counts else []


def listed(path: Path) -> ObjectInfo:
    """One file as its store lists it."""
    (info,) = expand([str(path)])
    return info


class FakeTokenizer:
    """A tokenizer in six lines: the top left pixel of each cell, red channel."""

    grid, codebook_size, tokenizer_id = (2, 2), 256, "fake"

    def encode(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        step = pixels_BHWC.shape[1] // 2
        return pixels_BHWC[:, ::step, ::step, 0].astype(np.int64)


def fake_table(**changes: Any) -> TableSpec:
    """The token table of FakeTokenizer, for images of 16 pixels and more."""
    values: dict[str, Any] = {"image_spec": ImageSpec(size=16).to_json(), **changes}
    fake = FakeTokenizer
    return TableSpec(
        **{"tokenizer_id": fake.tokenizer_id, "grid": fake.grid, "codebook_size": fake.codebook_size, **values}
    )


class Killed(BaseException):
    """Stands for SIGKILL: nobody catches it."""


class MortalStore(MemoryFileSystem):
    """`mortal://`: an object store in memory where one is killed just before the n-th change. `log` names what was
    done to what."""

    protocol = "mortal"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    log: ClassVar[list[tuple[str, str]]] = []
    kill_before: int | None = None

    @classmethod
    def fresh(cls) -> type[MortalStore]:
        fsspec.register_implementation("mortal", cls, clobber=True)
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        return cls.alive()

    @classmethod
    def alive(cls, kill_before: int | None = None) -> type[MortalStore]:
        """Change no object, but count from 0 again."""
        cls.log.clear()
        cls.kill_before = kill_before
        return cls

    @classmethod
    def objects(cls, under: str = "") -> dict[str, bytes]:
        return {path: file.getvalue() for path, file in sorted(cls.store.items()) if path.startswith(under)}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("mortal://", "memory://"))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        self._change("put", path)
        super().pipe_file(path, value, mode=mode, **options)

    def rm_file(self, path: str) -> None:
        self._change("remove", path)
        super().rm_file(path)

    def _change(self, deed: str, path: str) -> None:
        if self.kill_before == len(self.log):
            raise Killed(deed, path)
        self.log.append((deed, self._strip_protocol(path)))


def peak_bytes() -> int:
    """The most memory that this process has had. (`ru_maxrss` begins with that of the process which forked it.)"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def folder_bytes(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    """File name -> bytes, of the files in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern)) if path.is_file()}


def write_checkpoint(folder: Path, seed: int = 0, size: int = 16, width: int = 16) -> Path:
    """A small dVAE with seeded weights that give different images different tokens: 2x2 of 64 codes for images of 16
    pixels; smaller ones are enlarged."""
    import torch

    from model.checkpoint import checkpoint_files
    from model.config import DVAEConfig
    from model.dvae import seeded_dvae
    from pipeline.images import ImageSpec

    config = DVAEConfig(codebook_size=64, width=width, decoder_init=16, blocks_per_group=1, stem="strided")
    model, first = seeded_dvae(config, seed), "encoder.blocks.input"
    with torch.no_grad():  # centred on grey and louder, as in test_golden_tokens.py
        model.get_parameter(f"{first}.b").copy_(-2.0 * model.get_parameter(f"{first}.w").sum(dim=(1, 2, 3)))
        model.get_parameter(f"{first}.w").mul_(4.0)
    spec, weights = ImageSpec(size=size, small="upscale").to_json(), dict(model.state_dict())
    files = checkpoint_files(
        weights=weights, dvae_config=config, image_spec=spec, step=0, training_state=None, extra={}
    )
    for name, data in files.items():
        storage.publish(str(folder / name), data)
    return folder
