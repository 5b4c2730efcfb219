"""`dvae demo --cluster`: the same journey through a Jobs server and an S3 server of this machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from jobs import demo, demo_images, demo_sites
from jobs.demo import DemoError, DemoFolder, run_demo
from jobs.demo_images import PHOTOS
from jobs.demo_sites import OnCluster
from jobs.report_pieces import back_into_pictures, reading_lines
from s3_clients import s3_clients_of

STEPS = re.compile(r"^steps: .*", re.MULTILINE)


@pytest.fixture
def short_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two photographs, and a training that ends before it has learnt anything."""
    monkeypatch.setattr(demo_images, "PHOTOS", tuple(p for p in PHOTOS if p.name in ("chelsea", "retina")))
    monkeypatch.setattr(demo_images, "STRIDE_PX", 64)
    (tmp_path / "configs").mkdir()
    train, tokenize = ((demo_sites.CONFIGS / name).read_text() for name in (demo_sites.TRAIN, demo_sites.TOKENIZE))
    train = STEPS.sub("steps: 4", train).replace("num_images: 1000", "num_images: 8")
    (tmp_path / "configs" / demo_sites.TRAIN).write_text(train)
    (tmp_path / "configs" / demo_sites.TOKENIZE).write_text(tokenize + "max_failed_samples: 0.5\n")
    monkeypatch.setattr(demo_sites, "CONFIGS", tmp_path / "configs")


@pytest.mark.ray
@pytest.mark.server
@pytest.mark.training
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("short_demo")
def test_the_demo_runs_through_submitted_jobs_and_a_bucket_and_its_lines_can_be_pasted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pasted: list[subprocess.CompletedProcess[str]] = []

    def paste(site: OnCluster, console: Console) -> None:
        """While the servers run: in a process of its own, as a person does."""
        output, training = "s3://demo/tokenised", "s3://demo/training"
        for snippet in (*reading_lines(output), back_into_pictures(output, training)):
            command = [sys.executable, "-c", snippet.code]
            pasted.append(subprocess.run(command, capture_output=True, text=True, timeout=240, check=False))

    monkeypatch.setattr(demo, "_leave_open", paste)
    with s3_clients_of({}):
        assert run_demo(str(tmp_path / "demo"), on_cluster=True) == 1  # an untrained model does not reach 20 dB
    said = capfd.readouterr().out
    assert "passed  token rows + error rows = images packed" in said
    assert "passed  every damaged file has its own reason, and cmyk is tokenised" in said
    assert "FAILED  held-out tiles come back with at least 20 dB" in said
    assert "s3://demo/tokenised: tokens/ and errors/ as Parquet" in said
    assert [(one.returncode, one.stderr) for one in pasted] == [(0, "")] * 4
    assert not (tmp_path / "demo" / "tokenised").exists()
    with pytest.raises(DemoError, match="kind of demo"):
        run_demo(str(tmp_path / "demo"))


def test_a_job_that_fails_on_the_cluster_ends_the_demo_with_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = OnCluster(str(tmp_path / "store"), tmp_path, "http://127.0.0.1:1", {})
    monkeypatch.setattr(demo_sites.subprocess, "call", lambda command, cwd: 7 if "train" in command else 0)
    monkeypatch.setattr(demo_images, "PHOTOS", ())
    monkeypatch.setattr(demo, "pack_images", lambda *_: None)
    assert demo.journey(DemoFolder(tmp_path / "demo"), site, Console()) == 7
