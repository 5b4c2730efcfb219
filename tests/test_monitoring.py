"""infra/monitoring: every figure that the dashboard and the alerts ask for is exported by real runs, and is true."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
import yaml

from fakes import ShardFault
from jobs.checkpoints import read_head
from jobs.metrics import METRICS, run_label
from jobs.tokenize_dataset import run_tokenize
from make_data import write_checkpoint
from make_run import run_config, write_shard
from scrape import Scrape, names_in, scraped

ROOT = Path(__file__).parent.parent
MONITORING = ROOT / "infra" / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana-dashboard.json").read_text())
ALERTS = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
EXPORTED = {f"ray_dvae_{metric.name}{end}" for metric in METRICS.values() for end in SUFFIXES[metric.kind]}
NEEDS_A_GPU = {"ray_node_gpus_utilization"}
PROMTOOL = shutil.which(os.environ.get("DVAE_TEST_PROMTOOL", "promtool"))
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool here (Prometheus brings it)")


def expressions() -> list[str]:
    """All PromQL: of the dashboard's panels and its variables, and of the alerts."""
    targets = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    variables = [one["definition"] for one in DASHBOARD["templating"]["list"] if "definition" in one]
    return targets + variables + [rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]]


def asked_for() -> set[str]:
    return set().union(*map(names_in, expressions()))


def promtool(*arguments: str) -> str:
    """What it says, which must be no complaint."""
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def missing(found: Scrape, kind: str, run: str) -> set[str]:
    """What is asked for of runs of that kind, and is not there for this one."""
    there = {name for name, labels, _ in found.samples if labels.get("run") == run}
    return {name for name in asked_for() if name.startswith(f"ray_dvae_{kind}_")} - there


def test_no_panel_or_alert_asks_for_a_metric_that_we_do_not_have_and_none_is_there_for_nobody() -> None:
    ours = {name for name in asked_for() if name.startswith("ray_dvae_")}
    assert ours <= EXPORTED
    unused = {
        m.name for m in METRICS.values() if not any(f"ray_dvae_{m.name}{end}" in ours for end in SUFFIXES[m.kind])
    }
    assert not unused


def test_rays_own_gpu_metric_is_one_that_its_own_dashboard_asks_for() -> None:
    from ray.dashboard.modules.metrics.dashboards import default_dashboard_panels

    panels = Path(default_dashboard_panels.__file__).read_text()
    assert asked_for() >= NEEDS_A_GPU and all(name in panels for name in NEEDS_A_GPU)


def test_the_dashboard_is_tidy() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    cells = Counter(
        (x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])
    )
    assert max(cells.values()) == 1 and max(x for x, _ in cells) < 24, "panels lie over each other"
    for panel in panels:
        for target in panel.get("targets", ()):
            assert "ray_dvae_" not in target["expr"] or 'run=~"$run"' in target["expr"], panel["title"]


def test_the_operators_rules_are_those_of_prometheus() -> None:
    rule = yaml.safe_load((MONITORING / "prometheus-rule.yaml").read_text())
    assert rule["spec"] == ALERTS


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here")
def test_kustomize_gives_the_operator_its_rules_its_targets_and_grafana_the_dashboard() -> None:
    command = ["kubectl", "kustomize", str(MONITORING)]
    rendered = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    by_kind = {each["kind"]: each for each in yaml.safe_load_all(rendered)}
    assert set(by_kind) == {"PodMonitor", "PrometheusRule", "ConfigMap"}
    (dashboard,) = by_kind["ConfigMap"]["data"].values()
    assert json.loads(dashboard) == DASHBOARD and by_kind["PrometheusRule"]["spec"] == ALERTS


@needs_promtool
@pytest.mark.parametrize(
    "command", ["check config infra/monitoring/prometheus.yaml", "test rules tests/alerts_test.yaml"]
)
def test_prometheus_accepts_its_configuration_and_the_alerts_fire_when_they_should(command: str) -> None:
    said = promtool(*command.split())
    assert "SUCCESS" in said, said


