"""`dvae train` in one process: what it leaves, and going on after a kill at any step."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from jobs import train_dvae, train_health, train_worker
from jobs.checkpoints import TokenizerSource, find_checkpoint
from jobs.model_card import card_of_training
from jobs.train_dvae import StepsPassed, run_training
from jobs.train_limits import Diverged, TooLittleMemory
from jobs.train_output import TrainOutput
from jobs.train_progress import Status, TrainingFailed, Wish
from jobs.train_ranks import OutOfMemory, Ranks
from jobs.train_worker import TrainJob, train
from make_training import config, metric_lines, settings, weights, write_training_data
from model.config import ModelError
from pipeline import storage
from pipeline.errors import RunHeld, StorageError
from pipeline.lease import Lease
from pipeline.rank_chart import HEIGHT, WIDTH

pytestmark = pytest.mark.training
STEPS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and beside it `calm`: the output of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("training")
    write_training_data(folder)
    assert run_training(config(folder, output=str(folder / "calm")), "dvae train") == 0
    return folder


class Dies(RuntimeError):
    """Stands for SIGKILL: nothing is saved on the way out."""


class DriverAt:
    """Kills training, or asks it to stop or to save, when it reports one of these steps; or its machine must go."""

    def __init__(
        self, *, kill: int | None = None, stop: int | None = None, save: int | None = None, leave: bool = False
    ) -> None:
        self._kill, self._stop, self._save, self._leave = kill, stop, save, leave

    def report(self, status: Status) -> Wish:
        if status.step == self._kill:
            raise Dies
        return "stop" if status.step == self._stop else "save" if status.step == self._save else "go on"

    def must_leave(self) -> bool:
        return self._leave


def interrupt(
    folder: Path,
    output: Path | str,
    driver: DriverAt,
    monkeypatch: pytest.MonkeyPatch,
    ending: str = "stopped",
    **changes: Any,
) -> None:
    """Train with a report at every step, until the driver ends it."""
    monkeypatch.setattr(train_worker, "BEAT_S", 0.0)
    settled = config(folder, output=str(output), **changes)
    shards = [tuple(found) for found in train_dvae._shards(settled)]
    ranks = Ranks.join(use_gpu=False, threads=1)
    try:
        assert train(TrainJob(settled, *shards), ranks, driver) == ending
    except Dies:
        return


def test_a_run_leaves_checkpoints_metrics_pictures_and_a_model(folder: Path) -> None:
    calm = folder / "calm"
    kept = sorted(path.name for path in (calm / "checkpoints").iterdir())
    assert kept == ["step-00000015", "step-00000020", "step-00000024"]
    record = json.loads((calm / "model" / "checkpoint.json").read_text())
    assert (record["step"], record["image_spec"]["size"]) == (STEPS, 16)
    lines = metric_lines(calm)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [4, 8, 12, 16, 20, 24]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [9, 18, 24]
    last = [line for line in lines if line["kind"] == "eval"][-1]
    assert {"psnr_soft", "psnr_hard", "ssim_soft", "ssim_hard", "perplexity", "used_share"} <= last.keys()
    assert last["num_images"] == 6
    picture = np.asarray(Image.open(calm / "pictures" / "step-00000024-reconstructions.png"))
    assert picture.shape == (2 * 20, 3 * 20, 3)  # two images; original, soft, hard; a frame around each
    assert Image.open(calm / "pictures" / "step-00000024-codes.png").size == (WIDTH, HEIGHT)


def test_the_model_has_a_card_of_its_own_without_secrets(folder: Path, tmp_path: Path) -> None:
    card = (folder / "calm" / "model" / "MODEL_CARD.md").read_text()
    record = json.loads((folder / "calm" / "model" / "checkpoint.json").read_text())
    last = [line for line in metric_lines(folder / "calm") if line["kind"] == "eval"][-1]
    assert record["tokenizer_id"] in card and f"{last['psnr_hard']:.2f} dB" in card
    assert "24 updates of 8 images" in card and "Images seen, repeats included: 192" in card
    assert "Not stated" in card, "no licence was set"
    record["extra"]["training_config"] |= {"license": "cc-by-4.0"}
    record["extra"]["training_config"]["data"]["train_shards"] = ["https://me:secret@store.example/a.tar?sig=secret"]
    text = card_of_training(record, []).decode()
    assert "cc-by-4.0" in text and "Never evaluated" in text
    assert "https://store.example/a.tar" in text and "secret" not in text


def test_what_is_wrong_is_said_once_written_down_and_said_again_at_the_end(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """After so few steps the tokens say nothing yet."""
    monkeypatch.setattr(train_worker, "BEAT_S", 0.0)
    monkeypatch.setattr(train_health, "EARLY_STEPS", 0)
    assert run_training(config(folder, output=str(tmp_path)), "dvae train") == 0
    said = [line for line in metric_lines(tmp_path) if line["kind"] == "health"]
    assert [(line["step"], [each["name"] for each in line["findings"]]) for line in said] == [(9, ["no-information"])]
    words = "the tokens say next to nothing of their image"
    assert [record.message.partition(", ")[0] for record in caplog.records if words in record.message] == [
        f"step 9: {words}"
    ]
    assert f"warning: {words}" in capsys.readouterr().out


def test_a_checkpoint_alone_tokenises_with_the_averaged_weights(folder: Path, tmp_path: Path) -> None:
    calm = folder / "calm"
    for name in ("checkpoint.json", "model.safetensors"):  # what resuming needs is no part of it
        (tmp_path / name).write_bytes((calm / "checkpoints" / "step-00000024" / name).read_bytes())
    images_BHWC = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    found = [
        TokenizerSource(str(url), device="cpu", precision="fp32", batch_size=4, threads=1).load()
        for url in (tmp_path, calm / "model", calm / "checkpoints" / "step-00000015")
    ]
    assert found[0].tokenizer_id == found[1].tokenizer_id != found[2].tokenizer_id
    assert np.array_equal(found[0].encode(images_BHWC), found[1].encode(images_BHWC))


@pytest.mark.parametrize("step", [1, 5, 7, 13, 18, 20, 23, 24])
def test_killed_at_any_step_and_run_again_the_weights_and_metrics_are_bit_identical(
    folder: Path, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(folder, tmp_path, DriverAt(kill=step), monkeypatch)
    assert run_training(config(folder, output=str(tmp_path)), "dvae train") == 0
    assert weights(tmp_path, STEPS) == weights(folder / "calm", STEPS)
    assert metric_lines(tmp_path) == metric_lines(folder / "calm")


def test_stopped_saves_a_checkpoint_at_once_and_goes_on_bit_identically(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(folder, tmp_path, DriverAt(stop=7), monkeypatch)
    assert TrainOutput(str(tmp_path)).checkpoints()[0] == str(tmp_path / "checkpoints" / "step-00000007")
    assert run_training(config(folder, output=str(tmp_path)), "dvae train") == 0
    assert weights(tmp_path, STEPS) == weights(folder / "calm", STEPS)
    assert metric_lines(tmp_path) == metric_lines(folder / "calm")


def test_a_wish_for_a_checkpoint_is_met_at_once_and_training_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(folder, tmp_path, DriverAt(save=3, stop=4), monkeypatch)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000004"]


def test_a_worker_whose_machine_is_about_to_go_leaves_after_a_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LeavesAt(DriverAt):
        def report(self, status: Status) -> Wish:
            self._leave = status.step >= 6  # heard at the next beat
            return super().report(status)

    interrupt(folder, tmp_path, LeavesAt(), monkeypatch, ending="left")
    assert TrainOutput(str(tmp_path)).checkpoints()[0] == str(tmp_path / "checkpoints" / "step-00000007")
    assert run_training(config(folder, output=str(tmp_path)), "dvae train") == 0
    assert weights(tmp_path, STEPS) == weights(folder / "calm", STEPS)


def test_one_worker_in_a_process_group_gives_the_same_bits_as_none(folder: Path, tmp_path: Path) -> None:
    """What `ray.num_workers=1` runs: DDP around the model, collectives over Gloo."""
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        assert run_training(config(folder, output=str(tmp_path)), "dvae train") == 0
    finally:
        distributed.destroy_process_group()
    assert weights(tmp_path, STEPS) == weights(folder / "calm", STEPS)
    assert metric_lines(tmp_path) == metric_lines(folder / "calm")


def test_a_checkpoint_without_its_record_is_passed_over(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(folder, tmp_path, DriverAt(kill=12), monkeypatch)
    (tmp_path / "checkpoints" / "step-00000010" / "checkpoint.json").unlink()
    assert TrainOutput(str(tmp_path)).checkpoints()[0] == str(tmp_path / "checkpoints" / "step-00000005")
    assert run_training(config(folder, output=str(tmp_path)), "dvae train") == 0
    assert weights(tmp_path, STEPS) == weights(folder / "calm", STEPS)
    assert metric_lines(tmp_path) == metric_lines(folder / "calm")


def test_a_finished_run_says_so_without_torch_and_without_ray(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(settings(folder, output=str(folder / "calm"), ray={"num_workers": 2})))
    program = (
        "import sys; from jobs.config import load_config; from jobs.train_config import TrainConfig\n"
        "from jobs.train_dvae import run_training\n"
        f"code = run_training(load_config(TrainConfig, {str(path)!r}), 'dvae train')\n"
        "sys.exit(code or 10 * ('ray' in sys.modules) + 20 * ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "all 24 steps are done" in done.stdout
    assert str(folder / "calm" / "model") in done.stdout


@pytest.mark.server
def test_trains_from_and_to_a_bucket(s3: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in [*(folder / "train").iterdir(), *(folder / "val").iterdir()]:
        storage.publish(f"{s3}/{path.parent.name}/{path.name}", path.read_bytes())
    data = {"train_shards": f"{s3}/train/made-*.tar", "val_shards": f"{s3}/val/made-*.tar"}
    interrupt(folder, f"{s3}/run", DriverAt(kill=12), monkeypatch, data=data)
    assert run_training(config(folder, output=f"{s3}/run", data=data), "dvae train") == 0
    kept = TrainOutput(f"{s3}/run").read_metrics()
    assert [line["step"] for line in kept if line["kind"] == "eval"] == [9, 18, 24]
    assert storage.read_bytes(f"{s3}/run/model/model.safetensors") == weights(folder / "calm", STEPS)[2]


@pytest.mark.parametrize("step", [10, STEPS])
def test_a_store_that_fails_while_training_leaves_a_run_to_go_on_with(
    folder: Path, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though checkpoints are published beside the steps that follow, or none follows."""

    def full(url: str, data: bytes) -> None:
        if f"checkpoints/step-{step:08d}" in url:
            raise StorageError(f"cannot write {url}: no space left")
        publish(url, data)

    publish = storage.publish
    with monkeypatch.context() as broken, pytest.raises(TrainingFailed, match=r"no space left.*goes on") as failed:
        broken.setattr(storage, "publish", full)
        run_training(config(folder, output=str(tmp_path)), "dvae train")
    assert failed.value.exit_code == 1
    assert run_training(config(folder, output=str(tmp_path)), "dvae train") == 0
    assert weights(tmp_path, STEPS) == weights(folder / "calm", STEPS)
    assert metric_lines(tmp_path) == metric_lines(folder / "calm")


