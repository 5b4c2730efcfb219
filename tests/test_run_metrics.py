"""What runs tell of themselves: the figures are those of the run, and no run depends on them."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import metrics
from jobs.actors import ActorPool
from jobs.dispatch import Dispatch
from jobs.metrics import METRICS, RayMeters, run_label
from jobs.metrics_tokenize import TokenizeMetrics
from jobs.metrics_train import TrainMetrics
from jobs.progress import JobProgress
from jobs.recording import Recording
from jobs.submit import submission_id
from jobs.tokenize_actor import CountedDecoder
from jobs.tokenize_config import TokenizeConfig
from jobs.tokenize_dataset import run_tokenize
from jobs.train_progress import Status, StepProgress
from make_data import listed, write_checkpoint
from make_run import run_config, write_shard
from pipeline.decode_shard import DecodeJob, ThreadDecoder
from pipeline.errors import RunHeld
from pipeline.images import ImageSpec
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.output import OutputPrefix
from pipeline.plan import Plan, ShardTask
from pipeline.records import ObjectInfo, ShardResult, ShardState
from simulated_actors import SimulatedActors, settings

TICK_S = metrics.TELL_EVERY_S


class Kept:
    """Meters for a test to read: sums of counters, newest values of gauges, lists of histograms."""

    def __init__(self) -> None:
        self.sums: defaultdict[tuple[str, ...], float] = defaultdict(float)
        self.gauges: dict[tuple[str, ...], float] = {}
        self.seen: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, name: str, amount: float, **labels: str) -> None:
        assert METRICS[name].kind == "counter" and METRICS[name].labels == tuple(labels) and amount >= 0
        self.sums[name, *labels.values()] += amount

    def set(self, name: str, value: float | None, **labels: str) -> None:
        assert METRICS[name].kind == "gauge" and METRICS[name].labels == tuple(labels)
        if value is not None:
            self.gauges[name, *labels.values()] = value

    def observe(self, name: str, value: float) -> None:
        assert METRICS[name].kind == "histogram"
        self.seen[name].append(value)

    def by_label(self, name: str, *, zeros: bool = False) -> dict[str, float]:
        both = {**self.sums, **self.gauges}
        return {key[1]: value for key, value in both.items() if key[0] == name and (value or zeros)}


def test_a_runs_label_has_its_name_and_no_secret() -> None:
    label = run_label("s3://key:secret@host/bucket/laion-tokens?X-Amz-Signature=secret")
    assert label.startswith("laion-tokens-") and "secret" not in label and "key" not in label
    assert label == run_label("s3://another:one@host/bucket/laion-tokens")
    assert label != run_label("s3://host/other-bucket/laion-tokens")
    assert len(run_label("s3://host/" + "x" * 500)) < 60


@pytest.mark.parametrize("spelt", ["s3://b/out/", "s3a://b/out", "s3://key:secret@b/out"])
def test_a_run_has_one_label_however_its_output_is_spelt_and_its_job_the_same(spelt: str) -> None:
    assert run_label(spelt) == run_label("s3://b/out")
    assert run_label(spelt).rpartition("-")[2] == submission_id("tokenize", spelt).rpartition("-")[2]


def test_figures_that_cannot_be_told_are_said_once_and_end_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("the agent is gone")

    monkeypatch.setattr(metrics.ray_metrics, "Counter", broken)
    meters = RayMeters("s3://bucket/run")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            meters.add("tokenize_images", 1)
            meters.set("tokenize_left_seconds", 1.0)
    assert [record.getMessage() for record in caplog.records] == [
        "no more figures for Prometheus from this process: RuntimeError: the agent is gone"
    ]


def test_nothing_and_what_is_no_number_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    monkeypatch.setattr(RayMeters, "_tell", lambda self, name, verb, value, labels: told.append(value))
    meters = RayMeters("s3://bucket/run")
    meters.add("tokenize_images", 0)  # Ray refuses it
    for value in (None, float("nan"), float("inf"), 2.0):
        meters.set("tokenize_left_seconds", value)
    assert told == [2.0]


def test_what_a_driver_tells_is_what_became_of_its_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With actors that raise, die and go away; each shard done has 10 images, and one more that failed."""
    actors = SimulatedActors(nature=lambda task: {"x": "raises", "p": "poison"}.get(task.shard.url, "good"))
    actors.accidents = [(4.5, lambda world: world.cut_off(world.living()[0], 3.0))]
    tokenize = actors.tokenize

    def with_figures(actor: Any, task: ShardTask, delay_s: float) -> Any:
        call = tokenize(actor, task, delay_s)
        if hasattr(call.outcome, "value"):
            row = replace(call.outcome.value, num_rows=10, num_failed=1, part_bytes=7, seconds=1.0)
            call.outcome = replace(call.outcome, value=row, failed_images={"truncated_image": 1})
        return call

    actors.tokenize = with_figures  # type: ignore[method-assign]
    kept, names = Kept(), "abcdefghxp"
    tasks = [ShardTask(ObjectInfo(name, 100, "e"), f"{name}.parquet") for name in names]
    dispatch = Dispatch(tasks, attempts=2, in_flight_limit=2)
    recording = Recording(Ledger(OutputPrefix(str(tmp_path))), Plan((), (), ()))
    with (
        ActorPool(actors, settings(2), actors.now) as pool,
        JobProgress("shards", len(names)) as progress,
        TokenizeMetrics(kept, pool, dispatch, recording, progress, actors.now) as told,
    ):
        waiting = kept.by_label("tokenize_shards")
        for outcome in pool.run(dispatch, told.look):
            if not isinstance(outcome, ShardResult):
                outcome = ShardResult(outcome.work.task.shard.url, 100, "e", ShardState.QUARANTINED)
            recording.note(outcome)
            progress.advance(1, "")
            told.ended(outcome)
    recording.close()
    assert waiting == {"waiting": 10}
    assert kept.sums["tokenize_images",] == 80 and kept.by_label("tokenize_failed_images") == {"truncated_image": 8}
    assert (kept.sums["tokenize_input_bytes",], kept.sums["tokenize_output_bytes",]) == (800, 56)
    assert kept.by_label("tokenize_ended_shards") == {"done": 8, "quarantined": 2}
    assert kept.by_label("tokenize_shards") == {"done": 8, "quarantined": 2}
    attempts = kept.by_label("tokenize_failed_attempts")
    assert attempts["shard_truncated"] == 2 and attempts["shard_crashed"] >= 2 and attempts["actor_away"] >= 1
    assert sum(attempts.values()) == len(actors.given) - 8  # every attempt is accounted for
    replaced = sum("is replaced" in record.getMessage() for record in caplog.records)
    assert kept.by_label("tokenize_lost_actors") == {"shard_crashed": replaced} and replaced >= 2
    assert sum(kept.by_label("tokenize_actors").values()) == 2
    assert kept.seen["tokenize_shard_seconds"] == [1.0] * 8
    assert kept.gauges["tokenize_failed_share",] == recording.totals.failed_share == 8 / 88