@needs_promtool
def test_prometheus_can_parse_every_panel(tmp_path: Path) -> None:
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    rules = [{"record": f"panel:{number}", "expr": expr} for number, expr in enumerate(panels)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(panels)} rules found" in promtool("check", "rules", str(tmp_path / "rules.yaml"))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_real_run_exports_all_that_is_asked_for_and_its_figures_are_those_of_its_tables(tmp_path: Path) -> None:
    """Images that are none, a shard that is cut, an actor that dies. (Training: test_train_ray.py.)"""
    for number, good in enumerate(("+++++-+++", "++", "++++--++++++++", "+-")):
        write_shard(tmp_path / "shards" / f"s-{number}.tar", 100 * number, good)
    (tmp_path / "shards" / "cut.tar").write_bytes((tmp_path / "shards" / "s-0.tar").read_bytes()[:3000])
    (tmp_path / "deaths").mkdir()
    checkpoint, output = write_checkpoint(tmp_path / "checkpoint"), tmp_path / "watched"
    config = run_config(
        checkpoint, tmp_path / "shards", output, attempts=2, retry_pause_s=0, max_failed_samples=0.5,
        max_failed_shards=1, ray={"num_actors": 2},
    )  # fmt: skip
    head, deaths = read_head(str(checkpoint)), str(tmp_path / "deaths")
    assert run_tokenize(config, "dvae", ShardFault(head, needle="s-1", deed="exit", times=1, marks=deaths)) == 0
    run = run_label(str(output))
    tokens, errors = (ds.dataset(output / name).to_table() for name in ("tokens", "errors"))

    states = {"done": 4, "quarantined": 1}

    def has_all(found: Scrape) -> bool:
        """The driver is this process, and an actor another: each exports when its time has come."""
        decoded = found.value("ray_dvae_tokenize_decoded_images_total", run=run) or 0
        ended = found.values("ray_dvae_tokenize_ended_shards_total", by="state", run=run)
        return decoded >= len(tokens) and ended == states and not missing(found, "tokenize", run)

    found = scraped(has_all)
    assert not missing(found, "tokenize", run)
    assert {name for name in asked_for() if not name.startswith("ray_dvae_")} - found.names == NEEDS_A_GPU
    assert found.value("ray_dvae_tokenize_images_total", run=run) == len(tokens)
    failed = Counter(row["reason"] for row in errors.to_pylist() if row["stage"] != "shard")
    assert found.values("ray_dvae_tokenize_failed_images_total", by="reason", run=run) == failed == {"not_an_image": 4}
    shards = found.values("ray_dvae_tokenize_shards", by="state", run=run)
    assert shards == {**states, "waiting": 0, "in_flight": 0}
    attempts = found.values("ray_dvae_tokenize_failed_attempts_total", by="reason", run=run)
    assert attempts.pop("shard_crashed") >= 1 and attempts == {"shard_truncated": 2}
    assert found.values("ray_dvae_tokenize_lost_actors_total", by="reason", run=run) == {"shard_crashed": 1}
    assert found.value("ray_dvae_tokenize_failed_share", run=run) == 4 / (len(tokens) + 4)
    sizes = sum(part.stat().st_size for part in (output / "tokens").iterdir())
    assert found.value("ray_dvae_tokenize_output_bytes_total", run=run) == sizes
    assert found.value("ray_dvae_tokenize_shard_seconds_count", run=run) == 4
    assert set(found.values("ray_dvae_tokenize_stage_seconds_total", by="stage", run=run)) <= {
        "read", "pixels", "encode", "write",
    }  # fmt: skip
    assert str(tmp_path) not in " ".join(str(labels) for name, labels, _ in found.samples if "dvae" in name)


def rules() -> list[dict[str, Any]]:
    return [rule for group in ALERTS["groups"] for rule in group["rules"]]


def test_every_alert_says_which_run_and_what_to_do() -> None:
    for rule in rules():
        assert "$labels.run" in rule["annotations"]["summary"], rule["alert"]
        assert rule["annotations"]["description"] and rule["labels"]["severity"] in ("critical", "warning", "info")
