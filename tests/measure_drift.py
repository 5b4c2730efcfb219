"""Which mistakes `dvae stats` sees: python tests/measure_drift.py DEMO_OUTPUT (of `make demo`).

The demo's images in an order of chance, as shards of 160; one of them is encoded again as by mistake. Prints a line
for each mistake: how far that shard is from the others, its limit, how far the furthest other is, and what is named."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from jobs.api import Tokenizer, load_tokenizer
from jobs.show import Originals
from jobs.stats import read_stats
from make_tokens_run import TokensRun
from pipeline.token_run import TokenRun
from pipeline.token_table import TableSpec

# B images, H W pixel rows and columns, C channels; N tokens of an image

ODD, NUM_SHARDS = 3, 20
Encode = Callable[[np.ndarray], np.ndarray]


def mistakes(tokenizer: Tokenizer, earlier: Tokenizer) -> Iterator[tuple[str, Encode]]:
    yield "none", tokenizer.encode
    yield "an earlier checkpoint", earlier.encode
    yield "half the range", lambda pixels: tokenizer.encode(pixels // 2)
    yield "blue for red", lambda pixels: tokenizer.encode(np.ascontiguousarray(pixels[..., ::-1]))
    yield "a tenth brighter", lambda pixels: tokenizer.encode((pixels * 1.1).clip(0, 255).astype(np.uint8))
    yield (
        "half the size, enlarged",
        lambda pixels: tokenizer.encode(np.repeat(np.repeat(pixels[:, ::2, ::2], 2, axis=1), 2, axis=2)),
    )


def look(table: TableSpec, shards: list[np.ndarray]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        made = TokensRun(folder, table)
        for number, tokens_BN in enumerate(shards):
            made.add(f"/in/{number:02d}.tar", tokens_BN)
        stats = read_stats(TokenRun.open(folder))
    by_name = {shard.shard: shard for shard in stats.shards}
    odd = by_name.pop(f"/in/{ODD:02d}.tar")
    others = max(shard.divergence_bits for shard in by_name.values())
    named = [shard.shard for shard in stats.shards if shard.stands_out]
    return f"{odd.divergence_bits:.4f} bits, limit {odd.threshold_bits:.4f}, others up to {others:.4f}; named: {named}"


def main() -> None:
    demo = sys.argv[1]
    run = TokenRun.open(f"{demo}/tokenised")
    columns = ["key", "shard", "offset", "size", "tokens"]
    rows = [row for part in run.parts for row in run.read_part(part, columns).to_pylist()]
    shards = np.array_split(np.random.default_rng(0).permutation(len(rows)), NUM_SHARDS)
    tokens = [np.array([rows[n]["tokens"] for n in shard]) for shard in shards]
    originals = Originals(run.output, dict(run.description))
    pixels_BHWC = np.stack([originals.of(rows[n]).pixels_HWC for n in shards[ODD]])
    earlier = load_tokenizer(f"{demo}/training/checkpoints/step-00000900")
    for name, encode in mistakes(load_tokenizer(f"{demo}/training"), earlier):
        tokens[ODD] = encode(pixels_BHWC).reshape(len(pixels_BHWC), -1)
        sys.stdout.write(f"{name:<26}{look(replace(run.table, columns=()), tokens)}\n")


if __name__ == "__main__":
    main()
