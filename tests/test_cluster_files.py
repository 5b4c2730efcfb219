"""infra/: the image, the files of `ray up` and of Slurm: linted, and taken by the programs that will read them."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from infra_files import CLOUDS, INFRA, PROJECT, ROOT, SBATCH, script_lines


def program(name: str) -> str:
    """One of the tools that the extra `dev` brings, beside this Python or on PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not there: pip install '.[dev]'")
    return found


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_is_clean() -> None:
    run(program("hadolint"), "--no-color", str(INFRA / "Dockerfile"))


def test_the_dockerfile_copies_what_is_there_and_installs_extras_that_are() -> None:
    text = (INFRA / "Dockerfile").read_text()
    ignored = (INFRA / "Dockerfile.dockerignore").read_text().split("\n")
    for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE):
        for source in (word for word in line.split()[:-1] if word != "."):
            assert (ROOT / source).exists()
            assert f"!{source}" in ignored or f"!{source}/**" in ignored, f"{source} never reaches the build"
    (extras,) = re.findall(r"\.\[([\w,-]+)\]", text)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    (python,) = re.findall(r"^ARG PYTHON=([\d.]+)$", text, re.MULTILINE)
    assert f"{sys.version_info.major}.{sys.version_info.minor}" == python.rpartition(".")[0]


@pytest.mark.parametrize("path", sorted(INFRA.glob("slurm/*")), ids=lambda path: path.name)
def test_scripts_are_clean(path: Path) -> None:
    run(program("shellcheck"), str(path))


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.name)
def test_ray_up_takes_the_cloud_files(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(yaml.safe_load(path.read_text()))
    validate_config(prepared)
    assert prepared["head_setup_commands"] == prepared["worker_setup_commands"] == []  # Ray's defaults install a Ray
    types = prepared["available_node_types"]
    assert types[prepared["head_node_type"]]["resources"]["CPU"] == 0
    assert types["gpu-spot"]["resources"] == types["gpu-on-demand"]["resources"]
    assert types["decode-spot"]["resources"]["decoder"] == types["decode-spot"]["resources"]["CPU"]
    for command in (*prepared["head_start_ray_commands"], *prepared["worker_start_ray_commands"]):
        assert command == "ray stop" or "RAY_AUTH_MODE=token" in command
    assert "--dashboard-host=127.0.0.1" in prepared["head_start_ray_commands"][-1]


@pytest.mark.parametrize("path", SBATCH, ids=lambda path: path.name)
def test_a_slurm_job_is_warned_before_its_end_requeued_and_alone_on_its_nodes(path: Path) -> None:
    options = set(re.findall(r"^#SBATCH (--\S+)", path.read_text(), re.MULTILINE))
    assert {"--signal=B:TERM@300", "--requeue", "--exclusive", "--ntasks-per-node=1", "--open-mode=append"} <= options


def test_ray_symmetric_run_takes_the_arguments_of_the_slurm_script() -> None:
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

    (line,) = (line for line in script_lines((INFRA / "slurm" / "on_ray.sh").read_text()) if line.startswith("srun"))
    words = shlex.split(line)
    start = words[words.index("symmetric-run") + 1 : words.index("--")]
    assert curate_and_validate_ray_start_args([word.replace("$SLURM_JOB_NUM_NODES", "4") for word in start]) == [
        "--disable-usage-stats"
    ]
