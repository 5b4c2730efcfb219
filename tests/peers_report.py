"""From runs to medians, spreads and ratios; as JSON and as text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from peers_hosts import Measured
from peers_workloads import CORES, Row

OURS = ("ours", "ours_tasks", "ours_no_ray")
Runs = dict[str, list[Measured]]  # of one row: the rounds of each peer


def as_json(measured: dict[Row, Runs], titles: dict[str, str], idle: float) -> dict[str, Any]:
    return {
        "cores": CORES,
        "ray_idle_cpu": round(idle, 3),
        "rows": [{"name": row.name, "title": row.title, **_row(row, runs, titles)} for row, runs in measured.items()],
    }


def _row(row: Row, runs: Runs, titles: dict[str, str]) -> dict[str, Any]:
    engines = {name: each for name, each in runs.items() if each and name != "stages"}
    return {
        "peers": [{"name": name, "title": titles[name], **_peer(each)} for name, each in engines.items()],
        "ideal": _ideal(row, runs),
        "ratios": _ratios(row, runs),
    }


def _peer(runs: list[Measured]) -> dict[str, Any]:
    return {
        "num_images": runs[0].num_images,
        "images_per_s": spread([run.images_per_s for run in runs]),
        "cpu_ms_per_image": spread([run.cpu_ms_per_image for run in runs]),
        "daemon_cpu": spread([run.daemon_cpu_s / run.seconds for run in runs]),
        "peak_mb": spread([run.peak_bytes / 1e6 for run in runs]),
        "head_s": spread([run.head_s for run in runs]),
    }


def _ideal(row: Row, runs: Runs) -> dict[str, Any] | None:
    stages = [run.stages for run in runs.get("stages", []) if run.stages]
    if not stages:
        return None
    means = {name[:-2]: spread([1000 * each[name] for each in stages]) for name in stages[0]}
    return {"cpu_ms_per_image": means, "images_per_s": spread([ideal_of(row, each) for each in stages])}


def ideal_of(row: Row, stages: dict[str, float]) -> float:
    """Images a second of cores that do nothing else and never wait; no more than the GPU has."""
    cores = CORES / sum(stages.values())
    return min(cores, 1 / row.image_s) if row.image_s else cores


def _ratios(row: Row, runs: Runs) -> dict[str, Any]:
    """Ours to each other one, round by round."""
    found = {}
    for name, theirs in runs.items():
        if name == "stages":
            rates = [ideal_of(row, run.stages) for run in theirs if run.stages]
        else:
            rates = [run.images_per_s for run in theirs]
        for ours in OURS[: OURS.index(name)] if name in OURS else OURS:
            mine = [run.images_per_s for run in runs.get(ours, [])]
            if mine and len(mine) == len(rates):
                pairs = [one / other for one, other in zip(mine, rates, strict=True)]
                found[f"{ours} / {'ideal' if name == 'stages' else name}"] = spread(pairs)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


def as_text(report: dict[str, Any]) -> str:
    idle = f"{report['cores']} cores; Ray's own processes take {report['ray_idle_cpu']:.3f} of them while nothing runs."
    return "\n".join([idle, *(line for row in report["rows"] for line in _row_text(row))])


def _row_text(row: dict[str, Any]) -> list[str]:
    head = f"{'':34} {'images/s':>22} {'CPU ms/image':>20} {'Ray itself, cores':>18} {'peak MB':>8} {'images':>7}"
    lines = ["", row["title"], head]
    for peer in row["peers"]:
        rate, cpu = shown(peer["images_per_s"]), shown(peer["cpu_ms_per_image"])
        rest = f"{peer['daemon_cpu']['median']:18.3f} {peer['peak_mb']['median']:8,.0f} {peer['num_images']:7,}"
        lines.append(f"{peer['title']:34} {rate:>22} {cpu:>20} {rest}")
    if row["ideal"]:
        stages = ", ".join(f"{name} {each['median']:.2f}" for name, each in row["ideal"]["cpu_ms_per_image"].items())
        lines.append(f"{'ideal':34} {shown(row['ideal']['images_per_s']):>22}   CPU ms: {stages}")
    return lines + [f"  {name:34} {shown(ratio)}" for name, ratio in row["ratios"].items()]


def shown(figures: dict[str, float]) -> str:
    return f"{figures['median']:,.4g} ({figures['min']:,.4g}-{figures['max']:,.4g})"
