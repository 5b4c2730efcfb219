"""`dvae train` on Ray Train: several workers, a killed driver, a killed worker, a cluster that is too small."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.cluster import ClusterError
from jobs.metrics import run_label
from jobs.train_dvae import run_training
from jobs.train_output import TrainOutput
from jobs.train_progress import TrainingFailed
from make_data import write_shards
from make_training import config, metric_lines, settings, weights, write_training_data
from scrape import scraped
from test_monitoring import missing
from train_processes import run_two

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("fast_polls")]
TWO = {"num_workers": 2}
MARK = "DVAE_TEST_RUN"  # in the environment of every process that a driver brings about


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    write_training_data(folder)
    return folder


@pytest.fixture
def fast_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores have enough to do: Train's controller looks more often, and starts no watcher of spot nodes."""
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_killed_with_their_driver_go_on_bit_identically(folder: Path, tmp_path: Path) -> None:
    """On unequal shards. Nothing of the killed driver is left when the same command runs again. (At three random steps
    and by the worker: test_train_killed.py.)"""
    mark = uuid.uuid4().hex
    driver = start_driver(folder, tmp_path / "killed", mark, steps=1_000_000, ray=TWO)
    try:
        wait_until(lambda: newest_step(tmp_path / "killed") >= 10, driver)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        assert survivors(mark) == []
    finally:
        end(driver, mark)
    steps = newest_step(tmp_path / "killed") + 25  # they may have gone on for a while without their driver
    assert run_two(folder, tmp_path / "calm", steps=steps) == [0, 0]
    assert run_training(config(folder, output=str(tmp_path / "killed"), steps=steps, ray=TWO), "dvae train") == 0
    assert weights(tmp_path / "killed", steps) == weights(tmp_path / "calm", steps)
    assert metric_lines(tmp_path / "killed") == metric_lines(tmp_path / "calm")


@pytest.mark.usefixtures("ray_cluster")
def test_all_that_monitoring_asks_for_is_exported_and_is_what_the_metrics_say(folder: Path, tmp_path: Path) -> None:
    steps = 24
    assert run_training(config(folder, output=str(tmp_path / "watched"), steps=steps, ray=TWO), "dvae train") == 0
    output = TrainOutput(str(tmp_path / "watched"))
    run, lines = run_label(output.url), output.read_metrics()
    found = scraped(lambda found: found.value("ray_dvae_train_step", run=run) == steps)
    assert not missing(found, "train", run)
    trained, evaluated = ([line for line in lines if line["kind"] == kind][-1] for kind in ("train", "eval"))
    for name, figure in {"loss": "loss", "learning_rate": "lr", "used_share": "used_share"}.items():
        assert found.value(f"ray_dvae_train_{name}", run=run) == trained[figure], name
    decibels = {"soft": evaluated["psnr_soft"], "hard": evaluated["psnr_hard"]}
    assert found.values("ray_dvae_train_psnr_decibels", by="way", run=run) == decibels
    assert (found.value("ray_dvae_train_workers", run=run), found.value("ray_dvae_train_steps", run=run)) == (2, steps)
    assert found.value("ray_dvae_train_checkpoint_step", run=run) == output.newest_step()


@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_without_room_is_said_after_the_stated_wait(folder: Path, tmp_path: Path) -> None:
    ray = {"num_workers": 4, "use_gpu": True, "wait_s": 1}
    wanted = r"no room for 4 workers with .*'GPU': 1.* within 1 s \(ray\.wait_s\): .* of 2 GPUs free"
    with pytest.raises(ClusterError, match=wanted) as refused:
        run_training(config(folder, output=str(tmp_path), ray=ray), "dvae train")
    assert refused.value.exit_code == 2
    for remedy in ("ray.num_workers", "ray.use_gpu", "ray.gpus_per_worker", "ray.cpus_per_worker"):
        assert remedy in str(refused.value)
    recipe = Path("configs/demo_train.yaml")
    assert str(recipe) in str(refused.value) and (Path(__file__).parent.parent / recipe).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGKILL, "was lost"), (signal.SIGTERM, "the workers left a machine")]
)
def test_a_worker_killed_or_told_to_go_is_replaced_within_the_same_run(
    folder: Path, tmp_path: Path, number: int, words: str
) -> None:
    steps, mark = 400, uuid.uuid4().hex
    driver = start_driver(folder, tmp_path / "hurt", mark, steps=steps, ray=TWO)
    try:
        wait_until(lambda: newest_step(tmp_path / "hurt") >= 20, driver)
        os.kill(named(mark, "RayTrainWorker")[0], number)
        said = driver.communicate(timeout=120)[0]
    finally:
        end(driver, mark)
    assert driver.returncode == 0, said
    assert words in said
    assert run_two(folder, tmp_path / "calm", steps=steps) == [0, 0]
    assert weights(tmp_path / "hurt", steps) == weights(tmp_path / "calm", steps)
    assert metric_lines(tmp_path / "hurt") == metric_lines(tmp_path / "calm")


