"""Which shards use the codes otherwise than the rest of their run: a wrong model, a wrong normalisation, or other
images. Pure functions of histograms; who counts them is token_stats.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# S shards, G groups of codes; counts are of tokens
Counts = NDArray[np.integer[Any]]
Bits = NDArray[np.float64]

NOISE_TIMES = 3.0  # what chance explains is allowed so often
SPREAD_TIMES = 10.0  # of the way from the lower quartile of shards to the median: 6.7 sigma, if normal
LEAST_SPREAD = 0.5  # or this share of the median, whichever is more: quartiles of a few shards say little
MOST_BITS = 0.5  # of a limit: above it even the shard of another model may pass, so it tells nothing
TRIMS = 3  # after so many choices of the half that agrees the choice stands
BLOCK_VALUES = 1 << 20  # of counts that are turned into floats at a time


@dataclass(frozen=True)
class Drift:
    """By shard, in bits: its divergence from the half of the shards that agree best (0 alike, 1 no code in common; NaN
    without tokens), what chance alone would give, and the threshold above which it stands out, 1 at most. `clumping`:
    so many tokens count as one, for those of an image go together."""

    divergence_S: Bits
    noise_S: Bits
    threshold_S: Bits
    clumping: float

    def standing_out(self) -> NDArray[np.intp]:
        """Numbers of the shards above their threshold, the furthest first."""
        return self.furthest()[: int((self.divergence_S > self.threshold_S).sum())]

    def num_untold(self) -> int:
        """Shards of which nothing is told: chance, or how unlike the images of shards are, explains nearly anything."""
        return int((self.threshold_S[~np.isnan(self.divergence_S)] > MOST_BITS).sum())

    def furthest(self) -> NDArray[np.intp]:
        """Numbers of all shards that have tokens, by how far they are above their threshold, or below it."""
        order_S = np.argsort(self.threshold_S - self.divergence_S, kind="stable")  # NaN comes last
        return order_S[: int((~np.isnan(self.divergence_S)).sum())]


def entropy_bits(counts_SG: Counts) -> Bits:
    """(S,) order-0 entropy of each histogram; 0 where it is empty."""
    return _by_blocks(_entropy, counts_SG)


def divergence_bits(one_SG: Counts, other_SG: Counts) -> Bits:
    """(S,) Jensen-Shannon divergence of histograms, row by row: H((p + q) / 2) - (H(p) + H(q)) / 2 (Lin, IEEE
    Transactions on Information Theory 37, 1991). Zero for the same shares, 1 for no group in common, NaN where either
    is empty."""
    return _by_blocks(_divergence, one_SG, other_SG)


def drift_of(groups_SG: Counts, halves_S: Bits, tokens_per_image: int) -> Drift:
    """`halves_S`: divergence of each shard's even rows from its odd ones, which measures chance: that of a shard with n
    tokens from a larger rest is near (G - 1) / 8n nats, of its halves from each other near 4 (G - 1) / 8n (both from
    the second-order term, Σ(p - q)² / 8m)."""
    tokens_S = groups_SG.sum(axis=1, dtype=np.int64)
    in_reference_S = tokens_S > 0
    free = max(1, int((groups_SG.sum(axis=0, dtype=np.int64) > 0).sum()) - 1)
    chance = free / (8 * math.log(2))
    clumping = _clumping(halves_S, chance, tokens_S, tokens_per_image)
    for _ in range(TRIMS):
        divergence_S, others_S = _from_reference(groups_SG, tokens_S, in_reference_S)
        noise_S = clumping * chance * (_over(tokens_S) + _over(others_S))
        in_reference_S = _nearest_half(divergence_S - noise_S)
    threshold_S = np.minimum(NOISE_TIMES * noise_S + _usual_excess(divergence_S - noise_S), 1.0)
    return Drift(divergence_S, noise_S, threshold_S, clumping)


def _usual_excess(excess_S: Bits) -> float:
    """The most by which a shard like the others differs beyond chance, for images differ from shard to shard. Taken
    from the lower half, where odd shards do not come. 1, above which nothing is, for two shards: nobody can tell how
    much is usual, nor which of them is odd."""
    known_S = np.maximum(excess_S[~np.isnan(excess_S)], 0.0)
    if len(known_S) < 3:
        return 1.0
    quartile, median = np.quantile(known_S, (0.25, 0.5))
    return float(median + max(SPREAD_TIMES * (median - quartile), LEAST_SPREAD * median))


def _clumping(halves_S: Bits, chance: float, tokens_S: NDArray[np.int64], tokens_per_image: int) -> float:
    """As many tokens as one free choice takes (Kish's design effect): the median shard's."""
    seen_S = ~np.isnan(halves_S) & (tokens_S > 0)
    if not seen_S.any():  # no shard has two images: no two tokens of one count
        return float(tokens_per_image)
    return max(1.0, float(np.median(halves_S[seen_S] * tokens_S[seen_S])) / (4 * chance))


def _from_reference(
    groups_SG: Counts, tokens_S: NDArray[np.int64], in_reference_S: NDArray[np.bool_]
) -> tuple[Bits, NDArray[np.int64]]:
    """Each shard's divergence from those in the reference, itself left out, and how many tokens those have."""
    reference_G = groups_SG[in_reference_S].sum(axis=0, dtype=np.int64)
    own_S1 = in_reference_S[:, None]
    divergence_S = _by_blocks(
        lambda groups, own: _divergence(groups, reference_G - np.where(own, groups, 0)), groups_SG, own_S1
    )
    return divergence_S, reference_G.sum() - np.where(in_reference_S, tokens_S, 0)


def _nearest_half(excess_S: Bits) -> NDArray[np.bool_]:
    """At least two of them, so that each has another to be held against."""
    num_known = int((~np.isnan(excess_S)).sum())
    nearest = np.argsort(excess_S, kind="stable")[: min(num_known, max(2, (num_known + 1) // 2))]
    chosen_S = np.zeros(len(excess_S), bool)
    chosen_S[nearest] = True
    return chosen_S


def _over(counts_S: NDArray[np.int64]) -> Bits:
    return 1.0 / np.maximum(counts_S, 1)


def _entropy(counts_SG: Counts) -> Bits:
    with np.errstate(divide="ignore", invalid="ignore"):
        shares_SG = counts_SG / counts_SG.sum(axis=1, keepdims=True)
        return np.asarray(-np.nansum(shares_SG * np.log2(shares_SG), axis=1)) + 0.0  # no minus zero


def _divergence(one_SG: Counts, other_SG: Counts) -> Bits:
    with np.errstate(divide="ignore", invalid="ignore"):
        p_SG = one_SG / one_SG.sum(axis=1, keepdims=True)
        q_SG = other_SG / other_SG.sum(axis=1, keepdims=True)
        m_SG = (p_SG + q_SG) / 2
        sides = [np.nansum(x_SG * np.log2(x_SG / m_SG), axis=1) for x_SG in (p_SG, q_SG)]
    bits_S = np.clip((sides[0] + sides[1]) / 2, 0.0, 1.0)
    return np.where(np.isnan(m_SG).any(axis=1), np.nan, bits_S)


def _by_blocks(function: Any, *arrays_S: NDArray[Any]) -> Bits:
    """`function` of some rows at a time: as floats all of them would take many times their room."""
    rows = max(1, BLOCK_VALUES // max(1, arrays_S[0].shape[1]))
    starts = range(0, len(arrays_S[0]), rows)
    blocks = [function(*(array[start : start + rows] for array in arrays_S)) for start in starts]
    return np.concatenate(blocks) if blocks else np.empty(0)
