"""The training benches run where neither DALLE-pytorch nor a GPU is, so that they are not found broken one day."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench_train
import bench_train_gpu
import peer_dalle_pytorch
from make_data import write_shards
from model.config import DVAEConfig

pytestmark = pytest.mark.usefixtures("one_thread")

# The least that DiscreteVAE is: its attributes, and its three ways of being called.
STAND_IN = """
import torch
from torch import nn
from torch.nn import functional as F
from einops import rearrange
from dalle_pytorch import distributed_utils
from dalle_pytorch.vae import OpenAIDiscreteVAE

class DiscreteVAE(nn.Module):
    def __init__(self, image_size, num_tokens, codebook_dim, num_layers, num_resnet_blocks, hidden_dim):
        super().__init__()
        assert not distributed_utils.is_distributed
        self.num_tokens, self.normalization = num_tokens, ((0.5,) * 3, (0.5,) * 3)
        self.codebook = nn.Embedding(num_tokens, codebook_dim)
        self.encoder = nn.Sequential(nn.Conv2d(3, hidden_dim, 8, stride=8), nn.Conv2d(hidden_dim, num_tokens, 1))
        up = nn.ConvTranspose2d(codebook_dim, hidden_dim, 8, stride=8)
        self.decoder = nn.Sequential(up, nn.Conv2d(hidden_dim, 3, 1))

    @torch.no_grad()
    def get_codebook_indices(self, images):
        return self.encoder(2 * images - 1).argmax(dim=1).flatten(1)

    def decode(self, tokens):
        side = int(tokens.shape[1] ** 0.5)
        return self.decoder(self.codebook(tokens).transpose(1, 2).unflatten(2, (side, side)))

    def forward(self, images, return_loss=False, return_recons=False, temp=None):
        images = 2 * images - 1
        soft = F.gumbel_softmax(self.encoder(images), tau=temp, dim=1)
        out = self.decoder(torch.einsum("bkhw,kd->bdhw", soft, self.codebook.weight))
        loss = F.mse_loss(out, images)
        return (loss, out) if return_recons else loss if return_loss else out
"""
SMALL = ["--size", "16", "--batch", "2", "--codes", "16", "--hidden", "8", "--code-dim", "8", "--threads", "1"]


@pytest.fixture
def stand_in(tmp_path: Path) -> str:
    (tmp_path / "dalle_pytorch").mkdir()
    (tmp_path / "dalle_pytorch" / "__init__.py").write_text("import what_is_not_installed")
    (tmp_path / "dalle_pytorch" / "dalle_pytorch.py").write_text(STAND_IN)
    (tmp_path / "einops.py").write_text("rearrange = None")
    return str(tmp_path)


def run(program: str, *arguments: str) -> dict:
    command = [sys.executable, str(Path(__file__).parent / program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.training
def test_steps_are_compared_side_by_side_each_in_a_process_of_its_own(stand_in: str) -> None:
    report = run(
        "bench_train.py", "--dalle-pytorch", stand_in, "--rounds", "2", "--rows", "plain", "same_layers", *SMALL
    )
    rows = report["rows"]
    assert list(rows) == ["theirs", "plain", "same_layers"]
    assert all(row["parameters"] == rows["theirs"]["parameters"] for row in rows.values())
    assert rows["theirs"]["times_as_fast"] == [1.0, 1.0, 1.0] and rows["theirs"]["share_of_memory"] == 1.0
    assert all(row["step_s"] > 0 and row["training_mb"] > 0 for row in rows.values())


@pytest.mark.training
def test_the_peer_is_trained_for_so_long_and_measured_on_held_out_images(stand_in: str, tmp_path: Path) -> None:
    write_shards(tmp_path / "train", (9,))
    write_shards(tmp_path / "val", (5,))
    shards = ["--train", str(tmp_path / "train"), "--val", str(tmp_path / "val")]
    small = ["--image-size", "16", "--num-tokens", "16", "--hidden-dim", "8", "--codebook-dim", "8", "--threads", "1"]
    figures = run("peer_dalle_pytorch.py", "--dalle-pytorch", stand_in, *shards, "--minutes", "0.02", *small)
    assert figures["num_images"] == 5 and figures["images"] == 8 * figures["steps"] > 0
    assert 0.9 < figures["temperature"] <= 1.0 and 0 < figures["used_share"] <= 1
    assert all(0 < figures[name] < 40 for name in ("psnr_soft", "psnr_hard"))


def test_its_temperature_and_learning_rate_change_as_in_its_trainer() -> None:
    """After 1,000 steps: ten changes, the n-th by a factor exp(−1e-6 · 100 n)."""

    class Nothing(torch.nn.Linear):
        def forward(self, images, **_):
            return (loss := super().forward(images).sum()), loss

    trainer = peer_dalle_pytorch.PeerTrainer(Nothing(1, 1), peer_dalle_pytorch.TRAINER)
    for step in range(1000):
        trainer.train_step(torch.ones(1, 1), step)
    assert trainer.temp == pytest.approx(0.99551, abs=1e-5)
    assert trainer._schedule.get_last_lr() == [pytest.approx(1e-3 * 0.98**10)]


def test_without_dalle_pytorch_it_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for main, more in ((bench_train.main, []), (peer_dalle_pytorch.main, ["--train", "t", "--val", "v"])):
        with pytest.raises(SystemExit):
            main(["--dalle-pytorch", str(tmp_path), *more])
        assert peer_dalle_pytorch.HOW_TO_GET_IT in capsys.readouterr().err


def test_our_flops_are_those_of_openais_encoder_and_decoder() -> None:
    assert bench_train.our_flops(DVAEConfig(), 256) == pytest.approx(272.3e9 + 308.0e9, rel=1e-3)


@pytest.mark.parametrize(("room", "most", "found"), [(0, 8, 0), (1, 8, 1), (100, 512, 96), (100, 64, 64), (7, 6, 6)])
def test_the_largest_batch_is_found_to_an_eighth(room: int, most: int, found: int) -> None:
    tried = []
    assert bench_train_gpu.largest_batch(lambda size: not tried.append(size) and size <= room, most) == found
    assert all(size <= most for size in tried)


@pytest.mark.training
def test_the_gpu_bench_runs_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    ways = ["--ways", "checkpoint_activations"]
    bench_train_gpu.main(["--device", "cpu", "--small", "--rounds", "1", "--most", "1", *ways])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["way"], row["bottleneck"]) for row in rows] == [(ways[1], "fused"), (ways[1], "plain")]
    assert all(row["largest_batch"] == 1 and row["images_per_s"] > 0 for row in rows)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_train_gpu.main([])
    assert "torch sees no CUDA device" in capsys.readouterr().err
