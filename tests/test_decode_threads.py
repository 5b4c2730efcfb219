"""Threads that shards share: the oldest first, nothing lost, and an end."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, Future

import pytest

from pipeline.decode_threads import DecodeThreads

WAIT_S = 60.0


class Held:
    """One thread, kept busy until it is let go; what it did, in order."""

    def __init__(self) -> None:
        self.threads, self._go, begun = DecodeThreads(1), threading.Event(), threading.Event()
        self.done: list[str] = []

        def busy() -> None:
            begun.set()
            self._go.wait(WAIT_S)

        self.oldest = self.threads.next_shard()
        self.oldest.submit(busy)
        assert begun.wait(WAIT_S)

    def let_go(self, *futures: Future[None]) -> None:
        self._go.set()
        for future in futures:
            future.result(WAIT_S)


def test_an_older_shards_images_are_decoded_before_a_younger_ones_that_came_first() -> None:
    held = Held()
    younger = held.threads.next_shard()
    futures = [younger.submit(held.done.append, "younger 1"), younger.submit(held.done.append, "younger 2")]
    futures += [held.oldest.submit(held.done.append, "older 1"), held.oldest.submit(held.done.append, "older 2")]
    held.let_go(*futures)
    assert held.done == ["older 1", "older 2", "younger 1", "younger 2"]
    held.threads.close()


def test_what_was_cancelled_is_not_done_and_an_error_arrives_where_the_result_is_wanted() -> None:
    held = Held()
    cancelled, failing = held.oldest.submit(held.done.append, "never"), held.oldest.submit(int, "no number")
    assert cancelled.cancel()
    with pytest.raises(ValueError, match="no number"):
        held.let_go(failing)
    assert held.done == []
    held.threads.close()


def test_closing_ends_the_threads_and_leaves_nobody_waiting() -> None:
    held = Held()
    waiting = held.oldest.submit(held.done.append, "never")
    closing = threading.Thread(target=held.threads.close)
    closing.start()
    held.let_go()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    with pytest.raises(CancelledError):
        waiting.result(0)
    with pytest.raises(RuntimeError):
        held.oldest.submit(print)
