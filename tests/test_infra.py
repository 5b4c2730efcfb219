"""infra/kubernetes, and what all of infra/ has in common: valid, of one mind with the code, without secrets."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from custom_resources import problems, validators
from infra_files import (
    CLOUDS,
    INFRA,
    OVERLAYS,
    PROJECT,
    ROOT,
    SBATCH,
    TEXTS,
    cluster_spec,
    documented_lines,
    dvae_words,
    entry_points,
    of_kind,
    pods,
    rendered,
    script_lines,
)
from jobs import cli
from jobs.config import load_config
from jobs.decode_place import Node, decode_place, takes_tasks
from jobs.submit import STOP_WAIT_S
from jobs.tokenize_config import TokenizeConfig
from jobs.train_config import TrainConfig

KINDS = {"tokenize": TokenizeConfig, "train": TrainConfig}
each_overlay = pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
PAGES = sorted(INFRA.rglob("*.md"))


@each_overlay
def test_kubernetes_knows_every_field_of_the_manifests(overlay: Path) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    core = [resource for resource in rendered(overlay) if resource["apiVersion"] != "ray.io/v1"]
    assert {"ServiceAccount", "ConfigMap", "NetworkPolicy", "PriorityClass"} == {each["kind"] for each in core}
    for resource in core:
        kubernetes_validate.validate(resource, "1.37", strict=True)
    for name, pod in pods(overlay).items():  # the definitions of Ray's kinds leave much of a pod open
        wrapped = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": pod}
        kubernetes_validate.validate(wrapped, "1.37", strict=True)


@each_overlay
def test_kuberay_knows_every_field_of_the_manifests(overlay: Path) -> None:
    folder = os.environ.get("DVAE_TEST_KUBERAY_CRDS")
    if folder is None:
        pytest.skip("DVAE_TEST_KUBERAY_CRDS names no folder with KubeRay's definitions")
    resources = of_kind(overlay, "RayCluster", "RayJob")
    assert len(resources) == 1
    for resource in resources:
        assert list(problems(validators(Path(folder))[resource["apiVersion"], resource["kind"]], resource)) == []


def test_a_field_that_kuberay_does_not_know_is_found(tmp_path: Path) -> None:
    spec = {"type": "object", "properties": {"suspend": {"type": "boolean"}}}
    schema = {"type": "object", "properties": {"spec": spec}}
    version = {"name": "v1", "schema": {"openAPIV3Schema": schema}}
    definition = {"spec": {"group": "ray.io", "names": {"kind": "RayJob"}, "versions": [version]}}
    (tmp_path / "definition.yaml").write_text(yaml.safe_dump(definition))
    validator = validators(tmp_path)["ray.io/v1", "RayJob"]
    job = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "x"}}
    assert list(problems(validator, {**job, "spec": {"suspend": True}})) == []
    assert "suspended" in next(problems(validator, {**job, "spec": {"suspended": True}}))


def lines() -> Iterator[tuple[str, list[str]]]:
    """Every call of `dvae` in infra/, and where it stands."""
    for overlay in OVERLAYS:
        for entry in entry_points(overlay):
            yield overlay.name, dvae_words(entry) or []
    for path in [*SBATCH, *PAGES]:
        for line in script_lines(path.read_text()) if path in SBATCH else documented_lines(path):
            if (words := dvae_words(line)) is not None:
                yield path.name, words


def take(words: list[str]) -> None:
    """As the command would, up to where it begins to work. Raises what a wrong line raises."""
    group = typer.main.get_command(cli.app)
    with group.make_context("dvae", list(words)) as context:
        name, command, rest = group.resolve_command(context, list(words))  # type: ignore[attr-defined]
        taken = command.make_context(name, rest, parent=context).params
    kind = taken.get("job", name)
    if kind in KINDS:
        config = taken["config"].replace("/etc/dvae/", "configs/")
        assert config.startswith("configs/"), f"{config} is no file of ours"
        load_config(KINDS[kind], str(ROOT / config), taken["overrides"] or ())


def test_every_dvae_line_in_infra_is_one_that_dvae_takes() -> None:
    seen = list(lines())
    assert {"tokenize-aws", "train-gcp", "tokenize.sbatch", "train.sbatch", "README.md"} <= {where for where, _ in seen}
    for _, words in seen:
        take(words)


def test_a_line_with_a_key_that_is_no_more_is_found() -> None:
    with pytest.raises(Exception, match="gpus_per_actr"):
        take(["tokenize", "/etc/dvae/tokenize.yaml", "ray.gpus_per_actr=1"])


@each_overlay
def test_the_component_of_a_job_comes_last_for_it_copies_the_cluster_as_it_is_by_then(overlay: Path) -> None:
    *first, last = yaml.safe_load((overlay / "kustomization.yaml").read_text())["components"]
    assert not {Path(each).name for each in first} & set(KINDS)
    assert (Path(last).name in KINDS) == bool(of_kind(overlay, "RayJob"))


@pytest.mark.parametrize("components", [("aws", "tokenize"), ("tokenize", "aws")])
def test_what_a_component_behind_that_of_the_job_patches_does_not_reach_it(
    tmp_path: Path, components: tuple[str, str]
) -> None:
    """So says the README; where kustomize should change this, that paragraph may go."""
    shutil.copytree(ROOT / "infra" / "kubernetes", tmp_path / "infra" / "kubernetes")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    overlay = tmp_path / "infra" / "kubernetes" / "overlays" / "tokenize-aws"
    kustomization = yaml.safe_load((overlay / "kustomization.yaml").read_text())
    kustomization["components"] = [f"../../components/{name}" for name in components]
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    assert ("nodeSelector" in pods(overlay)["head"]) == (components[-1] == "tokenize")


@each_overlay
def test_images_and_ray_are_the_pinned_ones(overlay: Path) -> None:
    spec = cluster_spec(overlay)
    assert f"ray=={spec['rayVersion']}\n" in (INFRA / "constraints.txt").read_text()
    assert spec["rayVersion"] == version("ray")
    images = {container["image"] for pod in pods(overlay).values() for container in pod["containers"]}
    assert images == {f"REGISTRY/dvae-ray:{PROJECT['version']}-cuda"}


def test_clouds_and_the_dockerfile_name_the_same_image() -> None:
    wanted = f"dvae-ray:{PROJECT['version']}-cuda"
    for path in CLOUDS:
        assert yaml.safe_load(path.read_text())["docker"]["image"] == f"REGISTRY/{wanted}"
    assert f"--tag {wanted}" in (INFRA / "Dockerfile").read_text()


@each_overlay
def test_no_pod_has_more_rights_than_it_needs(overlay: Path) -> None:
    for name, pod in pods(overlay).items():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert name == "head" or pod["automountServiceAccountToken"] is False  # the head's autoscaler has its own
        for container in pod["containers"]:
            rights = container["securityContext"]
            assert rights["allowPrivilegeEscalation"] is False and rights["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"] == container["resources"]["limits"]
    spec = cluster_spec(overlay)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"


@each_overlay
def test_the_network_lets_in_nodes_submitters_operator_and_metrics_alone(overlay: Path) -> None:
    (policy,) = of_kind(overlay, "NetworkPolicy")
    assert policy["spec"]["podSelector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    visitors = [rule for rule in policy["spec"]["ingress"] if "ports" in rule]
    assert [port["port"] for rule in visitors for port in rule["ports"]] == [8265, 8080]
    assert all(any("podSelector" in who for who in rule["from"]) for rule in policy["spec"]["ingress"])
    (submitter,) = (who["podSelector"]["matchLabels"] for who in visitors[0]["from"] if "namespaceSelector" not in who)
    for job in of_kind(overlay, "RayJob"):
        assert submitter.items() <= job["spec"]["submitterPodTemplate"]["metadata"]["labels"].items()


@each_overlay
def test_a_job_that_is_told_to_stop_has_as_long_as_a_submitted_one(overlay: Path) -> None:
    (container,) = (one for one in pods(overlay)["head"]["containers"] if one["name"] == "ray-head")
    assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": str(STOP_WAIT_S)} in container["env"]


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.name)
def test_so_has_one_on_cloud_machines(path: Path) -> None:
    *_, start = yaml.safe_load(path.read_text())["head_start_ray_commands"]
    assert f"RAY_JOB_STOP_WAIT_TIME_S={STOP_WAIT_S};" in start


def gib(quantity: str) -> float:
    return float(quantity.removesuffix("Gi"))


@each_overlay
def test_rays_object_store_fits_into_the_shared_memory_of_each_pod(overlay: Path) -> None:
    """It takes three tenths of a container's memory, and the disk where /dev/shm is smaller."""
    for name, pod in pods(overlay).items():
        if name == "submitter":
            continue
        (volume,) = (each for each in pod["volumes"] if each["name"] == "shared-memory")
        assert volume["emptyDir"]["medium"] == "Memory"
        assert {"name": "shared-memory", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]
        limit = gib(pod["containers"][0]["resources"]["limits"]["memory"])
        assert 0.3 * limit <= gib(volume["emptyDir"]["sizeLimit"]) <= 0.5 * limit


