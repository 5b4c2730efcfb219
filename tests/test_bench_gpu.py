"""The GPU bench runs where there is no GPU, so that it is not found broken on the day there is one."""

from __future__ import annotations

import json

import pytest

import bench_gpu
from model.config import DVAEConfig


def test_it_runs_on_the_cpu_and_prints_every_mark(capsys):
    bench_gpu.main(["--device", "cpu", "--small", "--rounds", "1", "--no-compile"])
    report = json.loads(capsys.readouterr().out)
    assert [row["precision"] for row in report["encoder"]] == ["fp32", "bf16"]
    assert all(row["images_per_s"] > 0 for row in report["encoder"])
    assert report["end_to_end"]["images"] == 16 and report["end_to_end"]["share"] > 0
    assert report["marks"].keys() == {"bf16_share_of_peak", "times_published", "end_to_end_share"}
    published = report["against_published"]
    assert "pip install" in published["problem"] if "problem" in published else published["agreement"] > 0.9


def test_the_flops_are_those_of_openais_encoder():
    assert bench_gpu.flops_per_image(DVAEConfig(), 256) == pytest.approx(272.3e9, rel=1e-3)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_gpu.main([])
    assert "torch sees no CUDA device" in capsys.readouterr().err
