"""Training that waits for room, with stand-ins for Ray: whoever watches the run goes on watching."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from jobs import train_ray
from jobs.train_ray import train_on_ray
from jobs.train_worker import TrainJob
from make_training import config
from pipeline.errors import RunHeld


class Room:
    """A cluster that has room at the third look, each time that it is asked for."""

    def __init__(self, *_: Any) -> None:
        self._looks = 0

    def wait(self, timeout_seconds: float) -> bool:
        self._looks += 1
        return self._looks == 3


class Watch:
    """Counts the looks until the first group of workers, and until the second."""

    def __init__(self, most_looks: int) -> None:
        self.looks, self._most = 0, most_looks
        self.before_groups: list[int] = []

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None: ...

    def look(self) -> None:
        self.looks += 1
        if self.looks > self._most:
            raise RunHeld("another driver has it")

    def group(self, *_: Any) -> str:
        self.before_groups.append(self.looks)
        return "left" if len(self.before_groups) == 1 else "finished"


def train(monkeypatch: pytest.MonkeyPatch, folder: Path, watch: Watch) -> str:
    """How it ended, where the first workers leave a machine that is about to go."""
    monkeypatch.setattr(train_ray, "connected", lambda address: nullcontext())
    monkeypatch.setattr(train_ray, "Watch", lambda config, check: watch)
    monkeypatch.setattr(train_ray, "_one_group", watch.group)
    monkeypatch.setattr(train_ray, "_warn_of_a_local_output", lambda url: None)
    monkeypatch.setattr(train_ray, "placement_group", Room)
    monkeypatch.setattr(train_ray, "remove_placement_group", lambda group: None)
    monkeypatch.setattr(train_ray, "describe_resources", lambda: "nothing")
    return train_on_ray(TrainJob(config(folder, ray={"num_workers": 2, "address": "auto"}), (), ()), lambda: None)


def test_whoever_waits_for_room_looks_all_the_while_at_first_and_after_the_workers_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watch = Watch(most_looks=100)
    with caplog.at_level(logging.WARNING):
        assert train(monkeypatch, tmp_path, watch) == "finished"
    assert watch.before_groups == [2, 4]
    said = [record.getMessage() for record in caplog.records]
    assert "waiting up to 60 s for 2 workers" in said[0] and "waiting for 2 workers" in said[-1]


@pytest.mark.parametrize("most_looks", [1, 3])
def test_a_driver_that_lost_its_run_while_it_waits_for_room_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, most_looks: int
) -> None:
    with pytest.raises(RunHeld):
        train(monkeypatch, tmp_path, Watch(most_looks))
