"""What infra/ holds, for the tests of it: rendered manifests, and the lines that people and machines type there."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
INFRA = ROOT / "infra"
OVERLAYS = sorted(path.parent for path in INFRA.glob("kubernetes/overlays/*/kustomization.yaml"))
TEXTS = sorted(path for path in INFRA.rglob("*") if path.is_file() and path.suffix != ".txt")
CLOUDS = sorted(INFRA.glob("cloud/*.yaml"))
SBATCH = sorted(INFRA.glob("slurm/*.sbatch"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
_BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


@cache
def rendered(overlay: Path) -> list[dict[str, Any]]:
    """The resources that `kubectl apply -k` would send."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not there, which renders the manifests")
    command = ["kubectl", "kustomize", str(overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [resource for resource in yaml.safe_load_all(done.stdout) if resource]


def of_kind(overlay: Path, *kinds: str) -> list[dict[str, Any]]:
    return [resource for resource in rendered(overlay) if resource["kind"] in kinds]


def cluster_spec(overlay: Path) -> dict[str, Any]:
    """Of the Ray cluster, whether it stays or lives as long as its job."""
    (resource,) = of_kind(overlay, "RayCluster", "RayJob")
    spec: dict[str, Any] = resource["spec"]
    return spec.get("rayClusterSpec", spec)


def pods(overlay: Path) -> dict[str, dict[str, Any]]:
    """By the name of their group: all pods that the manifests ask for."""
    spec = cluster_spec(overlay)
    found = {group["groupName"]: group["template"]["spec"] for group in spec["workerGroupSpecs"]}
    found["head"] = spec["headGroupSpec"]["template"]["spec"]
    for job in of_kind(overlay, "RayJob"):
        found["submitter"] = job["spec"]["submitterPodTemplate"]["spec"]
    return found


def entry_points(overlay: Path) -> list[str]:
    return [job["spec"]["entrypoint"] for job in of_kind(overlay, "RayJob")]


def script_lines(text: str) -> Iterator[str]:
    """Those of a shell script, continued ones as one, without comments."""
    for line in text.replace("\\\n", " ").splitlines():
        if not line.lstrip().startswith("#"):
            yield line.strip()


def documented_lines(path: Path) -> Iterator[str]:
    for block in _BLOCK.findall(path.read_text()):
        yield from script_lines(block)


def dvae_words(line: str) -> list[str] | None:
    """The arguments of `dvae` where a line calls it, by itself or by Slurm's script; else None."""
    words = shlex.split(line, comments=True)
    if words[:2] == ["exec", "infra/slurm/on_ray.sh"]:
        words = words[2:]
    return words[1:] if words[:1] == ["dvae"] else None
