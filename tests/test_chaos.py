"""Random SIGKILLs of the driver, its actors and the S3 server; at the end the very bytes of an undisturbed run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from chaos import Chaos, dvae
from jobs.local_servers import S3Server
from make_data import sample_members, tar_bytes, write_checkpoint
from pipeline import storage
from s3_clients import s3_clients_of

pytestmark = [pytest.mark.ray, pytest.mark.server]
WEIGHTS = {"actor": 6, "driver": 2, "server": 2}
BUCKET = "s3://chaos"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server of its own: it is killed and comes back."""
    one = S3Server(tmp_path_factory.mktemp("chaos-s3"), "chaos")
    one.start()
    with s3_clients_of(one.environment):
        yield one
    one.kill()  # its data are thrown away


def publish_shards(num_shards: int) -> tuple[int, int]:
    """(good images, bad images); every third shard has a bad one."""
    first, num_bad = 0, 0
    for number in range(num_shards):
        members = sample_members(first, 8 + number % 17)
        first += 8 + number % 17
        if number % 3 == 0:
            members.insert(6, (f"bad{number:05d}.jpg", members[0][1][:200]))
            num_bad += 1
        storage.publish(f"{BUCKET}/in/made-{number:06d}.tar", tar_bytes(members))
    return first, num_bad


def write_config(folder: Path) -> Path:
    """An encoder that takes its time over small images, so that there is something to kill."""
    for path in write_checkpoint(folder / "checkpoint", size=128, width=128).iterdir():
        storage.publish(f"{BUCKET}/checkpoint/{path.name}", path.read_bytes())
    config = folder / "tokenize.yaml"
    config.write_text(yaml.safe_dump({
        "checkpoint": f"{BUCKET}/checkpoint", "shards": f"{BUCKET}/in/*.tar", "output": f"{BUCKET}/calm",
        "batch_size": 8, "retry_pause_s": 0.2, "max_failed_samples": 0.5,
        "ray": {"num_actors": 2, "cpus_per_actor": 0.5},
    }))  # fmt: skip
    return config


def files(output: str) -> dict[str, bytes]:
    """What tokenising is for: the parts and the errors."""
    found = [info.url for name in ("tokens", "errors") for info in storage.list_files(f"{output}/{name}")]
    return {url.removeprefix(output): storage.read_bytes(url) for url in found}


def succeeds(*arguments: str) -> str:
    done = subprocess.run(dvae(*arguments), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def torment(folder: Path, server: S3Server, *, num_shards: int, num_kills: int, seed: int) -> str:
    """Whole outputs, each made under kills, until so many were killed; what happened, in words."""
    num_good, num_bad = publish_shards(num_shards)
    config = write_config(folder)
    said = succeeds("tokenize", str(config))
    assert f"{num_good} images tokenised · {num_bad} failed" in said.replace(",", "")
    calm = files(f"{BUCKET}/calm")
    chaos = Chaos(server, num_kills, seed, WEIGHTS, (1.0, 6.0), folder / "log")
    num_outputs = 0
    while chaos.killed.total() < num_kills:
        output, num_outputs = f"{BUCKET}/out-{num_outputs}", num_outputs + 1
        chaos.run_until_done(dvae("tokenize", str(config), f"output={output}"))
        assert files(output) == calm
        succeeds("verify", output)
    assert chaos.killed.total() == num_kills
    return f"killed {dict(chaos.killed)}; exit codes {dict(chaos.exit_codes)}; {num_outputs} outputs byte-identical\n"


@pytest.mark.timeout(600)
def test_a_few_kills_of_everything_leave_the_bytes_of_an_undisturbed_run(tmp_path: Path, server: S3Server) -> None:
    sys.stdout.write(torment(tmp_path, server, num_shards=6, num_kills=4, seed=1))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_sixty_kills_leave_the_bytes_of_an_undisturbed_run(
    tmp_path: Path, server: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    said = torment(tmp_path, server, num_shards=40, num_kills=60, seed=2)
    assert all(f"'{victim}'" in said for victim in WEIGHTS), said
    with capsys.disabled():
        sys.stdout.write(said)