def test_steps_go_on_while_a_checkpoint_is_published(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of step 5 is held up until step 10 is done; that of step 10 waits for it."""
    steps_go_on, published = threading.Event(), list[str]()

    class Watches(DriverAt):
        def report(self, status: Status) -> Wish:
            if status.step == 10:
                steps_go_on.set()
            return super().report(status)

    def slow(url: str, data: bytes) -> None:
        if "checkpoints/step-00000005" in url:
            assert steps_go_on.wait(60), "the checkpoint stops the steps"
            time.sleep(0.05)  # a checkpoint that does not wait for this one comes in between
        if "checkpoints/" in url:
            published.append(url.split("checkpoints/")[1].split("/")[0])
        publish(url, data)

    publish = storage.publish
    monkeypatch.setattr(storage, "publish", slow)
    interrupt(folder, tmp_path, Watches(stop=12), monkeypatch)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000005", "step-00000010", "step-00000012"]
    assert published == sorted(published), "a second checkpoint did not wait"
    monkeypatch.undo()
    assert run_training(config(folder, output=str(tmp_path)), "dvae train") == 0
    assert weights(tmp_path, STEPS) == weights(folder / "calm", STEPS)


@pytest.mark.parametrize("kill", [None, 7])
def test_steps_without_a_finite_loss_end_the_run_at_the_same_step_also_after_a_kill(
    folder: Path, tmp_path: Path, kill: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first update makes the weights huge, so that every step from the second on is skipped."""
    diverges = {"optim": {"lr": 1e30}, "max_skipped_steps": 10}
    if kill is not None:
        interrupt(folder, tmp_path, DriverAt(kill=kill), monkeypatch, **diverges)
        assert TrainOutput(str(tmp_path)).checkpoints()[0] == str(tmp_path / "checkpoints" / "step-00000005")
    with pytest.raises(Diverged, match=r"the last 10 of 11 steps .* max_skipped_steps=10.*optim\.lr") as ended:
        run_training(config(folder, output=str(tmp_path), **diverges), "dvae train")
    assert ended.value.exit_code == 1


def test_the_lines_that_led_to_a_failure_are_there_to_be_read(folder: Path, tmp_path: Path) -> None:
    """Though neither an evaluation nor a checkpoint came in between."""
    never = {"eval": {"every_steps": 1000}, "checkpoint": {"every_steps": 1000}, "log": {"every_steps": 2}}
    with pytest.raises(Diverged):
        diverging = config(folder, output=str(tmp_path), optim={"lr": 1e30}, max_skipped_steps=4, **never)
        run_training(diverging, "dvae train")
    assert [line["skipped_steps"] for line in TrainOutput(str(tmp_path)).read_metrics()] == [1, 3]


def test_more_steps_take_a_finished_run_further_and_what_tokenises_meanwhile_is_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    short = config(folder, output=str(tmp_path), steps=15)
    assert run_training(short, "dvae train") == 0
    assert find_checkpoint(str(tmp_path)) == str(tmp_path / "model") and "taking the model" not in caplog.text
    interrupt(folder, tmp_path, DriverAt(kill=22), monkeypatch)
    assert find_checkpoint(str(tmp_path)) == str(tmp_path / "model")
    newest = tmp_path / "checkpoints" / "step-00000020"
    assert f"taking the model of step 15; training went on to {newest}" in caplog.text
    assert run_training(config(folder, output=str(tmp_path)), "dvae train") == 0
    assert weights(tmp_path, STEPS) == weights(folder / "calm", STEPS)


def test_an_old_checkpoint_goes_with_what_a_killed_writer_left_in_it(tmp_path: Path) -> None:
    output = TrainOutput(str(tmp_path))
    output.save_checkpoint(1, {"checkpoint.json": b"{}"}, keep_last=1)
    (tmp_path / "checkpoints" / "step-00000001" / ".model.safetensors.0123.tmp").write_bytes(b"half")
    output.save_checkpoint(2, {"checkpoint.json": b"{}"}, keep_last=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_checkpoint_that_a_kill_left_half_written_goes_when_a_later_one_is_whole(tmp_path: Path) -> None:
    output = TrainOutput(str(tmp_path))
    for step, record in ((3, {}), (7, {"checkpoint.json": b"{}"})):
        output.save_checkpoint(step, {"model.safetensors": b"m", **record}, keep_last=2)
        assert (tmp_path / "checkpoints" / "step-00000003").exists() == (step == 3)
    output.save_checkpoint(9, {"checkpoint.json": b"{}"}, keep_last=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000007", "step-00000009"]


def test_tensorboard_has_every_figure_once_after_a_kill(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    interrupt(folder, tmp_path, DriverAt(kill=19), monkeypatch, log={"tensorboard": True})
    assert run_training(config(folder, output=str(tmp_path), log={"tensorboard": True}), "dvae train") == 0
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = [line for line in metric_lines(tmp_path) if line["kind"] == "train"]
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(line["step"], pytest.approx(line["loss"])) for line in lines]
    for picture in ("reconstructions", "codes"):
        assert [event.step for event in events.Images(picture)] == [9, 18, 24]


def test_damaged_checkpoints_are_passed_over_with_a_warning_and_never_all_of_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    interrupt(folder, tmp_path, DriverAt(kill=17), monkeypatch)
    newest, before = (tmp_path / "checkpoints" / f"step-{step:08d}" for step in (15, 10))
    (newest / "checkpoint.json").write_text("{")
    state = bytearray((before / "training.safetensors").read_bytes())
    state[-1] ^= 1
    (before / "training.safetensors").write_bytes(state)
    assert run_training(config(folder, output=str(tmp_path)), "dvae train") == 0
    assert all(f"{damaged.name} is passed over" in caplog.text for damaged in (newest, before))
    assert weights(tmp_path, STEPS) == weights(folder / "calm", STEPS)
    assert metric_lines(tmp_path) == metric_lines(folder / "calm")
    shutil.rmtree(tmp_path / "model")
    for kept in (tmp_path / "checkpoints").iterdir():
        (kept / "checkpoint.json").write_text("{")
    with pytest.raises(ModelError, match=r"none of the 3 checkpoints .* remove them to begin anew"):
        run_training(config(folder, output=str(tmp_path)), "dvae train")


def test_a_step_that_does_not_fit_into_the_gpu_ends_the_run_with_the_remedy(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: object) -> None:
        raise OutOfMemory("CUDA out of memory. Tried to allocate 20 GiB\nand more")

    monkeypatch.setattr("model.trainer.Trainer.train_step", too_large)
    with pytest.raises(TooLittleMemory, match=r"lower micro_batch_size .*\(CUDA out of memory.* 20 GiB\)$") as refused:
        run_training(config(folder, output=str(tmp_path)), "dvae train")
    assert refused.value.exit_code == 1


def test_a_model_is_published_without_the_card_that_could_not_be_made(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> bytes:
        raise KeyError("psnr_hard")

    monkeypatch.setattr(train_worker, "card_of_training", fails)
    assert run_training(config(folder, output=str(tmp_path), steps=4), "dvae train") == 0
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["checkpoint.json", "model.safetensors"]
    assert "no model card could be made" in caplog.text and "psnr_hard" in caplog.text


def test_fewer_steps_than_are_done_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(folder, tmp_path, DriverAt(stop=9), monkeypatch)
    with pytest.raises(StepsPassed, match="a checkpoint of step 9 already, and steps=6: raise steps, choose another"):
        run_training(config(folder, output=str(tmp_path), steps=6), "dvae train")
    assert not (tmp_path / "model").exists()


def test_a_driver_that_lost_its_lease_ends_and_writes_nothing_more(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_checks = 0

    def taken_over(self: Lease) -> None:
        nonlocal num_checks
        num_checks += 1
        if num_checks == 8:
            (tmp_path / "metrics.jsonl").unlink()  # it is another driver's now
            raise RunHeld("another driver took the run over")

    monkeypatch.setattr(train_worker, "BEAT_S", 0.0)
    monkeypatch.setattr(Lease, "check", taken_over)
    with pytest.raises(RunHeld):
        run_training(config(folder, output=str(tmp_path)), "dvae train")
    assert not (tmp_path / "metrics.jsonl").exists() and not (tmp_path / "model").exists()


def test_sigterm_stops_within_seconds_with_a_checkpoint_and_the_line_to_go_on(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(settings(folder, output=str(tmp_path / "out"), steps=100_000)))
    command = [sys.executable, "-m", "jobs.cli", "train", str(path)]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        wait_for(tmp_path / "out" / "metrics.jsonl", driver)
        os.kill(driver.pid, signal.SIGTERM)
        said, _ = driver.communicate(timeout=60)
    finally:
        driver.kill()
        driver.wait()
    assert driver.returncode == 130
    assert f"train {path}" in said
    assert TrainOutput(str(tmp_path / "out")).checkpoints()
    assert not (tmp_path / "out" / "lease.json").exists()


def wait_for(path: Path, process: subprocess.Popen[str], timeout_s: float = 60) -> None:
    give_up_at = time.monotonic() + timeout_s
    while not path.exists():
        assert process.poll() is None, "ended too early"
        assert time.monotonic() < give_up_at, f"never {path}"
        time.sleep(0.02)
