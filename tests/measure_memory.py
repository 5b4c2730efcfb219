"""Peak memory while one shard is tokenised, in a process that does nothing else.

python tests/measure_memory.py SHARD OUTPUT      prints JSON: rows, peak_bytes, bytes before the shard was opened
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import numpy as np

from make_data import fake_table, listed, peak_bytes, tar_bytes, write_shards
from pipeline.images import ImageSpec
from pipeline.metadata import MetadataColumn
from pipeline.output import OutputPrefix, part_name
from pipeline.plan import ShardTask
from pipeline.tokenize_shard import TokenizeJob, TokenizeWorker

GRID = (32, 32)


class WideTokenizer:
    """A fast encoder with the grid of a real one: 1,024 tokens of 8,192 codes, from every eighth pixel."""

    grid, codebook_size, tokenizer_id = GRID, 8192, "wide"

    def encode(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        return pixels_BHWC[:, ::8, ::8].astype(np.int64) @ np.array([32, 5, 1]) % self.codebook_size


def noisy_jpegs(count: int, num_bytes: int = 100_000) -> list[bytes]:
    """Different JPEGs of 260x260 pixels and about `num_bytes` each."""
    import io

    from PIL import Image

    made = []
    for seed in range(count):
        noise = np.random.default_rng(seed).normal(128, 40, (260, 260, 3)).clip(0, 255).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(noise).save(out, "JPEG", quality=92, subsampling=0)
        made.append(out.getvalue())
    assert all(0.7 * num_bytes < len(data) < 1.5 * num_bytes for data in made), [len(data) for data in made]
    return made


def write_big_shard(path: Path, num_bytes: int) -> int:
    """A shard of that size, of the same few images under ever new keys; returns the number of images."""
    images, count = noisy_jpegs(8), 0
    end = 1024
    with path.open("wb") as file:
        while file.tell() < num_bytes:
            members: Iterable[tuple[str, bytes]] = [
                (f"{count + n:08d}.{kind}", images[n] if kind == "jpg" else b"a caption of some words")
                for n in range(8) for kind in ("jpg", "txt")
            ]  # fmt: skip
            data = tar_bytes(members)
            file.write(data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512))
            count += 8
        file.write(bytes(end))
    return count


def main() -> None:
    shard, output = Path(sys.argv[1]), sys.argv[2]
    table = fake_table(
        tokenizer_id="wide", grid=GRID, codebook_size=8192, image_spec=ImageSpec().to_json(),
        columns=(MetadataColumn("caption", "txt"),),
    )  # fmt: skip
    job = TokenizeJob(OutputPrefix(output), table, batch_size=32, decode_threads=2)
    (warm,) = write_shards(Path(output) / "warm", [40])
    with closing(TokenizeWorker(WideTokenizer(), job)) as worker:
        worker.tokenize(ShardTask(warm, "warm.parquet"))  # what the first shard loads stays
        before = peak_bytes()
        result = worker.tokenize(ShardTask(listed(shard), part_name(str(shard))))
    assert result.num_failed == 0
    figures = {"rows": result.num_rows, "peak_bytes": peak_bytes(), "peak_bytes_before": before}
    print(json.dumps({**figures, "seconds": result.seconds, "part_bytes": result.part_bytes}))  # noqa: T201


if __name__ == "__main__":
    main()
