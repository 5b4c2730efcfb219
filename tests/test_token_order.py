"""Which token row comes when: each once an epoch, in any number of shares, well mixed, the same for ever."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.token_order import CHUNK_ROWS, Share, ShareOrder

# P parts, R rows

WHOLE = Share(0, 1)

PARTS = {
    "one row": [1],
    "one part": [5000],
    "parts of all sizes": [0, 1, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 0, 0, 3 * CHUNK_ROWS, 17, 0],
    "many small ones": [7] * 500,
    "fewer rows than shares": [1, 0, 1],
}


def rows_of(
    sizes: list[int], share: Share = WHOLE, seed: int = 0, epoch: int = 0, shuffle_rows: int = 4096
) -> NDArray[np.int64]:
    """Numbers of the rows of a share in the order in which they come; of the run, counted as they are stored."""
    order = ShareOrder(np.array(sizes), seed=seed, epoch=epoch, shuffle_rows=shuffle_rows, share=share)
    first_P = np.cumsum([0, *sizes])
    windows = [np.empty(0, np.int64)]
    for window in range(order.num_windows):
        stored = [np.arange(span.start, span.stop) + first_P[span.part] for span in order.spans(window)]
        windows.append(np.concatenate(stored)[order.row_order(window)])
    found_R = np.concatenate(windows)
    assert len(found_R) == order.num_rows
    return found_R


@pytest.mark.parametrize("sizes", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("count", [1, 2, 3, 8, 41])
@pytest.mark.parametrize("shuffle_rows", [0, 1, 100, CHUNK_ROWS, 10**6])
def test_each_row_comes_once_an_epoch_in_any_number_of_shares(sizes: list[int], count: int, shuffle_rows: int) -> None:
    shares = [rows_of(sizes, Share(n, count), seed=3, epoch=2, shuffle_rows=shuffle_rows) for n in range(count)]
    assert sorted(np.concatenate(shares)) == list(range(sum(sizes)))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1 and lengths == sorted(lengths, reverse=True)


def test_without_shuffling_rows_come_as_they_are_stored() -> None:
    assert rows_of([5, 0, 3000, 4], shuffle_rows=0).tolist() == list(range(3009))
    assert rows_of([5, 0, 3000, 4], Share(1, 2), shuffle_rows=0).tolist() == list(range(1505, 3009))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    orders = {(seed, epoch): rows_of([5000, 3], seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)}
    assert np.array_equal(orders[1, 1], rows_of([5000, 3], seed=1, epoch=1))
    assert len({order.tobytes() for order in orders.values()}) == 4


def test_the_order_is_what_it_always_was() -> None:
    """States lie in checkpoints: another order needs another ORDER_VERSION."""
    found_R = rows_of([5000, 0, 300, 2048], Share(1, 3), seed=7, epoch=2, shuffle_rows=1000)
    assert found_R[:5].tolist() == [2455, 2959, 3340, 3684, 3020]
    assert hashlib.sha256(found_R.astype("<i8").tobytes()).hexdigest()[:16] == "06f469aa30c4cdbd"


@pytest.mark.parametrize("shuffle_rows", [500, CHUNK_ROWS, 10_000])
def test_windows_are_about_as_long_as_asked_for(shuffle_rows: int) -> None:
    order = ShareOrder(np.full(100, 1000), seed=0, epoch=0, shuffle_rows=shuffle_rows, share=Share(1, 2))
    lengths = [sum(map(len, order.spans(window))) for window in range(order.num_windows)]
    assert sum(lengths) == 50_000 and max(lengths) < shuffle_rows + CHUNK_ROWS
    assert len(lengths) >= 50_000 // (shuffle_rows + CHUNK_ROWS)


def test_every_row_is_found_in_its_window() -> None:
    order = ShareOrder(np.array([5000, 3, 900, 2100]), seed=0, epoch=0, shuffle_rows=1000, share=Share(1, 3))
    windows = [order.window_of(row) for row in range(order.num_rows)]
    for window in range(order.num_windows):
        first = order.first_row(window)
        assert windows[first : first + len(order.row_order(window))] == [window] * len(order.row_order(window))
    assert order.window_of(order.num_rows) == order.num_windows


def test_rows_are_mixed_nearly_as_by_a_perfect_shuffle() -> None:
    """200 parts of 1,000 rows: where a row comes says nothing of where it was stored, and rows that come one after
    the other are rarely of one part (in a perfect shuffle 1 in 200; a window holds 50 parts)."""
    found_R = rows_of([1000] * 200, shuffle_rows=65_536)
    assert abs(np.corrcoef(found_R, np.arange(len(found_R)))[0, 1]) < 0.1
    assert np.mean(np.abs(found_R - np.arange(len(found_R)))) == pytest.approx(len(found_R) / 3, rel=0.1)
    part_R = found_R // 1000
    assert np.mean(part_R[1:] == part_R[:-1]) < 1 / 45


@pytest.mark.parametrize(("number", "count"), [(-1, 2), (2, 2), (0, 0)])
def test_a_share_that_is_none_is_refused(number: int, count: int) -> None:
    with pytest.raises(ValueError, match="is not one of"):
        Share(number, count)