def test_a_run_that_waits_for_its_first_node_tells_that_it_has_no_actor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the alert for that asks for, and its lease is looked at meanwhile."""
    write_shard(tmp_path / "shards" / "a.tar", 0, "++")
    kept, held_up = Kept(), []
    config = run_config(write_checkpoint(tmp_path / "checkpoint"), tmp_path / "shards", tmp_path / "out")

    def no_node(config: TokenizeConfig, num_shards: int, look: Callable[[], None]) -> None:
        look()
        held_up.append({name: kept.by_label(name, zeros=True) for name in ("tokenize_actors", "tokenize_shards")})
        look()

    def check(lease: Lease) -> None:
        if held_up:
            raise RunHeld("another driver has it")

    monkeypatch.setattr(Lease, "check", check)
    monkeypatch.setattr("jobs.cluster.connected", lambda *_: nullcontext())
    monkeypatch.setattr("jobs.metrics.RayMeters", lambda url: kept)
    monkeypatch.setattr("jobs.pool_settings.pool_settings", no_node)
    with pytest.raises(RunHeld):
        run_tokenize(config, "dvae")
    assert held_up == [{"tokenize_actors": {"ready": 0}, "tokenize_shards": {"waiting": 1}}]


def test_the_neighbours_of_a_shard_that_hangs_are_no_shards_that_hang() -> None:
    actors = SimulatedActors(nature=lambda task: "hangs" if task.shard.url == "h" else "good", seconds=lambda *_: 30.0)
    tasks = [ShardTask(ObjectInfo(name, 100, "e"), f"{name}.parquet") for name in "abchdefg"]
    with ActorPool(actors, settings(1, 4, deadline_s=40.0), actors.now) as pool:
        outcomes = list(pool.run(Dispatch(tasks, attempts=1, in_flight_limit=4)))
    assert len(outcomes) == 8 and pool.lost_actors == {"shard_timed_out": 1}
    assert pool.failed_attempts == {"shard_timed_out": 1, "actor_away": 3}


def test_an_hour_of_silence_is_told_while_nothing_ends(tmp_path: Path) -> None:
    actors = SimulatedActors(nature=lambda task: "hangs")
    kept = Kept()
    dispatch = Dispatch([ShardTask(ObjectInfo("a", 1, "e"), "a.parquet")], attempts=1, in_flight_limit=1)
    recording = Recording(Ledger(OutputPrefix(str(tmp_path))), Plan((), (), ()))

    def until_an_hour_is_over() -> None:
        told.look()
        if actors.now() > 3600:
            raise RunHeld("enough")

    with (
        pytest.raises(RunHeld),
        ActorPool(actors, settings(1, 1, deadline_s=1e9), actors.now) as pool,
        JobProgress("shards", 1) as progress,
        TokenizeMetrics(kept, pool, dispatch, recording, progress, actors.now) as told,
    ):
        list(pool.run(dispatch, until_an_hour_is_over))
    assert kept.gauges["tokenize_silent_seconds",] >= 3600
    assert kept.by_label("tokenize_shards") == {"in_flight": 1} and kept.by_label("tokenize_actors") == {"ready": 1}
    assert ("tokenize_left_seconds",) not in kept.gauges


def test_a_decoder_counts_what_it_hands_on_and_the_failures_of_the_newest_attempt(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", 0, "+++-++--+")
    kept, shard = Kept(), listed(tmp_path / "a.tar")
    job = DecodeJob(ImageSpec(size=16, small="upscale").to_json(), (), 4, 1)
    with closing(CountedDecoder(ThreadDecoder(job), kept)) as decoder:
        batches = decoder.batches(shard)
        assert len(next(batches).samples) == 4
        batches.close()  # an attempt that comes to nothing
        assert sum(len(batch.samples) for batch in decoder.batches(shard)) == 6
        assert decoder.take_failed(shard) == Counter(not_an_image=3)
        assert not decoder.take_failed(shard)
    assert kept.sums["tokenize_decoded_images",] == 4 + 6


def test_what_a_training_driver_tells_is_rank_0s_newest_status() -> None:
    clock, kept, progress = [0.0], Kept(), StepProgress(100)
    told = TrainMetrics(kept, 100, progress, lambda: clock[0])
    clock[0] = 30.0
    told.look(None, 0)
    assert kept.gauges["train_silent_seconds",] == 30 and ("train_step",) not in kept.gauges
    status = Status(step=10, images_per_s=50.0, num_workers=2, saved_step=5, psnr_hard=20.0)
    told.look(status, 1)  # too soon to be told again
    assert ("train_step",) not in kept.gauges
    clock[0] += TICK_S
    told.look(status, 1)
    clock[0] += 60
    told.look(replace(status, figures={"loss": 0.5, "lr": 1e-3, "used_share": None}), 1)
    gauges = {key[0]: value for key, value in kept.gauges.items()}
    assert (gauges["train_step"], gauges["train_steps"], gauges["train_lost_workers"]) == (10, 100, 1)
    assert (gauges["train_silent_seconds"], gauges["train_checkpoint_age_seconds"]) == (60, 60)
    assert (gauges["train_loss"], gauges["train_learning_rate"], gauges["train_checkpoint_step"]) == (0.5, 1e-3, 5)
    assert kept.by_label("train_psnr_decibels") == {"hard": 20.0}
    assert "train_used_share" not in gauges
