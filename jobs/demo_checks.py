"""The demo looks at its own results: what the held-out tiles became, and whether every promise holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.contact_sheet import psnr_db
from jobs.demo_damage import ODD_FILES
from jobs.demo_images import MARGIN_PX, overlaps
from jobs.demo_queries import TOTALS, ask
from jobs.report_page import Check
from jobs.show import Decoder, Original, Originals, Pixels, Row
from pipeline.errors import PipelineError
from pipeline.output import OutputPrefix, listed
from pipeline.pictures import Box, crop_to_square
from pipeline.token_table import read_table, read_tokens

# B images, H W rows and columns (of tokens, or of pixels), C colours

LEAST_PSNR_DB = 20.0
LARGEST_GAP_DB = 1.0
LEAST_USED_SHARE = 0.25
LARGEST_DRIFT_DB = 0.1  # between the stored tokens (fp32) and the training's own evaluation (its precision)


@dataclass(frozen=True)
class HeldOut:
    """The held-out tiles as they are, and as their stored tokens say."""

    rows: tuple[Row, ...]
    original_BHWC: Pixels
    decoded_BHWC: Pixels
    grid: tuple[int, int]
    used_codes: int

    @property
    def psnr_db(self) -> float:
        return psnr_db(self.original_BHWC, self.decoded_BHWC)

    @property
    def thumbnail_psnr_db(self) -> float:
        """Of as many plain pixels as there are tokens, enlarged: what a code must beat."""
        side, size = self.grid[0], self.original_BHWC.shape[1]
        small = (crop_to_square(tile, (0, 0, size, size), side) for tile in self.original_BHWC)
        return psnr_db(self.original_BHWC, np.stack([crop_to_square(t, (0, 0, side, side), size) for t in small]))


def read_rows(output: OutputPrefix) -> list[Row]:
    return read_tokens([info.url for _, info in sorted(listed(output.tokens_folder()).items())])


def look_at_held_out(output: OutputPrefix, run: dict[str, Any], rows: Sequence[Row], decoder: Decoder) -> HeldOut:
    """Decode the tokens of every held-out row, beside the images that they were made from."""
    held_out = tuple(row for row in rows if row["split"] == "heldout")
    tokens_BHW = np.stack([row["tokens"] for row in held_out]).reshape(-1, *run["grid"])
    originals = Originals(output, run)
    pixels = [_pixels(originals.of(row), row) for row in held_out]
    return HeldOut(
        held_out,
        np.stack(pixels),
        decoder.decode(tokens_BHW),
        grid=(run["grid"][0], run["grid"][1]),
        used_codes=len(np.unique(tokens_BHW)),
    )


def _pixels(original: Original, row: Row) -> Pixels:
    if original.pixels_HWC is None:
        raise PipelineError(f"the original of {row['key']} cannot be read: {original.problem}")
    return original.pixels_HWC


def check_all(
    output: OutputPrefix, run: dict[str, Any], num_packed: int, rows: Sequence[Row], held_out: HeldOut, evaluation: Row
) -> tuple[Check, ...]:
    """Every claim of the demo. `evaluation` is the training's last line of that kind."""
    return (
        *_accounted(output, run, num_packed),
        _own_reasons(output, rows),
        _kept_apart(rows),
        *_quality(run, held_out, evaluation),
    )


def _accounted(output: OutputPrefix, run: dict[str, Any], num_packed: int) -> tuple[Check, Check]:
    totals = ask(output.url, TOTALS)
    num_rows, num_errors, shortest, longest, lowest, highest = totals.rows[0]
    num_tokens, codes = run["grid"][0] * run["grid"][1], run["codebook_size"]
    return (
        Check(
            "token rows + error rows = images packed",
            num_rows + num_errors == num_packed,
            f"{num_rows:,} + {num_errors:,} = {num_rows + num_errors:,} of {num_packed:,}",
        ),
        Check(
            f"every row has {num_tokens} tokens in [0, {codes})",
            (shortest, longest) == (num_tokens, num_tokens) and 0 <= lowest <= highest < codes,
            f"{shortest} to {longest} tokens between {lowest} and {highest}",
        ),
    )


def _own_reasons(output: OutputPrefix, rows: Sequence[Row]) -> Check:
    """Damaged files, and only they, are in the errors table, each with its reason; the odd good one is a row."""
    errors = read_table([info.url for info in listed(output.errors_folder()).values()]).to_pylist()
    found = {row["key"]: row["reason"] for row in errors}
    expected = {odd.key: odd.reason.value for odd in ODD_FILES if odd.reason is not None}
    good = {odd.key for odd in ODD_FILES if odd.reason is None}
    tokenised = good <= {row["key"] for row in rows}
    said = ", ".join(f"{key}: {reason}" for key, reason in sorted(found.items()))
    claim = f"every damaged file has its own reason, and {' and '.join(sorted(good))} is tokenised"
    return Check(claim, found == expected and tokenised, said + ("" if tokenised else f"; no row for {sorted(good)}"))


def _kept_apart(rows: Sequence[Row]) -> Check:
    """From the table's own columns: the held-out regions, grown by the margin, meet no training tile."""
    train = _boxes(rows, "train", 0)
    clashes = sum(
        overlaps(tile, other)
        for source, boxes in _boxes(rows, "heldout", MARGIN_PX).items()
        for tile in boxes
        for other in train.get(source, ())
    )
    claim = f"no training tile comes within {MARGIN_PX} pixels of a held-out tile"
    return Check(claim, clashes == 0, f"{clashes} such pairs")


def _boxes(rows: Sequence[Row], split: str, margin: int) -> dict[str, list[Box]]:
    found: dict[str, list[Box]] = {}
    for row in rows:
        if row["split"] == split:
            left, top, side = row["x"], row["y"], row["region_px"]
            box = (left - margin, top - margin, left + side + margin, top + side + margin)
            found.setdefault(row["source"], []).append(box)
    return found


def _quality(run: dict[str, Any], held_out: HeldOut, evaluation: Row) -> tuple[Check, ...]:
    hard, gap = held_out.psnr_db, evaluation["psnr_soft"] - evaluation["psnr_hard"]
    drift, used = abs(hard - evaluation["psnr_hard"]), held_out.used_codes / run["codebook_size"]
    return (
        Check(f"held-out tiles come back with at least {LEAST_PSNR_DB:g} dB", hard >= LEAST_PSNR_DB, f"{hard:.2f} dB"),
        Check(
            f"plain tokens (argmax) are within {LARGEST_GAP_DB:g} dB of the soft relaxation",
            gap <= LARGEST_GAP_DB,
            f"soft {evaluation['psnr_soft']:.2f}, argmax {evaluation['psnr_hard']:.2f} dB",
        ),
        Check(
            f"held-out tiles use at least {LEAST_USED_SHARE:.0%} of the codes",
            used >= LEAST_USED_SHARE,
            f"{held_out.used_codes} of {run['codebook_size']}, {used:.0%}",
        ),
        Check(
            "the stored tokens decode to what the training measured",
            drift <= LARGEST_DRIFT_DB,
            f"{hard:.2f} from the table, {evaluation['psnr_hard']:.2f} dB in training",
        ),
    )


def code_uses(rows: Sequence[Row], codebook_size: int) -> NDArray[np.int64]:
    """How often each code stands in `rows`."""
    return np.bincount(np.concatenate([row["tokens"] for row in rows]), minlength=codebook_size)
