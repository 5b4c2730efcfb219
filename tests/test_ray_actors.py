"""What each of Ray's errors means to the pool. The errors are Ray's own, raised here without a cluster."""

from __future__ import annotations

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    UnserializableException,
)

from jobs.ray_actors import Answer, Died, Outcome, Raised, RayActors, Unreachable
from pipeline.errors import ShardTruncated


def outcome(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> Outcome:
    def get(call: object) -> str:
        if error is not None:
            raise error
        return "value"

    monkeypatch.setattr("jobs.ray_actors.ray.get", get)
    return RayActors.outcome(object.__new__(RayActors), "call")


def task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("tokenize", "Traceback", cause)


def test_an_answer_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome(monkeypatch, None) == Answer("value")  # type: ignore[arg-type]


def test_what_the_actor_raised_arrives_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    cause = ShardTruncated("a.tar", "cut")
    assert outcome(monkeypatch, task_error(cause)) == Raised(cause)


def test_of_an_error_that_could_not_travel_the_words_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    cause = RayError("Exception Odd isn't serializable\nTraceback\n  line 1\nOdd: what was said\n")
    raised = outcome(monkeypatch, task_error(cause))
    assert isinstance(raised, Raised) and not isinstance(raised.error, RayError)
    assert str(raised.error) == "Exception Odd isn't serializable … Odd: what was said"
    assert isinstance(outcome(monkeypatch, UnserializableException(b"")), Died)


def test_an_actor_killed_for_memory_died_and_the_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    died = outcome(monkeypatch, OutOfMemoryError("Task was killed due to the node running low on memory.\nMore.\nTips"))
    assert died == Died("Task was killed due to the node running low on memory. … Tips")


def test_an_actor_that_went_with_its_node_is_told_from_one_that_died_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome(monkeypatch, ActorDiedError()) == Died("The actor died unexpectedly before finishing this task.")
    for gone in (
        RayActorError("id", "The actor died.", preempted=True),
        RayActorError("id", "The actor died.\nThe actor died because its node has died. Node Id: 1\n\tterminated"),
    ):
        died = outcome(monkeypatch, gone)
        assert isinstance(died, Died) and died.with_node


def test_an_actor_that_cannot_be_reached_is_not_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(outcome(monkeypatch, ActorUnavailableError("connection reset", None)), Unreachable)
