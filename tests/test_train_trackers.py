"""Trackers: told every figure once, through kills; a failing or missing one ends nothing; no secret is told or said."""

from __future__ import annotations

import json
import logging
import sys
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs import train_trackers
from jobs.train_config import LogConfig, MlflowConfig, TrainConfig, WandbConfig
from jobs.train_dvae import run_training
from jobs.train_metrics import Journal
from jobs.train_output import TrainOutput
from jobs.train_state import public_settings
from jobs.train_trackers import (
    NowhereToKeep,
    RunFacts,
    TrackerMissing,
    Trackers,
    check_trackers,
    newer,
    open_trackers,
    run_facts,
)
from make_training import config, settings, write_training_data

FACTS = RunFacts("abc", "run", {"optim": {"lr": 1e-3}}, "/nowhere")
PNG = {"codes": b"png"}


def lines(*steps: int) -> list[dict[str, Any]]:
    return [{"kind": "train", "step": step, "loss": step / 2, "unix_s": 1.0} for step in steps]


class Remembers:
    """A tracker with a memory that outlives it, as a server's does."""

    def __init__(self, memory: list[int]) -> None:
        self.memory, self.closed = memory, False

    def send(self, lines: Sequence[Mapping[str, Any]], pictures: Mapping[str, bytes]) -> None:
        self.memory += [line["step"] for line in newer(lines, max(self.memory, default=-1))]

    def close(self, *, finished: bool) -> None:
        self.closed = finished


def trackers(monkeypatch: pytest.MonkeyPatch, make: Any) -> Trackers:
    monkeypatch.setattr(train_trackers, "_wandb", lambda config, facts: make())
    return open_trackers(LogConfig(wandb=WandbConfig(project="p")), lambda: FACTS)


def test_a_resumed_journal_sends_nothing_twice_and_what_was_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory: list[int] = []
    output = TrainOutput(str(tmp_path))
    first = Journal(output, 0, events=False, trackers=trackers(monkeypatch, lambda: Remembers(memory)))
    for step in (4, 8):
        first.add("train", step, {"loss": 1.0})
        first.publish(step)
    first.close(finished=False)
    assert memory == [4, 8]
    output.write_metrics([*output.read_metrics(), *lines(10)])  # published while the tracker was away
    again = Journal(output, 10, events=False, trackers=trackers(monkeypatch, lambda: Remembers(memory)))
    again.add("train", 12, {"loss": 1.0})
    again.publish(12)
    again.close(finished=True)
    assert memory == [4, 8, 10, 12]
    back = Journal(output, 4, events=False, trackers=trackers(monkeypatch, lambda: Remembers(memory)))  # killed there
    back.add("train", 8, {"loss": 1.0})
    back.publish(8)
    back.close(finished=True)
    assert memory == [4, 8, 10, 12]


@pytest.mark.parametrize("where", ["make", "send", "close"])
def test_a_tracker_that_fails_is_dropped_with_one_warning_without_secrets(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "deadbeef")

    class Fails:
        def __init__(self) -> None:
            self._at("make")

        def send(self, lines: Sequence[Any], pictures: Mapping[str, bytes]) -> None:
            self._at("send")

        def close(self, *, finished: bool) -> None:
            self._at("close")

        def _at(self, here: str) -> None:
            if here == where:
                raise OSError("https://me:secret@server.example/api?token=secret refused the key deadbeef\nand more")

    with caplog.at_level(logging.WARNING):
        told = trackers(monkeypatch, Fails)
        for step in (1, 2, 3):
            told.send(lines(step), PNG)
        told.close(finished=True)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("log.wandb: OSError: https://server.example/api refused") and "metrics.jsonl" in said
    assert "secret" not in said and "deadbeef" not in said


def test_a_tracker_that_hangs_holds_nothing_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(train_trackers, "CLOSE_WAIT_S", 0.05)
    never = threading.Event()

    class Hangs(Remembers):
        def send(self, lines: Sequence[Any], pictures: Mapping[str, bytes]) -> None:
            never.wait(60)

    told = trackers(monkeypatch, lambda: Hangs([]))
    for step in range(train_trackers.MAX_WAITING + 3):
        told.send(lines(step), {})
    told.close(finished=True)
    never.set()
    assert [record.getMessage().count("behind") for record in caplog.records] == [1]


def test_one_that_is_configured_and_not_installed_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_trackers(LogConfig(), "s3://bucket/run")
    with pytest.raises(TrackerMissing, match=r"pip install 'dvae-ray\[mlflow\]'") as refused:
        check_trackers(LogConfig(mlflow=MlflowConfig(experiment="e")), str(tmp_path))
    assert refused.value.exit_code == 2


