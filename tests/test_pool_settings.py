"""How a pool is chosen by the cluster it finds, with a stand-in for Ray: also one that comes up only when asked."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from jobs import pool_settings as module
from jobs.cluster import OBJECT_STORE_BYTES, ClusterError
from jobs.config import check
from jobs.pool_settings import PoolSettings, pool_settings, store_bytes
from jobs.tokenize_config import TokenizeConfig
from jobs.waiting import Waiting
from pipeline.errors import RunHeld

HEAD = {"CPU": 0.0}
GPU_NODE = {"CPU": 16.0, "GPU": 2.0}


def config(**ray: Any) -> TokenizeConfig:
    return check(TokenizeConfig, {"checkpoint": "c", "shards": "s", "output": "o", "ray": ray}, "test")


class Cluster:
    """Ray, where `later` joins the nodes `after_s` after somebody waits for a place; time passes in waits only."""

    def __init__(self, *nodes: dict[str, float], later: dict[str, float] | None = None, after_s: float = 0.0) -> None:
        self._nodes, self._later, self._after_s = list(nodes), later, after_s
        self.time, self.asked, self.cancelled = 0.0, 0, 0

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": node} for node in self._nodes]

    def remote(self, **_: Any) -> Callable[[Any], Any]:
        return lambda function: Place(self)

    def wait(self, calls: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        comes = self._later is not None and self._after_s <= self.time + timeout
        self.time = self._after_s if comes else self.time + timeout
        if self._later is not None and comes:
            self._nodes.append(self._later)
        return calls[:comes], calls[comes:]

    def cancel(self, call: object) -> None:
        self.cancelled += 1

    def monotonic(self) -> float:
        return self.time


class Place:
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def remote(self) -> object:
        self._cluster.asked += 1
        return object()


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., PoolSettings]:
    def choose(cluster: Cluster, look: Callable[[], None] = lambda: None, **ray: Any) -> PoolSettings:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr(module, "ray", cluster)
        monkeypatch.setattr(module, "time", cluster)
        monkeypatch.setattr(module, "describe_resources", lambda: "nothing")
        return pool_settings(config(**ray), 1000, look)

    return choose


def test_a_cluster_that_grows_from_nothing_is_asked_for_its_first_node_which_decides(
    on: Callable[..., PoolSettings], caplog: pytest.LogCaptureFixture
) -> None:
    cluster = Cluster(HEAD, later=GPU_NODE, after_s=120.0)
    chosen = on(cluster, address="auto", gpus_per_actor=1, num_actors=8)
    assert (chosen.num_actors, chosen.decode_threads, chosen.waited_s, cluster.time) == (8, 8, 0.0, 120.0)
    assert cluster.asked == cluster.cancelled == 8
    assert "no node can hold an actor yet; waiting up to 300 s (ray.wait_s)" in caplog.text
    assert on(Cluster(HEAD, later=GPU_NODE), address="auto", gpus_per_actor=1).num_actors == 2


def test_who_waited_in_vain_for_a_node_is_told_so_at_once_and_not_after_another_wait(
    on: Callable[..., PoolSettings], caplog: pytest.LogCaptureFixture
) -> None:
    cluster = Cluster(HEAD)
    chosen = on(cluster, address="auto", gpus_per_actor=1)
    assert (cluster.time, chosen.waited_s, chosen.num_actors) == (300.0, 300.0, 1)
    assert "no node has the 1 GPU of an actor yet: one actor is asked for" in caplog.text
    now = 0.0
    waiting = Waiting(chosen, lambda: now, lambda: "0 GPUs")
    now = 1.0
    with pytest.raises(ClusterError, match=r"no actor could start within 300 s \(ray\.wait_s\)"):
        waiting.check(any_ready=False, last_loss="")


def test_a_driver_that_lost_its_run_while_it_waits_for_a_node_ends(on: Callable[..., PoolSettings]) -> None:
    def look() -> None:
        if cluster.time > 25:
            raise RunHeld("another driver has it")

    cluster = Cluster(HEAD, later=GPU_NODE, after_s=120.0)
    with pytest.raises(RunHeld):
        on(cluster, look, address="auto", gpus_per_actor=1, num_actors=8)
    assert (cluster.time, cluster.cancelled) == (30.0, 8)


def test_where_there_is_room_or_no_hope_nobody_waits(on: Callable[..., PoolSettings]) -> None:
    for cluster, address in ((Cluster(HEAD, GPU_NODE), "auto"), (Cluster({"CPU": 2.0}), None)):
        on(cluster, address=address, gpus_per_actor=1)
        assert (cluster.asked, cluster.time) == (0, 0.0)


def test_one_cpu_for_actor_and_task_is_not_said_to_be_no_cpu(
    on: Callable[..., PoolSettings], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    chosen = on(Cluster({"CPU": 1.0}), decode="tasks")
    assert (chosen.num_actors, chosen.decode) == (1, None)
    assert [record.getMessage() for record in caplog.records] == [
        "a decode task takes 1 CPU, and the actors leave 0 CPU; lower ray.num_actors or ray.decode_cpus; "
        "the actors decode by themselves"
    ]


def test_the_object_store_has_room_for_all_the_shards_that_tasks_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "cpu_count", lambda: 64)
    batch = 64 * 256 * 256 * 3
    assert store_bytes(config(gpus_per_actor=1, num_actors=1, decode="tasks"), 256) == 16 * 4 * batch
    assert store_bytes(config(gpus_per_actor=1, num_actors=1), 256) == OBJECT_STORE_BYTES
