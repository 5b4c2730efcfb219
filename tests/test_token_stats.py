"""Counting tokens: the counts are those of a plain loop, whichever way they are come by."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from make_data import fake_table
from make_tokens_run import TokensRun, damage_tokens, zipf_tokens
from pipeline import token_stats
from pipeline.drift import divergence_bits
from pipeline.errors import StorageError
from pipeline.token_run import TokenRun
from pipeline.token_stats import TokenCounts, count_parts, number_of_groups
from pipeline.token_table import TableSpec

TABLE = fake_table(grid=(2, 3), codebook_size=50)


def rows(num_rows: int, seed: int = 0) -> np.ndarray:
    return zipf_tokens(num_rows, TABLE, seed).astype(np.int16)


def counted(parts: list[np.ndarray], num_groups: int = 50, step: int = 1000) -> TokenCounts:
    counts = TokenCounts(TABLE, len(parts), num_groups)
    for number, tokens_BN in enumerate(parts):
        counts.count_part(number, (tokens_BN[start : start + step] for start in range(0, len(tokens_BN), step)))
    return counts


def assert_same(one: TokenCounts, other: TokenCounts) -> None:
    for name in ("uses_K", "positions_NK", "num_rows_P", "groups_PG", "halves_P"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_codes_and_places_are_counted_as_by_a_plain_loop() -> None:
    parts = [rows(70, seed=1), rows(0), rows(33, seed=2)]
    counts = counted(parts, num_groups=7)
    every = np.concatenate(parts)
    assert {code: uses for code, uses in enumerate(counts.uses_K) if uses} == Counter(every.ravel().tolist())
    assert counts.positions_NK is not None
    for place in range(TABLE.num_tokens):
        np.testing.assert_array_equal(counts.positions_NK[place], np.bincount(every[:, place], minlength=50))
    assert counts.num_rows_P.tolist() == [70, 0, 33]
    np.testing.assert_array_equal(counts.groups_PG[2], np.bincount(parts[2].ravel() % 7, minlength=7))
    halves = [np.bincount(parts[0][first::2].ravel() % 7, minlength=7)[None] for first in (0, 1)]
    assert counts.halves_P[0] == divergence_bits(*halves)[0]
    assert np.isnan(counts.halves_P[1])


@pytest.mark.parametrize("step", [1, 2, 7, 64])
def test_batches_of_any_size_give_the_same_counts(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [rows(70), rows(33, seed=2)]
    whole = counted(parts)
    assert_same(counted(parts, step=step), whole)
    monkeypatch.setattr(token_stats, "TOKENS_AT_ONCE", 40)  # six rows
    assert_same(counted(parts, step=step), whole)


def test_what_is_counted_elsewhere_is_put_together_to_the_same_counts() -> None:
    parts = [rows(20 + n, seed=n) for n in range(7)]
    together = TokenCounts(TABLE, 7, 50)
    for first, end in ((3, 7), (0, 3)):
        together.put(first, pickle.loads(pickle.dumps(counted(parts[first:end]))))
    assert_same(together, counted(parts))


@pytest.mark.parametrize("strange", [-1, 50, 32_767])
def test_a_token_that_is_no_code_is_refused_and_what_came_before_is_counted(strange: int) -> None:
    good, bad = rows(9), rows(9, seed=1)
    bad[4, 2] = strange
    counts = TokenCounts(TABLE, 1, 50)
    with pytest.raises(ValueError, match=rf"{strange}.*outside \[0, 50\)"):
        counts.count_part(0, [good, bad, good])
    assert_same(counts, counted([good]))


def test_memory_has_a_limit_whatever_the_number_of_parts_codes_and_tokens() -> None:
    large = TableSpec("x", (64, 64), 65_536, {})
    assert TokenCounts(large, 1, 16).positions_NK is None
    for num_parts in (1, 1000, 8192, 1_000_000):
        groups = number_of_groups(large, num_parts, num_rows=10_000 * num_parts)
        assert groups == min(65_536, token_stats.COUNTERS // num_parts)
    assert number_of_groups(large, 5_000_000, 10**9) == token_stats.LEAST_GROUPS
    assert number_of_groups(TABLE, 10, 10**6) == 50
    assert number_of_groups(large, 10, num_rows=10) == 4096 // token_stats.TOKENS_A_GROUP
    assert number_of_groups(TABLE, 0, 0) == token_stats.LEAST_GROUPS


def test_of_more_images_than_a_counter_holds_nothing_is_said_of_places() -> None:
    counts = counted([rows(9)])
    counts.num_rows_P[0] = 2**32 - 1
    assert counts.position_entropy_bits() is not None
    counts.num_rows_P[0] = 2**32
    assert counts.position_entropy_bits() is None


@pytest.fixture
def run(tmp_path: Path) -> TokensRun:
    made = TokensRun(str(tmp_path / "out"), TABLE)
    for number in range(6):
        made.add(f"/in/{number}.tar", rows(40 + number, seed=number))
    return made


def test_all_parts_of_a_run_are_counted(run: TokensRun) -> None:
    opened = TokenRun.open(run.output.url)
    counts = TokenCounts(TABLE, 6, 50)
    assert list(count_parts(opened, opened.parts, counts)) == [(number, "") for number in range(6)]
    assert_same(counts, counted([rows(40 + number, seed=number) for number in range(6)]))


def test_a_damaged_part_is_named_and_the_others_are_counted(run: TokensRun) -> None:
    opened = TokenRun.open(run.output.url)
    damage_tokens(opened.parts[2].url)
    counts = TokenCounts(TABLE, 6, 50)
    problems = dict(count_parts(opened, opened.parts, counts))
    assert opened.parts[2].name in problems.pop(2)
    assert set(problems.values()) == {""}
    assert counts.num_rows_P.tolist() == [40, 41, 0, 43, 44, 45]


def test_a_store_that_is_gone_ends_it_instead_of_a_million_problems(
    run: TokensRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = TokenRun.open(run.output.url)
    for part in opened.parts[1:]:
        Path(part.url).unlink()
    monkeypatch.setattr(token_stats, "MOST_UNREAD", 3)
    with pytest.raises(StorageError, match="more than 3 parts cannot be read"):
        list(count_parts(opened, opened.parts, TokenCounts(TABLE, 6, 50)))


def test_any_number_of_damaged_parts_is_an_answer(run: TokensRun, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = TokenRun.open(run.output.url)
    for part in opened.parts[1:]:
        damage_tokens(part.url)
    monkeypatch.setattr(token_stats, "MOST_UNREAD", 3)
    counts = TokenCounts(TABLE, 6, 50)
    assert [bool(problem) for _, problem in count_parts(opened, opened.parts, counts)] == [False] + 5 * [True]
    assert counts.num_rows_P.tolist() == [40, 0, 0, 0, 0, 0]
