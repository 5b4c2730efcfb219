"""Training on machines that go and come: a checkpoint first, and no step is lost or done twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.train_progress import Board, Status, strongest
from make_training import metric_lines, write_training_data

TESTS = Path(__file__).parent


@pytest.mark.ray
@pytest.mark.slow
def test_workers_leave_a_spot_machine_and_take_a_new_one_with_a_checkpoint_before_each(tmp_path: Path) -> None:
    """No checkpoint is due by its step, so those from which the groups go on are the ones made for the occasion."""
    write_training_data(tmp_path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    ended = subprocess.run(
        [sys.executable, str(TESTS / "train_nodes_go.py"), str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    line = next((line for line in ended.stdout.splitlines() if line.startswith("{")), None)
    assert line is not None, ended.stdout + ended.stderr
    report = json.loads(line)
    said = [words for _, words in report["said"]]
    groups = [words.split() for words in said if words.startswith("training with")]
    assert [int(words[2]) for words in groups] == [2, 1, 2], said
    first, second, third = (int(words[6]) for words in groups)
    assert first == 0 < second < third
    assert sum("the workers left a machine" in words for words in said) <= 1, (
        "or Train was faster, and made the group smaller"
    )
    assert not any("was lost" in words for words in said)
    assert report["code"] == 130
    lines = [line for line in metric_lines(tmp_path / "out") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(10, lines[-1]["step"] + 1, 10))
    assert lines[-1]["step"] > third
    assert all(line["num_images"] == 8 * line["step"] for line in lines)


def test_a_wish_for_a_checkpoint_is_met_once_and_a_stop_is_stronger() -> None:
    board = Board()
    assert board.report(Status(step=1)) == "go on"
    asked = board.ask_to_save()
    assert asked.status == Status(step=1)
    assert [board.report(Status(step=step)) for step in (2, 3)] == ["save", "go on"]
    board.ask_to_save()
    board.ask_to_stop()
    assert board.report(Status(step=4)) == "stop"
    assert strongest(["go on", "leave", "save"]) == "leave"
