"""The bench of the bottleneck runs, and compares like with like."""

from __future__ import annotations

import json

import pytest
import torch

import bench_bottleneck


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_it_prints_times_and_memory_of_both_forms(capsys, monkeypatch):
    here = bench_bottleneck.peak_bytes  # a process of its own takes seconds to begin
    monkeypatch.setattr(
        bench_bottleneck, "peak_of_a_child", lambda form, name, device: here(form, bench_bottleneck.SIZES[name], device)
    )
    bench_bottleneck.main(["--sizes", "tiny", "--rounds", "2", "--threads", "1", "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert row["threads"] == 1 and row["codes"] == 64
    median, least, most = row["times_faster"]
    assert 0 < least <= median <= most
    assert row["fused_peak_bytes"] >= 0 and row["plain_peak_bytes"] >= 0
    assert bench_bottleneck.as_text([row]).count("\n") == 1


def test_both_forms_give_the_same_gradients():
    size, device = bench_bottleneck.SIZES["tiny"], torch.device("cpu")
    given = bench_bottleneck.inputs(size, device)
    fused, plain = (bench_bottleneck.step(form, given)() for form in ("fused", "plain"))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(fused, plain, strict=True))
