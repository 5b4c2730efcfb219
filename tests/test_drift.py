"""Which shards stand out: those of another model do, those that differ by chance or by what they show do not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pipeline.drift import Drift, divergence_bits, drift_of, entropy_bits

# S shards, R images (rows) of a shard, N tokens of an image, K codes

NUM_CODES, NUM_TOKENS, NUM_ROWS = 256, 32, 150
RNG = np.random.default_rng(0)
SHARES_K = RNG.dirichlet(np.full(NUM_CODES, 0.5))
OTHER_MODEL_K = RNG.permutation(NUM_CODES)  # its codes mean other things


def alike(rng: np.random.Generator, num_rows: int = NUM_ROWS) -> np.ndarray:
    return rng.choice(NUM_CODES, (num_rows, NUM_TOKENS), p=SHARES_K)


def of_some_topic(rng: np.random.Generator, num_rows: int = NUM_ROWS) -> np.ndarray:
    return rng.choice(NUM_CODES, (num_rows, NUM_TOKENS), p=rng.dirichlet(SHARES_K * 200))


def of_like_images(rng: np.random.Generator, num_rows: int = NUM_ROWS) -> np.ndarray:
    """Each image repeats a few codes."""
    few = rng.choice(NUM_CODES, (num_rows, NUM_TOKENS // 8), p=SHARES_K)
    return np.repeat(few, 8, axis=1)


def drift(shards: list[np.ndarray]) -> Drift:
    counts_SK = np.stack([np.bincount(tokens.ravel(), minlength=NUM_CODES) for tokens in shards])
    even_SK, odd_SK = (
        np.stack([np.bincount(tokens[first::2].ravel(), minlength=NUM_CODES) for tokens in shards]) for first in (0, 1)
    )
    return drift_of(counts_SK, divergence_bits(even_SK, odd_SK), NUM_TOKENS)


def test_entropy_is_that_of_the_textbook() -> None:
    assert entropy_bits(np.array([[5, 5, 5, 5], [9, 0, 0, 0], [0, 0, 0, 0], [2, 1, 1, 0]])).tolist() == [2, 0, 0, 1.5]


def test_divergence_is_that_of_the_textbook() -> None:
    one = np.array([[3, 1], [7, 0], [2, 0], [0, 0]])
    other = np.array([[6, 2], [0, 1], [1, 1], [1, 1]])
    assert divergence_bits(one, other) == pytest.approx([0, 1, 0.31127812, np.nan], nan_ok=True)


def test_many_rows_are_counted_in_blocks_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = RNG.integers(0, 9, (50, 7))
    whole = divergence_bits(counts, counts[::-1]), entropy_bits(counts)
    monkeypatch.setattr("pipeline.drift.BLOCK_VALUES", 20)
    np.testing.assert_array_equal(divergence_bits(counts, counts[::-1]), whole[0])
    np.testing.assert_array_equal(entropy_bits(counts), whole[1])


@pytest.mark.parametrize("make", [alike, of_like_images])
def test_what_chance_gives_is_told_right_from_the_halves_of_shards(make: Callable[..., np.ndarray]) -> None:
    found = drift([make(np.random.default_rng(seed), num_rows=600) for seed in range(30)])
    assert np.median(found.divergence_S / found.noise_S) == pytest.approx(1.0, abs=0.2)
    assert found.standing_out().size == 0
    assert found.clumping == pytest.approx(8 if make is of_like_images else 1, rel=0.35)


@pytest.mark.parametrize("make", [alike, of_like_images, of_some_topic])
@pytest.mark.parametrize("num_shards", [3, 5, 40])
def test_the_shard_of_another_model_stands_out_and_no_other(make: Callable[..., np.ndarray], num_shards: int) -> None:
    shards = [make(np.random.default_rng(seed)) for seed in range(num_shards)]
    assert drift(shards).standing_out().size == 0
    shards[2] = OTHER_MODEL_K[shards[2]]
    assert drift(shards).standing_out().tolist() == [2]


def test_two_fifths_of_wrong_shards_do_not_hide_each_other() -> None:
    shards = [of_some_topic(np.random.default_rng(seed)) for seed in range(40)]
    shards[:16] = [OTHER_MODEL_K[tokens] for tokens in shards[:16]]
    assert set(drift(shards).standing_out()) == set(range(16))


def test_a_small_shard_is_allowed_more_than_a_large_one() -> None:
    found = drift([alike(np.random.default_rng(seed), num_rows=4 + 40 * seed) for seed in range(12)])
    assert found.standing_out().size == 0
    assert found.noise_S[0] > 5 * found.noise_S[-1]


def test_of_two_shards_neither_is_named_for_nobody_knows_which_one_is_odd() -> None:
    one, other = (alike(np.random.default_rng(seed)) for seed in (0, 1))
    assert drift([one, other]).standing_out().size == 0
    found = drift([one, OTHER_MODEL_K[other]])
    assert found.standing_out().size == 0
    assert found.divergence_S.min() > 10 * found.noise_S.max()


def test_shards_of_few_images_have_a_limit_that_tells_nothing_and_say_so() -> None:
    small = [alike(np.random.default_rng(seed), num_rows=2) for seed in range(9)]
    large = [alike(np.random.default_rng(seed)) for seed in range(20, 31)]
    found = drift(small)
    assert found.num_untold() == 9 and found.threshold_S.max() <= 1.0
    assert drift(large).num_untold() == 0
    assert drift([*large, small[0]]).num_untold() == 1


def test_shards_without_rows_and_a_shard_alone_are_held_against_nothing() -> None:
    none = np.empty((0, NUM_TOKENS), int)
    assert drift([alike(RNG)]).furthest().size == 0
    assert drift([none, none]).furthest().size == 0
    shards = [none, *(alike(np.random.default_rng(seed)) for seed in range(4)), none]
    shards[3] = OTHER_MODEL_K[shards[3]]
    found = drift(shards)
    assert found.standing_out().tolist() == [3]
    assert sorted(found.furthest()) == [1, 2, 3, 4]


def test_groups_of_codes_never_make_a_difference_larger() -> None:
    """So that what stands out by groups does so by codes."""
    one, other = (of_some_topic(np.random.default_rng(seed)) for seed in (0, 1))
    bits = [
        divergence_bits(*(np.bincount(tokens.ravel() % groups, minlength=groups)[None] for tokens in (one, other)))[0]
        for groups in (4, 16, 64, NUM_CODES)
    ]
    assert bits == sorted(bits) and bits[0] < bits[-1]
