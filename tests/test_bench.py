"""`dvae bench`: what follows from figures (made up here), what it measures on, and the whole of it on a real Ray."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fakes import FakeSource
from jobs import bench as bench_module
from jobs.bench import BenchOptions, CannotMeasure, in_rounds, run_bench
from jobs.bench_advice import advice
from jobs.bench_figures import DECODE, ENCODE, FREE, NO_RAY, RAY, BatchRate, Figures, Rates, Setting, Startup
from jobs.bench_material import copied
from jobs.bench_processes import Crew, Processes, ProcessFailed
from jobs.bench_ray import as_measured
from jobs.bench_report import bench_json, print_bench
from jobs.bench_sources import ENCODED, LOADED, FreeSource, MarkedSource
from jobs.bench_sweep import sweep
from jobs.checkpoints import TokenizerSource, read_head
from jobs.stage_costs import StageCosts
from jobs.tokenize_run import TokenizeRun
from make_data import FakeTokenizer, fake_table, write_checkpoint, write_shards
from make_run import run_config, write_shard
from pipeline.output import OutputPrefix
from pipeline.shards import read_samples
from pipeline.stage_times import StageTimes
from pipeline.tokenize_shard import TokenizeJob

CPU = Setting("id", "cpu", "fp32", False, 64, 128, 8, 0, 8, 0, 1, 1, False, 2)
GPU = Setting("id", "cuda", "bf16", True, 64, 256, 32, 2, 2, 1, 1, 16, False, 2)
COSTS = StageCosts(read_s=0.0001, decode_s=0.004, encode_s=0.0139, write_s=0.002)  # 20 ms in all


def figures(setting: Setting = CPU, **changes: Any) -> Figures:
    """Of a run that does well."""
    rates = {DECODE: 1900.0, ENCODE: 570.0, NO_RAY: 380.0, RAY: 370.0, **changes.pop("rates", {})}
    values = {
        "cpu": COSTS, "wall": COSTS, "source_read_s": 0.0002, "image_bytes": 40_000.0, "part_bytes": 500.0,
        "num_failed": 0, "num_images": 1024, "num_round_images": 2048,
        "times": StageTimes(read_s=1, pixels_s=3, encode_s=15, write_s=1, model_busy_s=9.5, open_s=10),
        "startup": Startup(3.0, 8.0, 9.0), "sweep": (), "load": 0.1, **changes,
    }  # fmt: skip
    spread = {name: Rates((rate, 0.9 * rate, 1.1 * rate)) for name, rate in rates.items()}
    return Figures(setting=setting, rates=spread, **values)


def said(found: Figures) -> str:
    return "\n".join(advice(found))


# what follows from figures


def test_where_cores_do_everything_the_ideal_is_all_cores_on_all_stages() -> None:
    found = figures()
    assert found.ideal == pytest.approx(8 / 0.020)
    assert found.share(RAY) == pytest.approx(370 / 400)


def test_with_gpus_the_ideal_is_the_slower_side() -> None:
    assert figures(GPU, rates={ENCODE: 3000.0}).ideal == 3000
    assert figures(GPU, rates={ENCODE: 9000.0}).ideal == pytest.approx(32 / 0.0061)


def test_ray_is_compared_with_no_ray_round_by_round() -> None:
    found = figures()
    uneven = {**found.rates, NO_RAY: Rates((100.0, 200.0, 400.0)), RAY: Rates((90.0, 190.0, 300.0))}
    assert replace(found, rates=uneven).ray_share == pytest.approx(0.9)


def test_a_gpu_that_is_busy_is_the_limit_and_one_that_waits_is_starved() -> None:
    assert "The GPUs are the limit" in said(figures(GPU))
    waiting = StageTimes(read_s=1, pixels_s=9, encode_s=5, model_busy_s=4, open_s=10)
    text = said(figures(GPU, times=waiting))
    assert "The GPUs are starved: they have work 40% of the time, and wait for pixels" in text
    assert "wait for bytes" in said(figures(GPU, times=replace(waiting, read_s=9, pixels_s=1)))


def test_of_a_free_encoder_nobody_says_how_busy_it_is() -> None:
    free = figures(replace(CPU, encoder=FREE), rates={RAY: 200.0, ENCODE: 400_000.0})
    assert said(free) == "The pipeline reaches 50% of what the cores could do; encoding takes 70% of the CPU time."
    out = io.StringIO()
    print_bench(free, Console(file=out, width=80))
    assert "400,000   360,000   440,000              –" in out.getvalue()


def test_other_work_on_the_machine_is_said_first() -> None:
    assert advice(figures(load=3.2))[0].startswith("Other work was on this machine (load 3.2 on 8 cores)")
    assert "Other work" not in said(figures(load=1.9))


def test_cores_for_a_gpu_are_counted() -> None:
    text = said(figures(GPU, rates={ENCODE: 3000.0}))  # 1,500 an actor, 6.1 ms of CPU an image
    assert "9.1 cores keep an actor busy, this machine has 16.0" in text and "decode threads are enough" in text
    few = said(figures(replace(GPU, decode_threads=4), rates={ENCODE: 3000.0}))
    assert "Set ray.decode_threads=11 (now 4)" in few
    starved = said(figures(GPU, rates={ENCODE: 9000.0}))  # 27.5 an actor, with a fifth more: 33 - 16, times two
    assert "About 34 more on other machines" in starved


def test_too_many_actors_and_too_few_are_said() -> None:
    assert "set ray.num_actors=4" in said(figures(replace(CPU, threads=2)))
    few = figures(replace(CPU, num_actors=2), rates={ENCODE: 140.0, RAY: 130.0, NO_RAY: 135.0})
    assert "2 actors encode 140 images/s while cores are left: set ray.num_actors=6" in said(few)
    assert "num_actors" not in said(figures())


def swept(**rates: float | None) -> tuple[BatchRate, ...]:
    return tuple(BatchRate(int(name[1:]), rate) for name, rate in rates.items())


def test_a_better_batch_size_is_the_least_that_is_as_good_as_the_best() -> None:
    text = said(figures(sweep=swept(b16=100, b64=80, b128=99, b256=None)))
    assert "batch_size=16 encodes 1.25 times as fast, the whole 1.16 times" in text
    assert "one that was begun keeps its own" in text


def test_a_batch_size_that_changes_little_for_the_whole_stays() -> None:
    mostly_decoding = StageCosts(0.001, 0.018, 0.0005, 0.0005)
    text = said(figures(cpu=mostly_decoding, sweep=swept(b16=130, b64=100)))
    assert "batch_size=64 is right (16 encodes 1.30 times as fast, which changes little for the whole)" in text
    assert "batch_size=64 is right." in said(figures(sweep=swept(b16=50, b64=100)))
    assert "batch_size=64 is right" in said(figures(GPU, rates={ENCODE: 9000.0}, sweep=swept(b64=100, b256=200)))


def test_slow_streams_want_more_shards_in_flight() -> None:
    assert "Set ray.shards_in_flight=6" in said(figures(source_read_s=0.099))
    assert "shards_in_flight" not in said(figures())


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("setting", [CPU, GPU], ids=["cpu", "gpu"])
def test_tables_fit_a_terminal_and_json_says_it_all(width: int, setting: Setting) -> None:
    setting = replace(setting, encoder="0123456789abcdef0123456789abcdef", cores=192, num_actors=192)
    found = figures(setting, sweep=swept(b16=12_345, b64=100, b256=None), num_failed=1000)
    out = io.StringIO()
    print_bench(found, Console(file=out, width=width))
    assert max(map(len, out.getvalue().splitlines())) <= width and "not tried" in out.getvalue()
    report = json.loads(json.dumps(bench_json(found)))
    assert report["images_per_s"][RAY]["share_of_ideal"] == pytest.approx(found.share(RAY))
    assert report["advice"] and report["setting"]["num_actors"] == 192 and report["ideal_images_per_s"] == found.ideal


def test_rounds_go_forwards_and_backwards() -> None:
    done: list[str] = []

    def work(name: str) -> Callable[[], float]:
        return lambda: done.append(name) or float(len(done))  # type: ignore[func-returns-value]

    rates = in_rounds({DECODE: work(DECODE), ENCODE: work(ENCODE)}, 3, lambda what: None)
    assert done == [DECODE, ENCODE, ENCODE, DECODE, DECODE, ENCODE]
    assert rates[DECODE].rounds == (1, 4, 5) and rates[DECODE].median == 4


# what it measures on, and with


def test_copies_hold_the_first_images_under_keys_of_their_own(tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "a.tar", 0, "++++")
    write_shard(tmp_path / "in" / "b.tar", 0, "++++")  # the same keys again
    job = TokenizeJob(OutputPrefix(str(tmp_path / "out")), fake_table(), 4, 1)
    shards = write_shards(tmp_path / "in", [3])
    material = copied(shards, job, 10, 4, OutputPrefix(str(tmp_path / "copies")))
    samples = [sample for shard in material.shards for sample in read_samples(shard)]
    assert material.num_images == 10 and [len(list(read_samples(s))) for s in material.shards] == [4, 4, 2]
    assert len({sample.key for sample in samples}) == 10 and not any(sample.failure for sample in samples)
    originals = [sample.image for shard in shards for sample in read_samples(shard)][:10]
    assert [sample.image for sample in samples] == originals
    tasks = material.tasks(7)
    assert len({task.part for task in tasks}) == 7 and len({task.shard.url for task in tasks}) == 3


def test_free_tokens_are_of_the_right_shape_and_range() -> None:
    pixels_BHWC = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    tokens_BHW = FreeSource("id", (4, 4), 1000).load().encode(pixels_BHWC)
    assert tokens_BHW.shape == (3, 4, 4) and 0 <= tokens_BHW.min() <= tokens_BHW.max() < 1000
    assert len(np.unique(tokens_BHW)) > 20


@dataclass(frozen=True)
class Fakes:
    """FakeTokenizer from a process of its own."""

    broken: bool = False

    def load(self) -> FakeTokenizer:
        if self.broken:
            raise OSError("no such model")
        return FakeTokenizer()


def test_marks_say_when_a_model_was_loaded_and_first_used(tmp_path: Path) -> None:
    source = MarkedSource(Fakes(), str(tmp_path))
    before = time.time()
    tokenizer = source.load()
    assert source.times(ENCODED) == [] and before <= source.times(LOADED)[0] <= time.time()
    tokenizer.encode(np.zeros((1, 16, 16, 3), np.uint8))
    assert source.times(LOADED)[0] <= source.times(ENCODED)[0] <= time.time()


def crew(folder: Path, source: Fakes) -> Crew:
    np.save(folder / "batches.npy", np.zeros((8, 16, 16, 3), np.uint8))
    return Crew(
        source, TokenizeJob(OutputPrefix(str(folder / "out")), fake_table(), 4, 1), 2, str(folder / "batches.npy")
    )


def test_processes_do_what_actors_do(tmp_path: Path) -> None:
    job = crew(tmp_path, Fakes()).job
    material = copied(write_shards(tmp_path / "in", [9]), job, 9, 3, OutputPrefix(str(tmp_path / "copies")))
    with Processes(crew(tmp_path, Fakes()), 2, 0) as processes:
        assert processes.encode() > 0
        assert processes.decode(material.tasks(4)) > 0
        assert processes.tokenize(material.tasks(5)) > 0
    assert len(list((tmp_path / "out" / "tokens").iterdir())) == 5


def test_what_fails_in_a_process_is_told_here(tmp_path: Path) -> None:
    with pytest.raises(ProcessFailed, match="OSError: no such model"), Processes(crew(tmp_path, Fakes(True)), 1, 0):
        pass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_batch_sizes_are_tried_that_do_not_take_too_long(checkpoint: Path) -> None:
    source = TokenizerSource(str(checkpoint), "cpu", "fp32", 8, 1)
    found = sweep(source, [np.zeros((8, 16, 16, 3), np.uint8)], image_s=0.1)
    assert [one.batch_size for one in found] == [8, 16, 32, 64, 128, 256]
    assert [one.images_per_s is not None for one in found] == [True, True, False, False, False, False]


# what cannot be measured


def test_a_gpu_that_is_not_here_is_said_before_anything_is_measured(checkpoint: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "a.tar", 0, "+++")
    config = run_config(checkpoint, tmp_path / "in", tmp_path / "out", ray={"gpus_per_actor": 1})
    with pytest.raises(CannotMeasure, match="this machine has none"):
        run_bench(config, BenchOptions(), as_json=True)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*bench*"))


def test_a_config_for_a_cluster_is_measured_as_this_machine_would_run_it(checkpoint: Path, tmp_path: Path) -> None:
    cluster = {"num_actors": 500, "address": "ray://far:1", "decode_labels": {"pool": "cpu"}, "decode_threads": 3}
    config = run_config(checkpoint, tmp_path / "in", tmp_path / "out", ray=cluster)
    setting = bench_module._setting(TokenizeRun.of(config), 1000, BenchOptions())
    assert setting.num_actors == setting.cores
    measured = as_measured(config, replace(setting, decodes_in_tasks=False)).ray
    assert (measured.address, measured.num_actors, measured.decode) == (None, setting.cores, "threads")
    assert measured.decode_labels == {}  # no node of a Ray of our own has any: its tasks would wait for ever


def test_an_encoder_that_takes_minutes_is_said(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "in" / "a.tar", 0, "+++")
    monkeypatch.setattr(bench_module, "SLOWEST_BATCH_S", 0.01)
    monkeypatch.setattr(TokenizerSource, "load", FakeSource(read_head(str(checkpoint)), 0.1).load)
    with pytest.raises(CannotMeasure, match="add batch_size=1 to measure"):
        run_bench(run_config(checkpoint, tmp_path / "in", tmp_path / "out"), BenchOptions(), as_json=True)
    assert not list(tmp_path.glob("*bench*")), "what was copied is removed"


# the whole


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_benchmark_measures_everything_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        write_shard(tmp_path / "in" / f"{number}.tar", 10 * number, "++++++++++")
    (tmp_path / "out").mkdir()
    config = run_config(checkpoint, tmp_path / "in", tmp_path / "out", ray={"num_actors": 2})
    assert run_bench(config, BenchOptions(num_images=32, rounds=1), as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert all(rate["median"] > 0 for rate in report["images_per_s"].values()) and len(report["images_per_s"]) == 4
    assert 0 < report["startup"]["ray_s"] <= report["startup"]["actors_s"] < 60
    assert 0 < report["encoder_busy"] <= 1 and report["ideal_images_per_s"] > 0
    assert report["num_images"] == 32 and report["sweep"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"] and not list((tmp_path / "out").iterdir())