def test_offline_files_are_not_left_on_a_worker_of_which_nobody_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    offline = LogConfig(wandb=WandbConfig(project="p", mode="offline"))
    check_trackers(offline, str(tmp_path))
    check_trackers(LogConfig(wandb=WandbConfig(project="p")), "s3://bucket/run")
    with pytest.raises(NowhereToKeep, match=r"log\.wandb\.mode=offline .* not s3://bucket/run; use mode=online"):
        check_trackers(offline, "s3://bucket/run")


def test_what_a_tracker_is_told_has_no_credentials(tmp_path: Path) -> None:
    uri = "https://me:secret@mlflow.example/x"
    data = {"train_shards": "https://me:secret@store.example/a.tar?sig=secret", "val_shards": str(tmp_path)}
    found = TrainConfig.model_validate(
        settings(tmp_path, data=data, log={"mlflow": {"experiment": "e", "tracking_uri": uri}})
    )
    told = json.dumps(public_settings(found))
    assert "https://mlflow.example/x" in told and "https://store.example/a.tar" in told
    assert "secret" not in told
    assert found.log.mlflow is not None and found.log.mlflow.tracking_uri == uri


def test_a_run_keeps_its_name_for_trackers_over_attempts(tmp_path: Path) -> None:
    output = TrainOutput(str(tmp_path / "a"))
    facts = run_facts(output.url, output.run_id(), {})
    assert facts.run_id == TrainOutput(str(tmp_path / "a")).run_id() != TrainOutput(str(tmp_path / "b")).run_id()
    assert (facts.name, facts.folder) == ("a", str(tmp_path / "a"))
    assert not run_facts("s3://bucket/run", "x", {}).folder.startswith("s3:")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """A stand-in for wandb, which notes what it is asked for."""
    noted: list[tuple[Any, ...]] = []

    class Run:
        starting_step = 9

        def log(self, figures: dict[str, Any], step: int) -> None:
            noted.append(("log", step, sorted(figures)))

        def finish(self, exit_code: int) -> None:
            noted.append(("finish", exit_code))

    def init(**arguments: Any) -> Run:
        noted.append(("init", arguments["id"], arguments["resume"], arguments["mode"]))
        return Run()

    fake = types.SimpleNamespace(
        init=init,
        setup=lambda settings: noted.append(("setup", settings)),
        Settings=lambda **given: given["silent"],
        Image=lambda pixels: pixels,
        __spec__=object(),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    sys.modules.pop("jobs.train_wandb", None)
    yield noted
    sys.modules.pop("jobs.train_wandb", None)  # it holds the stand-in


def test_wandb_gets_one_call_for_each_step_beyond_what_it_has(calls: list[tuple[Any, ...]], tmp_path: Path) -> None:
    import numpy as np

    from jobs.train_wandb import WandbTracker
    from pipeline.pictures import encode_png

    png = encode_png(np.zeros((4, 4, 3), np.uint8))
    facts = RunFacts("abc", "run", {}, str(tmp_path / "wandb"))
    tracker = WandbTracker(WandbConfig(project="p", mode="offline"), facts)
    tracker.send([*lines(4, 8, 9, 12), {"kind": "eval", "step": 12, "psnr_hard": 20.0, "unix_s": 2.0}], {"codes": png})
    tracker.close(finished=True)
    logged = [("log", 9, ["train/loss"]), ("log", 12, ["codes", "eval/psnr_hard", "train/loss"])]
    assert calls == [("setup", True), ("init", "abc", "allow", "offline"), *logged, ("finish", 0)]


class MlflowServer:
    """A stand-in for mlflow's client and its server: one experiment, runs by id."""

    def __init__(self) -> None:
        self.runs: dict[str, types.SimpleNamespace] = {}
        self.folder = ""

    def __call__(self, tracking_uri: str | None) -> MlflowServer:
        self.tracking_uri = tracking_uri
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        return types.SimpleNamespace(experiment_id="1") if self.folder else None

    def create_experiment(self, name: str, artifact_location: str | None) -> str:
        self.folder = str(artifact_location)
        return "1"

    def search_runs(self, experiments: list[str], filter_string: str, max_results: int) -> list[Any]:
        return [
            types.SimpleNamespace(
                info=types.SimpleNamespace(run_id=name),
                data=types.SimpleNamespace(metrics={m.key for m in run.metrics}),
            )
            for name, run in self.runs.items()
            if filter_string == f"tags.`dvae.run` = '{run.tags['dvae.run']}'"
        ][:max_results]

    def create_run(self, experiment: str, tags: dict[str, str], run_name: str) -> Any:
        name = f"run-{len(self.runs)}"
        self.runs[name] = types.SimpleNamespace(
            tags=tags, name=run_name, metrics=[], params={}, files=[], status="RUNNING"
        )
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=name))

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        return [metric for metric in self.runs[run_id].metrics if metric.key == key]

    def log_batch(self, run_id: str, metrics: Sequence[Any] = (), params: Sequence[Any] = ()) -> None:
        assert len(metrics) <= 1000 and len(params) <= 100, "what a server takes at once"
        self.runs[run_id].metrics += metrics
        self.runs[run_id].params |= {param.key: param.value for param in params}

    def log_artifact(self, run_id: str, path: str, folder: str) -> None:
        self.runs[run_id].files.append((folder, Path(path).name, Path(path).read_bytes()))

    def update_run(self, run_id: str, status: str) -> None:
        self.runs[run_id].status = status

    set_terminated = update_run


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowServer]:
    fake = MlflowServer()
    metric = lambda key, value, timestamp, step: types.SimpleNamespace(key=key, value=value, step=step)  # noqa: E731
    param = lambda key, value: types.SimpleNamespace(key=key, value=value)  # noqa: E731
    monkeypatch.setitem(sys.modules, "mlflow", types.ModuleType("mlflow"))
    monkeypatch.setitem(sys.modules, "mlflow.entities", types.SimpleNamespace(Metric=metric, Param=param))
    monkeypatch.setitem(sys.modules, "mlflow.tracking", types.SimpleNamespace(MlflowClient=fake))
    sys.modules.pop("jobs.train_mlflow", None)
    yield fake
    sys.modules.pop("jobs.train_mlflow", None)  # it holds the stand-in


