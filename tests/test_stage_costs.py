"""Each stage measured alone, on real shards with a tokenizer that takes a known time."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from jobs.stage_costs import NothingToMeasure, measure_stages, stage_costs
from make_data import FakeTokenizer, fake_table, image_bytes, listed, tar_bytes, write_shards
from pipeline.images import ImageSpec
from pipeline.output import OutputPrefix
from pipeline.tokenize_shard import TokenizeJob

SPEC = ImageSpec(size=16)


def job(folder: Path, batch_size: int = 4) -> TokenizeJob:
    return TokenizeJob(OutputPrefix(str(folder / "out")), fake_table(), batch_size, 1)


class BusyTokenizer(FakeTokenizer):
    """Uses the CPU for five milliseconds an image."""

    def encode(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        until = time.thread_time() + 0.005 * len(pixels_BHWC)
        while time.thread_time() < until:
            pass
        return super().encode(pixels_BHWC)


def test_the_cost_of_a_stage_is_its_cpu_time_an_image(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", [6, 7])
    costs = stage_costs(shards, SPEC, BusyTokenizer(), job(tmp_path), 1000)
    assert costs.num_images == 13 and costs.num_encoded == 16  # whole batches
    assert 0.0045 < costs.encode_s < 0.015  # other threads of this process may have taken some of it
    assert all(0 < cost < 0.05 for cost in (costs.read_s, costs.decode_s, costs.write_s))


def test_waiting_is_no_cpu_time_but_takes_its_time(tmp_path: Path) -> None:
    class Sleeper(FakeTokenizer):
        def encode(self, pixels_BHWC: np.ndarray) -> np.ndarray:
            time.sleep(0.02)
            return super().encode(pixels_BHWC)

    sample = measure_stages(write_shards(tmp_path / "in", [8]), SPEC, Sleeper(), job(tmp_path), 8)
    assert sample.cpu.encode_s < 0.004 < 0.005 <= sample.wall.encode_s


def test_the_first_images_are_measured_and_no_more(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", [6, 7, 5])
    assert stage_costs(shards, SPEC, FakeTokenizer(), job(tmp_path), 8).num_images == 8


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    stage_costs(write_shards(tmp_path / "in", [6]), SPEC, FakeTokenizer(), job(tmp_path), 6)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_bad_images_are_read_and_decoded_but_not_written(tmp_path: Path) -> None:
    members = [(f"{n}.jpg", image_bytes(n) if n % 2 else b"no image") for n in range(10)]
    (tmp_path / "half.tar").write_bytes(tar_bytes(members))
    sample = measure_stages([listed(tmp_path / "half.tar")], SPEC, FakeTokenizer(), job(tmp_path), 10)
    assert (sample.cpu.num_images, sample.num_failed) == (10, 5)
    assert sum(len(batch) for batch in sample.batches) == 8


def test_shards_without_a_good_image_are_said(tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(tar_bytes([("a.jpg", b"no image")]))
    with pytest.raises(NothingToMeasure, match="none of the first 1 images"):
        stage_costs([listed(tmp_path / "bad.tar")], SPEC, FakeTokenizer(), job(tmp_path), 10)