def node_types(overlay: Path) -> dict[str, Any]:
    """As Ray's own autoscaler reads the manifest."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    resource = {"metadata": {"name": "dvae", "namespace": "dvae"}, "spec": cluster_spec(overlay)}
    types: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]
    return types


@each_overlay
def test_the_autoscaler_takes_spot_first_and_the_same_on_demand_where_there_is_none(overlay: Path) -> None:
    types = node_types(overlay)
    assert types["headgroup"]["resources"]["CPU"] == 0
    for kind in ("gpu", "decode"):
        spot, on_demand = types[f"{kind}-spot"], types[f"{kind}-on-demand"]
        assert spot["resources"] == on_demand["resources"]  # else they are no alternatives to the autoscaler
        assert spot["labels"]["pool"] == on_demand["labels"]["pool"]
        assert spot["priority"] > on_demand["priority"]
    assert types["gpu-spot"]["resources"]["GPU"] == 1 and "GPU" not in types["decode-spot"]["resources"]


def launched(overlay: Path, resources: dict[str, float], labels: dict[str, str], *without: str) -> dict[str, int]:
    """The machines that Ray's autoscaler brings, of each group, for ten that ask for so much, where none of the groups
    `without` was to be had a moment ago."""
    from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.common_pb2 import LabelSelectorOperator

    types = {
        name: NodeTypeConfig(
            name=name, min_worker_nodes=one["min_workers"], max_worker_nodes=one["max_workers"],
            priority=one.get("priority", 0), resources=one["resources"], labels=one["labels"],
        )
        for name, one in node_types(overlay).items()
    }  # fmt: skip
    is_in = LabelSelectorOperator.Value("LABEL_OPERATOR_IN")
    selectors = [[(key, is_in, [value]) for key, value in labels.items()]] if labels else None
    asked = [ResourceRequestUtil.make(resources, label_selectors=selectors)] * 10
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=types,
        max_num_nodes=100,
        resource_requests=ResourceRequestUtil.group_by_count(asked),
        recoverable_resource_availabilities=dict.fromkeys(without, 0.0),
    )
    return {one.instance_type: one.count for one in ResourceDemandScheduler().schedule(request).to_launch}


@each_overlay
def test_what_jobs_wait_for_brings_the_machines_meant_for_it(overlay: Path) -> None:
    actor, decode, pool = {"GPU": 1.0, "CPU": 1.0}, {"CPU": 3.0}, {"pool": "cpu"}
    assert launched(overlay, actor, {}) == {"gpu-spot": 8, "gpu-on-demand": 2}
    assert launched(overlay, actor, {}, "gpu-spot") == {"gpu-on-demand": 8, "gpu-spot": 2}
    assert launched(overlay, decode, pool) == {"decode-spot": 2}
    assert launched(overlay, decode, pool, "decode-spot") == {"decode-on-demand": 2}


def settings_of(overlay: Path) -> Iterator[TokenizeConfig | TrainConfig]:
    for entry in entry_points(overlay):
        kind, config, *overrides = dvae_words(entry) or []
        yield load_config(KINDS[kind], str(ROOT / config.replace("/etc/dvae/", "configs/")), overrides)


@each_overlay
def test_the_jobs_fit_into_the_machines_of_their_manifest(overlay: Path) -> None:
    types = node_types(overlay)
    nodes = [Node(one["resources"], one["labels"]) for one in types.values() for _ in range(one["max_workers"] // 2)]
    gpu = types["gpu-spot"]
    for settings in settings_of(overlay):
        if isinstance(settings, TrainConfig):
            assert settings.ray.cpus_per_worker <= gpu["resources"]["CPU"]
            assert settings.ray.most_workers <= gpu["max_workers"]
            continue
        ray, num_actors = settings.ray, settings.ray.num_actors
        assert num_actors and num_actors <= gpu["max_workers"] and ray.cpus_per_actor <= gpu["resources"]["CPU"]
        assert takes_tasks(ray, nodes)
        place = decode_place(ray, nodes, num_actors, may_grow=False)
        assert place.tasks and not place.lack
        assert num_actors * place.shards_in_flight * place.tasks.cpus <= sum(n.cpus for n in nodes if not n.has_gpu)


SECRETS = re.compile(  # a value that begins with / is the path of one
    r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|eyJ[\w-]{20,}|AIza[\w-]{30,}|://[^/\s:@]+:[^/\s@]+@"
    r"|(?i:secret|password|token|api.?key)\w*[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9+_-][A-Za-z0-9/+_-]{19,}"
)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(INFRA).as_posix())
def test_no_secret_stands_in_a_file_of_infra(path: Path) -> None:
    assert SECRETS.findall(path.read_text()) == []


def test_a_secret_would_be_found() -> None:
    assert SECRETS.search("AWS_SECRET_ACCESS_KEY: wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY")
    assert SECRETS.search("s3://someone:something@store/bucket")


@each_overlay
def test_secrets_come_by_reference(overlay: Path) -> None:
    assert of_kind(overlay, "Secret") == []
    for pod in pods(overlay).values():
        for variable in (each for container in pod["containers"] for each in container.get("env", [])):
            if re.search("KEY|TOKEN|SECRET|PASSWORD", variable["name"]):
                assert "value" not in variable


def test_storage_keys_reach_every_node_of_a_cluster() -> None:
    overlay = next(path for path in OVERLAYS if path.name == "interactive-keys")
    for pod in pods(overlay).values():
        assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "dvae-storage"}}]