def test_mlflow_gets_each_figure_once_also_from_a_run_that_begins_again(server: MlflowServer) -> None:
    from jobs.train_mlflow import MlflowTracker

    config = MlflowConfig(experiment="e", tracking_uri="sqlite:///x.db")
    many = {f"layer{number}": {"lr": number} for number in range(150)}
    first = MlflowTracker(config, RunFacts("abc", "run", many, "/out"))
    first.send(lines(4, 8), PNG)
    first.close(finished=False)
    (run,) = server.runs.values()
    assert run.status == "KILLED" and server.folder == "file:///out/mlartifacts"
    again = MlflowTracker(config, RunFacts("abc", "run", many, "/out"))
    assert run.status == "RUNNING"
    again.send(lines(4, 8), PNG)
    again.send([*lines(12), {"kind": "eval", "step": 12, "psnr_hard": 20.0, "unix_s": 2.0}], PNG)
    again.close(finished=True)
    assert [(metric.key, metric.step) for metric in run.metrics] == [
        ("train/loss", 4), ("train/loss", 8), ("train/loss", 12), ("eval/psnr_hard", 12),
    ]  # fmt: skip
    assert run.files == [("codes", "step-00000008.png", b"png"), ("codes", "step-00000012.png", b"png")]
    assert (len(run.params), run.params["layer7.lr"], run.status) == (150, "7", "FINISHED")
    MlflowTracker(config, RunFacts("other", "run", {}, "/out"))
    assert len(server.runs) == 2


@pytest.mark.training
def test_mlflow_has_every_figure_once_after_a_resume(tmp_path: Path) -> None:
    """The real client, with a store in a file. (In CI it is not installed: it brings much along.)"""
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow.tracking import MlflowClient

    write_training_data(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    log = {"mlflow": {"experiment": "dvae", "tracking_uri": uri}}
    assert run_training(config(tmp_path, steps=12, log=log), "dvae train") == 0
    assert run_training(config(tmp_path, steps=24, log=log), "dvae train") == 0
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("dvae").experiment_id])
    trained = [line for line in TrainOutput(str(tmp_path / "out")).read_metrics() if line["kind"] == "train"]
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(each.step, each.value) for each in history] == [(line["step"], line["loss"]) for line in trained]
    assert run.info.status == "FINISHED" and run.data.params["optim.lr"] == "0.001"
    assert [each.path for each in client.list_artifacts(run.info.run_id, "codes")]
    assert list((tmp_path / "out" / "mlartifacts").rglob("codes/*.png"))


@pytest.mark.training
def test_wandb_offline_keeps_the_run_beside_the_output(tmp_path: Path) -> None:
    """The real client, which sends nothing. (In CI it is not installed.)"""
    pytest.importorskip("wandb")
    write_training_data(tmp_path)
    log = {"wandb": {"project": "dvae", "mode": "offline"}}
    assert run_training(config(tmp_path, steps=12, log=log), "dvae train") == 0
    (kept,) = (tmp_path / "out" / "wandb").rglob("*.wandb")
    data = kept.read_bytes()
    assert b"train/loss" in data and b"eval/psnr_hard" in data
