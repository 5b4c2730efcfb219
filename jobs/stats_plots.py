"""The pictures of `dvae stats --plots`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jobs.stats import Stats
from pipeline import storage
from pipeline.pictures import encode_png
from pipeline.rank_chart import draw_ranked
from pipeline.stats_pictures import Pixels, draw_against_limits, draw_map


def write_plots(stats: Stats, folder: str) -> list[str]:
    """Their URLs. Raises StorageError."""
    written = []
    for name, pixels_HWC in _pictures(stats):
        written.append(storage.join(storage.normalize(folder), name))
        storage.publish(written[-1], encode_png(pixels_HWC))
    return written


def _pictures(stats: Stats) -> Iterator[tuple[str, Pixels]]:
    uses_K = np.asarray(stats.code_uses)
    yield (
        "code-use.png",
        draw_ranked(
            uses_K,
            title="How often each code is used",
            note=f"{stats.used_codes:,} of {stats.codebook_size:,} are, in {stats.num_images:,} images",
            x_label="codes, the most used first",
            y_label="uses",
        ),
    )
    if stats.position_entropy_bits is not None:
        yield (
            "positions.png",
            draw_map(
                np.asarray(stats.position_entropy_bits),
                title="Entropy of each place in the grid",
                note="bits a token; a place that says less has fewer codes, or some far more often",
            ),
        )
    if stats.shards:
        yield (
            "shards.png",
            draw_against_limits(
                np.array([shard.divergence_bits for shard in stats.shards]),
                np.array([shard.threshold_bits for shard in stats.shards]),
                title="How far each shard's use of the codes is from that of the others",
                note=f"{stats.num_standing_out:,} of {stats.num_parts:,} stand out; dashes are the limits",
                x_label=f"shards, the furthest above its limit first ({len(stats.shards):,} of {stats.num_parts:,})",
                y_label="bits",
            ),
        )
