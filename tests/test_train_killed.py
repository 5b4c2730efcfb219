"""Training killed with SIGKILL at random steps and in the middle of a checkpoint, and run again: bit for bit what a run
leaves that nothing disturbed. One worker as the command runs it, two as Ray Train runs them."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from make_training import metric_lines, weights, write_training_data
from train_processes import Kill, run_alone, run_ranks, run_two

pytestmark = pytest.mark.training
STEPS = 24
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and beside it `calm`: what one worker leaves that nothing disturbs."""
    folder = tmp_path_factory.mktemp("killed")
    write_training_data(folder)
    assert run_alone(folder, folder / "calm") == 0
    return folder


@pytest.fixture
def dice() -> random.Random:
    """Another in each run of the tests; DVAE_TEST_SEED=n throws the same again."""
    seed = os.environ.get("DVAE_TEST_SEED") or str(random.randrange(10**6))
    print(f"DVAE_TEST_SEED={seed}")  # noqa: T201 - shown where the test fails
    return random.Random(seed)


def same(output: Path, calm: Path) -> None:
    """Averaged weights, optimiser and all else of the state, the finished model, and the metrics."""
    assert weights(output, STEPS) == weights(calm, STEPS)
    assert metric_lines(output) == metric_lines(calm)


def test_one_worker_killed_at_three_random_steps_ends_bit_identically(
    folder: Path, tmp_path: Path, dice: random.Random
) -> None:
    for step in sorted(dice.sample(range(1, STEPS), 3)):
        print(f"killed at step {step}")  # noqa: T201
        assert run_alone(folder, tmp_path / "killed", Kill(step=step)) == KILLED
    assert run_alone(folder, tmp_path / "killed") == 0
    same(tmp_path / "killed", folder / "calm")


def test_killed_in_the_middle_of_checkpoints_it_goes_on_from_whole_ones(
    folder: Path, tmp_path: Path, dice: random.Random
) -> None:
    """Of five checkpoints with three files each; the record that makes a checkpoint whole is the third."""
    for num_files in (dice.randrange(3), dice.randrange(3, 9)):
        print(f"killed at file {num_files}")  # noqa: T201
        assert run_alone(folder, tmp_path / "killed", Kill(num_files=num_files)) == KILLED
        left = sorted((tmp_path / "killed" / "checkpoints").glob("*/checkpoint.json"))
        assert len(left) == num_files // 3
    assert run_alone(folder, tmp_path / "killed") == 0
    same(tmp_path / "killed", folder / "calm")
    assert not list(tmp_path.rglob("*.tmp"))


def test_two_workers_one_of_them_killed_at_three_random_steps_end_bit_identically(
    folder: Path, tmp_path: Path, dice: random.Random
) -> None:
    assert run_two(folder, tmp_path / "calm") == [0, 0]
    for step in sorted(dice.sample(range(1, STEPS), 3)):
        rank = dice.randrange(2)
        print(f"rank {rank} killed at step {step}")  # noqa: T201
        codes = run_two(folder, tmp_path / "killed", Kill(step=step, rank=rank))
        assert codes[rank] == KILLED and codes[1 - rank] != 0
    assert run_two(folder, tmp_path / "killed") == [0, 0]
    same(tmp_path / "killed", tmp_path / "calm")


def test_three_workers_killed_at_a_random_step_end_bit_identically(
    folder: Path, tmp_path: Path, dice: random.Random
) -> None:
    """Of three numbers the order of adding decides the last bit, and it hangs on where DDP puts a gradient."""
    assert run_ranks(3, folder, tmp_path / "calm") == [0, 0, 0]
    step = dice.randrange(8, STEPS)
    print(f"killed at step {step}")  # noqa: T201
    assert run_ranks(3, folder, tmp_path / "killed", Kill(step=step))[0] == KILLED
    assert run_ranks(3, folder, tmp_path / "killed") == [0, 0, 0]
    same(tmp_path / "killed", tmp_path / "calm")
