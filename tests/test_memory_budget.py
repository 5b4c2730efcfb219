"""Threads share a number of bytes: no more than that is held, in the order of asking, and nobody waits for ever."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.memory_budget import MemoryBudget


def test_no_more_is_held_than_there_is_and_all_that_ask_get_it() -> None:
    budget, lock, held, most = MemoryBudget(100), threading.Lock(), 0, 0

    def use(num_bytes: int) -> int:
        nonlocal held, most
        with budget.hold(num_bytes):
            with lock:
                held += num_bytes
                most = max(most, held)
            time.sleep(0.001)
            with lock:
                held -= num_bytes
        return num_bytes

    claims = [1 + 37 * n % 99 for n in range(200)]
    with ThreadPoolExecutor(8) as executor:
        assert sum(executor.map(use, claims)) == sum(claims)
    assert held == 0 and 50 < most <= 100


def test_a_claim_above_the_whole_is_held_alone() -> None:
    budget, inside = MemoryBudget(100), list[int]()

    def use(num_bytes: int) -> None:
        with budget.hold(num_bytes):
            inside.append(num_bytes)
            assert 1000 not in inside or inside == [1000]
            time.sleep(0.002)
            inside.remove(num_bytes)

    with ThreadPoolExecutor(6) as executor:
        assert len(list(executor.map(use, [1, 1000, 2, 1000, 3, 40, 1000, 4] * 5))) == 40


def test_a_large_claim_is_not_passed_by_small_ones_that_came_later() -> None:
    budget, order = MemoryBudget(100), list[str]()
    asked = threading.Event()

    def large() -> None:
        asked.set()
        with budget.hold(100):
            order.append("large")

    def small() -> None:
        with budget.hold(10):
            order.append("small")

    with ThreadPoolExecutor(4) as executor:
        with budget.hold(50):
            first = executor.submit(large)
            assert asked.wait(60)
            while not budget._queue:
                time.sleep(0.001)
            later = [executor.submit(small) for _ in range(3)]
            time.sleep(0.05)
            assert order == []  # 50 are free, and the large one is first in the queue
        for future in (first, *later):
            future.result(timeout=60)
    assert order == ["large", "small", "small", "small"]


def test_an_error_gives_back_what_was_held() -> None:
    budget = MemoryBudget(10)
    for _ in range(3):
        with pytest.raises(RuntimeError), budget.hold(10):
            raise RuntimeError
    with budget.hold(10):
        pass
