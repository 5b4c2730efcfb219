"""infra/: the image, the files of `ray up` and of Slurm: linted, and taken by the programs that will read them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from infra_files import CLOUDS, INFRA, PROJECT, ROOT, SBATCH, TEXTS, script_lines


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


def test_every_machine_has_an_identity_that_we_name_and_the_heads_is_its_own() -> None:
    """Ray's launcher would give the head one of its own, with rights on the whole project or account."""
    names: dict[str, list[str]] = {}
    for path in CLOUDS:
        types = yaml.safe_load(path.read_text())["available_node_types"]
        for name, machine in ((name, one["node_config"]) for name, one in types.items()):
            profile = machine.get("IamInstanceProfile") or machine["serviceAccounts"][0]
            names.setdefault("head" if name == "head" else "worker", []).append(profile.get("Name") or profile["email"])
    assert set(names["head"]) == {"dvae-head", "dvae-head@PROJECT.iam.gserviceaccount.com"}
    assert set(names["worker"]) == {"dvae", "dvae@PROJECT.iam.gserviceaccount.com"}


def test_the_policy_of_aws_heads_allows_what_rays_launcher_calls_and_no_other_role_is_passed_on() -> None:
    import ray.autoscaler

    provider = Path(ray.autoscaler.__file__).parent / "_private" / "aws" / "node_provider.py"
    calls = set(re.findall(r"self\.ec2(?:_fail_fast)?\.(?:meta\.client\.)?(\w+)(?=[.(]|$)", provider.read_text(), re.M))
    actions = {"create_instances": "ec2:RunInstances", "instances": "ec2:DescribeInstances"}
    stopped = {"start_instances", "stop_instances"}  # with cache_stopped_nodes alone
    assert {"create_instances", "instances", "create_tags", "terminate_instances"} | stopped <= calls
    assert yaml.safe_load((INFRA / "cloud" / "aws.yaml").read_text())["provider"]["cache_stopped_nodes"] is False
    statements = json.loads((INFRA / "storage-policies" / "aws-head.json").read_text())["Statement"]
    given = {
        action
        for one in statements
        for action in ([one["Action"]] if isinstance(one["Action"], str) else one["Action"])
    }
    needed = {actions.get(call, f"ec2:{call.title().replace('_', '')}") for call in calls - stopped}
    assert needed | {"iam:PassRole"} == given
    (passed,) = (one for one in statements if one["Action"] == "iam:PassRole")
    assert passed["Resource"] == "arn:aws:iam::ACCOUNT:role/dvae"


@pytest.mark.parametrize("path", [each for each in TEXTS if each.suffix != ".md"], ids=lambda path: path.name)
def test_files_that_a_file_of_infra_names_by_the_way_to_them_are_there(path: Path) -> None:
    for name in re.findall(r"(?:\.\./)+[\w./-]*\w", path.read_text()):
        assert (path.parent / name).exists(), f"{path} names {name}"


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