@pytest.mark.slow
def test_ctrl_c_stops_all_workers_within_seconds_with_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    driver = start_driver(folder, tmp_path / "out", mark, steps=1_000_000, ray=TWO)
    try:
        wait_until(lambda: newest_step(tmp_path / "out") >= 20, driver)
        os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: the whole group
        said = driver.communicate(timeout=90)[0]
        assert survivors(mark) == []
    finally:
        end(driver, mark)
    assert driver.returncode == 130, said
    assert f"train {tmp_path / 'out.yaml'}" in said


@pytest.mark.slow
@pytest.mark.parametrize("started", ["lease", "TrainController", "RayTrainWorker"])
def test_sigterm_while_workers_are_starting_stops_within_seconds(folder: Path, tmp_path: Path, started: str) -> None:
    mark, lease = uuid.uuid4().hex, tmp_path / "out" / "lease.json"
    driver = start_driver(folder, tmp_path / "out", mark, steps=1_000_000, ray=TWO)
    try:
        wait_until(lambda: lease.exists() if started == "lease" else bool(named(mark, started)), driver)
        driver.send_signal(signal.SIGTERM)
        said = driver.communicate(timeout=90)[0]
        assert survivors(mark) == []
    finally:
        end(driver, mark)
    assert driver.returncode == 130, said
    assert f"train {tmp_path / 'out.yaml'}" in said
    assert not lease.exists()


@pytest.mark.slow
def test_a_worker_lost_too_often_ends_the_run_with_its_reason(folder: Path, tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    driver = start_driver(folder, tmp_path / "out", mark, steps=1_000_000, ray={**TWO, "max_failures": 0})
    try:
        wait_until(lambda: newest_step(tmp_path / "out") >= 5, driver)
        os.kill(named(mark, "RayTrainWorker")[0], signal.SIGKILL)
        said = driver.communicate(timeout=60)[0]
    finally:
        end(driver, mark)
    assert driver.returncode == 1, said
    assert "dvae: training failed once more than ray.max_failures allows; rank" in said


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_an_error_that_would_only_come_again_is_not_tried_again(folder: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "damaged", (5, 9))
    cut = tmp_path / "damaged" / "made-000001.tar"
    cut.write_bytes(cut.read_bytes()[:4096])
    with pytest.raises(TrainingFailed, match=r"made-000001\.tar.*data\.max_failed_shards=0") as failed:
        run_training(config(folder, output=str(tmp_path / "out"), data={"train_shards": str(tmp_path / "damaged")},
                            ray={"num_workers": 2, "max_failures": -1}), "dvae train")  # fmt: skip
    assert failed.value.exit_code == 1


def start_driver(folder: Path, output: Path, mark: str, **changes: Any) -> subprocess.Popen[str]:
    """`dvae train` with a Ray of its own, in a session of its own."""
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings(folder, output=str(output), **changes)))
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "train", str(path)],
        start_new_session=True,
        env={**os.environ, MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def newest_step(output: Path) -> int:
    return TrainOutput(str(output)).newest_step()


def wait_until(there: Callable[[], bool], driver: subprocess.Popen[str], timeout_s: float = 180) -> None:
    give_up_at = time.monotonic() + timeout_s
    while not there():
        assert driver.poll() is None, f"ended too early: {driver.communicate()[0]}"
        assert time.monotonic() < give_up_at, "never came"
        time.sleep(0.005)


def marked(mark: str) -> list[int]:
    """The ids of the processes that have the mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it has just ended
            continue
    return found


def named(mark: str, name: str) -> list[int]:
    """Those marked processes that Ray has given this name."""
    return [process for process in marked(mark) if command_line(process).startswith(f"ray::{name}")]


def command_line(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text().strip("\0")
    except OSError:
        return ""


def survivors(mark: str, patience_s: float = 60) -> list[str]:
    """What is left then; but for Ray's agents, which look for their cluster for a minute and touch nothing of ours."""
    give_up_at = time.monotonic() + patience_s
    while True:
        lines = {command_line(process) for process in marked(mark)}
        left = [line for line in lines if not line.startswith(("ray::DashboardAgent", "ray::RuntimeEnvAgent"))]
        if not left or time.monotonic() > give_up_at:
            return left
        time.sleep(0.1)


def end(driver: subprocess.Popen[str], mark: str) -> None:
    for process in marked(mark):
        os.kill(process, signal.SIGKILL)
    driver.kill()
    driver.communicate()
