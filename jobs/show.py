"""`dvae show`: token rows decoded back into pictures, beside the originals, on one contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from jobs.checkpoints import TokenizerSource, read_head
from jobs.contact_sheet import contact_sheet_png
from pipeline import storage
from pipeline.compacted import shard_as_read
from pipeline.errors import PipelineError, RunMismatch, StorageError
from pipeline.images import ImageSpec, SampleError, decode_image
from pipeline.output import OutputPrefix, listed, part_name, require_run
from pipeline.shard_patterns import expand
from pipeline.token_table import read_footer, read_table, read_tokens

# B images, H W token rows and columns, N = H * W

DECODE_BATCH = 16
Row = dict[str, Any]
Pixels = NDArray[np.uint8]


class Decoder(Protocol):
    def decode(self, tokens_BHW: NDArray[np.integer[Any]]) -> Pixels:
        """Integers (B, H, W) -> uint8 pictures (B, h, w, 3)."""


@dataclass(frozen=True)
class Original:
    """What the encoder saw of one row's image, or why that cannot be shown."""

    pixels_HWC: Pixels | None
    problem: str = ""


def run_show(
    output_url: str,
    checkpoint: str,
    *,
    keys: Sequence[str] | None = None,
    limit: int = 16,
    png: str = "show.png",
) -> int:
    """Write the contact sheet and say what is on it. Returns 1 when a key that was asked for has no row."""
    output = OutputPrefix(storage.normalize(output_url))
    run = require_run(output)
    tokenizer = load_matching_tokenizer(run, checkpoint, output.url)
    rows = rows_to_show(output, keys, limit)
    originals = Originals(output, run)
    found = [originals.of(row) for row in rows]
    storage.publish(png, sheet_png(rows, found, tokenizer, run))
    missing = _why_missing(output, {*(keys or ())} - {row["key"] for row in rows})
    _say(Console(), png, rows, found, missing)
    return 1 if missing else 0


def load_matching_tokenizer(run: dict[str, Any], checkpoint: str, output_url: str) -> Decoder:
    """The checkpoint's tokenizer. Raises RunMismatch when it isn't the one that made the tokens."""
    head = read_head(checkpoint)
    if head.tokenizer_id != run["tokenizer_id"]:
        raise RunMismatch(
            f"{output_url} was made by tokenizer {run['tokenizer_id']}, but {checkpoint} is {head.tokenizer_id}: "
            "its decoder would show nonsense; name the checkpoint of that run"
        )
    head.require_decoder()
    return TokenizerSource(head.url, device="auto", precision="fp32", batch_size=DECODE_BATCH, threads=1).load()


def rows_to_show(output: OutputPrefix, keys: Sequence[str] | None, limit: int) -> list[Row]:
    """The rows of `keys`, in that order, else the first `limit`. Raises PipelineError when there is none."""
    parts = [info.url for _, info in sorted(listed(output.tokens_folder()).items())]
    if not keys:
        rows = read_tokens(parts, limit=limit)
    else:
        place = {key: n for n, key in enumerate(keys)}
        rows = sorted(read_tokens(parts, keys=keys), key=lambda row: place[row["key"]])
    if not rows:
        wanted = f"no row has the key {', '.join(keys)}" if keys else "no token rows yet"
        raise PipelineError(f"{output.url}: {wanted}; `dvae status {output.url}` says how far it is")
    return rows


def sheet_png(rows: Sequence[Row], originals: Sequence[Original], decoder: Decoder, run: dict[str, Any]) -> bytes:
    grid: tuple[int, int] = tuple(run["grid"])
    tokens_BHW = np.stack([row["tokens"] for row in rows]).reshape(-1, *grid)
    return contact_sheet_png(
        {"original": [one.pixels_HWC for one in originals], "from tokens": decoder.decode(tokens_BHW)},
        [row["key"] for row in rows],
        notes=[str(row.get("caption") or "") for row in rows],
        title=f"{grid[0]}x{grid[1]} tokens each, of {run['codebook_size']:,} codes · tokenizer {run['tokenizer_id']}",
    )


class Originals:
    """Fetches what the encoder saw, by byte range; each shard is looked up once."""

    def __init__(self, output: OutputPrefix, run: dict[str, Any]) -> None:
        self._output, self._is_compacted = output, "compacted" in run
        self._spec = ImageSpec.from_json(run["image_spec"])
        self._problems: dict[str, str] = {}

    def of(self, row: Row) -> Original:
        shard = row["shard"]
        if shard not in self._problems:
            self._problems[shard] = self._problem(shard)
        if self._problems[shard]:
            return Original(None, self._problems[shard])
        if row["offset"] is None:
            return Original(None, f"{shard} is compressed, so no byte range of it can be fetched")
        try:
            data = storage.read_range(shard, row["offset"], row["size"])
            return Original(decode_image(data, self._spec).pixels_HWC)
        except (FileNotFoundError, StorageError, SampleError) as error:
            return Original(None, str(error))

    def _problem(self, shard: str) -> str:
        """Why the shard cannot be used; empty when it is as it was when it was tokenised."""
        try:
            (info,) = expand([shard])
            then = self._when_tokenised(shard)
        except (PipelineError, FileNotFoundError, ValueError) as error:
            return str(error)
        return "" if then == (info.size_bytes, info.etag) else f"{shard} has changed since it was tokenised"

    def _when_tokenised(self, shard: str) -> tuple[int, str]:
        if self._is_compacted:
            return shard_as_read(self._output, shard)
        footer = read_footer(self._output.part(part_name(shard)))
        return footer["shard_size"], footer["shard_etag"]


def _why_missing(output: OutputPrefix, keys: set[str]) -> dict[str, str]:
    """What the errors table says of keys that have no row."""
    why = dict.fromkeys(sorted(keys), "neither a row nor an error has this key")
    if keys:
        errors = read_table([info.url for info in listed(output.errors_folder()).values()]).to_pylist()
        why |= {row["key"]: f"{row['reason']}: {row['message']}" for row in errors if row["key"] in keys}
    return why


def _say(
    console: Console, png: str, rows: Sequence[Row], originals: Sequence[Original], missing: dict[str, str]
) -> None:
    console.print(f"{len(rows)} images, original and from tokens: {storage.normalize(png)}", markup=False)
    for problem in sorted({one.problem for one in originals if one.problem}):
        console.print(f"original not reachable: {problem}", markup=False)
    for key, why in missing.items():
        console.print(f"{key}: {why}", markup=False)
