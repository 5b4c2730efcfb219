"""What the nodes of a Ray cluster export for Prometheus, read as it reads it, and the names that queries ask for."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

import ray
from prometheus_client.parser import text_string_to_metric_families

EXPORT_WAIT_S = 60.0  # Ray's processes tell their node every ten seconds
_NAME = re.compile(r"\bray_\w+")


@dataclass(frozen=True)
class Scrape:
    """All samples of all nodes that are there now."""

    samples: tuple[tuple[str, dict[str, str], float], ...]

    @property
    def names(self) -> set[str]:
        return {name for name, _, _ in self.samples}

    def values(self, name: str, by: str = "", **labels: str) -> dict[str, float]:
        """Sums by the label `by`, of the samples that have these labels."""
        sums: dict[str, float] = {}
        for found, theirs, value in self.samples:
            if found == name and labels.items() <= theirs.items():
                sums[theirs.get(by, "")] = sums.get(theirs.get(by, ""), 0.0) + value
        return sums

    def value(self, name: str, **labels: str) -> float | None:
        return self.values(name, **labels).get("")


def scrape() -> Scrape:
    """Of the cluster that this process is connected to."""
    texts = (
        urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=30)
        for node in ray.nodes()
        if node["Alive"]
    )
    families = (family for text in texts for family in text_string_to_metric_families(text.read().decode()))
    return Scrape(tuple((one.name, dict(one.labels), one.value) for family in families for one in family.samples))


def scraped(is_there: Callable[[Scrape], bool]) -> Scrape:
    """The first scrape for which that holds; the last one, when the time is up."""
    give_up_at = time.monotonic() + EXPORT_WAIT_S
    while not is_there(found := scrape()) and time.monotonic() < give_up_at:
        time.sleep(0.5)
    return found


def names_in(expression: str) -> set[str]:
    """Of Ray's metrics (ours among them), in PromQL."""
    return set(_NAME.findall(re.sub(r'"[^"]*"', '""', expression)))
