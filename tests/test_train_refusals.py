"""What `dvae train` refuses, or ends for: the output of another run, shards and machines that will not do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.train_dvae import TrainedOnHeldOut, run_training
from jobs.train_evaluation import NothingHeldOut
from jobs.train_limits import TooMuchBadData
from jobs.train_output import TrainOutput, claim
from jobs.train_ranks import NoGpu
from make_data import write_shards
from make_training import config, metric_lines, settings, write_training_data
from pipeline.errors import NoShardsMatched, RunHeld, RunMismatch
from pipeline.lease import Lease
from pipeline.output import OutputPrefix

pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and beside it `calm`: the output of a short run."""
    folder = tmp_path_factory.mktemp("refused")
    write_training_data(folder)
    assert run_training(config(folder, output=str(folder / "calm"), steps=4), "dvae train") == 0
    return folder


@pytest.mark.parametrize(
    ("changes", "field", "theirs", "mine"),
    [
        ({"seed": 6}, "seed", "5", "6"),
        ({"model": {"width": 16}}, "model.width", "8", "16"),
        ({"data": {"num_streams": 2}}, "data.num_streams", "4", "2"),
        ({"schedule": {"kl_weight": {"end": 2.0, "steps": 10}}}, "schedule.kl_weight.end", "0.001", "2.0"),
    ],
)
def test_another_config_in_the_same_output_is_refused(
    folder: Path, changes: dict[str, Any], field: str, theirs: str, mine: str
) -> None:
    with pytest.raises(RunMismatch, match=rf"{field} is {theirs} there and {mine} here") as refused:
        run_training(config(folder, output=str(folder / "calm"), **changes), "dvae train")
    assert refused.value.exit_code == 2


def test_other_shards_in_the_same_output_are_refused(folder: Path, tmp_path: Path) -> None:
    more = tmp_path / "more"
    write_shards(more, (5, 23, 11, 2))
    with pytest.raises(RunMismatch, match=r"data\.train_shards is '3 shards, .* there and '4 shards, "):
        run_training(config(folder, output=str(folder / "calm"), data={"train_shards": str(more)}), "dvae train")


def test_an_output_that_holds_tokens_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"format": 1, "tokenizer_id": "abc"}))
    with pytest.raises(RunMismatch, match="a run of another kind"):
        run_training(config(folder, output=str(tmp_path)), "dvae train")


def test_a_second_driver_is_told(folder: Path, tmp_path: Path) -> None:
    with Lease(OutputPrefix(str(tmp_path))), pytest.raises(RunHeld) as held:
        run_training(config(folder, output=str(tmp_path)), "dvae train")
    assert held.value.exit_code == 3


def test_shards_that_match_nothing_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NoShardsMatched, match=r"nowhere-\*\.tar"):
        run_training(config(folder, output=str(tmp_path), data={"train_shards": "nowhere-*.tar"}), "dvae train")
    assert not (tmp_path / "run.json").exists()


def test_a_shard_on_both_sides_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainedOnHeldOut, match=r"made-000000\.tar is in data\.train_shards and in data\.val_shards"):
        run_training(config(folder, output=str(tmp_path), data={"val_shards": str(folder / "train")}), "dvae train")


def test_a_gpu_that_is_not_there_is_said(folder: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(NoGpu, match=r"ray\.use_gpu=false"):
        run_training(config(folder, output=str(tmp_path), ray={"use_gpu": True}), "dvae train")


def test_a_refused_start_does_not_hold_the_output_for_its_settings(folder: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(NoGpu):
        run_training(config(folder, output=str(tmp_path), precision="bf16", ray={"use_gpu": True}), "dvae train")
    assert run_training(config(folder, output=str(tmp_path), steps=4), "dvae train") == 0
    assert json.loads((tmp_path / "run.json").read_text())["identity"]["precision"] == "fp32"
    with pytest.raises(RunMismatch, match="precision is 'fp32' there"):
        run_training(config(folder, output=str(tmp_path), steps=4, precision="bf16"), "dvae train")


def test_a_run_that_another_driver_has_just_begun_keeps_its_settings(folder: Path, tmp_path: Path) -> None:
    claim(TrainOutput(str(tmp_path)), {"seed": 1})
    before = (tmp_path / "run.json").read_bytes()
    with Lease(OutputPrefix(str(tmp_path))), pytest.raises(RunHeld):
        run_training(config(folder, output=str(tmp_path)), "dvae train")
    assert (tmp_path / "run.json").read_bytes() == before


def test_an_output_that_cannot_be_written_is_one_line_and_exit_code_2(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(settings(folder, output="/proc/nope/out")))
    command = [sys.executable, "-m", "jobs.cli", "train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, "DVAE_LOG": "ERROR"})
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert "cannot create /proc/nope/out/lease.json" in line and "check the bucket or the folder" in line


def test_held_out_shards_without_a_usable_image_are_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NothingHeldOut, match=r"data\.val_shards"):
        run_training(config(folder, output=str(tmp_path), image={"size": 16, "small": "refuse"},
                            data={"val_shards": str(empty_shard(tmp_path / "empty"))}), "dvae train")  # fmt: skip


def empty_shard(path: Path) -> Path:
    write_shards(path, (0,))
    return path


def test_an_unreadable_shard_is_over_the_budget_unless_it_was_allowed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.training_samples.RETRY_PAUSE_S", 0.0)
    damaged = tmp_path / "damaged"
    write_shards(damaged, (5, 9, 9))
    cut = damaged / "made-000001.tar"
    cut.write_bytes(cut.read_bytes()[:4096])
    data = {"train_shards": str(damaged)}
    with pytest.raises(TooMuchBadData, match=r"made-000001\.tar.*data\.max_failed_shards=0") as failed:
        run_training(config(folder, output=str(tmp_path / "strict"), data=data), "dvae train")
    assert failed.value.exit_code == 1
    allowed = {**data, "max_failed_shards": 1}
    assert run_training(config(folder, output=str(tmp_path / "lenient"), data=allowed), "dvae train") == 0
    lines = [line for line in metric_lines(tmp_path / "lenient") if line["kind"] == "train"]
    assert lines[-1]["num_failed_shards"] == 1


def test_too_many_bad_images_end_the_run(folder: Path, tmp_path: Path) -> None:
    """Half of them are smaller than the model's images, which is refused here."""
    with pytest.raises(TooMuchBadData, match=r"of \d+ training images are bad.*data\.max_failed_samples=0\.05"):
        run_training(config(folder, output=str(tmp_path), data=mixed_sizes(tmp_path / "mixed"),
                            image={"size": 32, "small": "refuse"}, eval={"every_steps": 0}), "dvae train")  # fmt: skip


def mixed_sizes(path: Path) -> dict[str, Any]:
    from make_data import image_bytes, tar_bytes

    path.mkdir()
    members = [(f"{n}.jpg", image_bytes(n, width=24 + 20 * (n % 2), height=40)) for n in range(40)]
    (path / "mixed.tar").write_bytes(tar_bytes(members))
    return {"train_shards": str(path), "val_shards": []}
