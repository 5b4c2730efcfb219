"""Where shards are decoded and how many at once, for clusters of many kinds."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.config import ConfigError, check
from jobs.decode_place import (
    DecodePlace,
    Node,
    decode_place,
    fulfils,
    most_in_flight,
    node_of,
    num_actors_on,
    spare_cpus,
    takes_tasks,
)
from jobs.tokenize_config import RaySettings

ONE_MACHINE = [Node({"CPU": 2})]
GPU_MACHINE = [Node({"CPU": 32, "GPU": 8})]
MIXED = [*GPU_MACHINE, Node({"CPU": 64}, {"pool": "cpu"}), Node({"CPU": 64, "decoder": 4}, {"pool": "cpu"})]
SMALL_HEAD = [Node({"CPU": 4}), Node({"CPU": 96, "GPU": 8}), Node({"CPU": 96, "GPU": 8})]


def settings(**values: Any) -> RaySettings:
    return check(RaySettings, values, "test")


def place(nodes: list[Node], num_actors: int, *, may_grow: bool = True, **values: Any) -> DecodePlace:
    return decode_place(settings(**values), nodes, num_actors, may_grow=may_grow)


@pytest.mark.parametrize(
    ("nodes", "values", "tasks"),
    [
        (ONE_MACHINE, {}, False),
        (ONE_MACHINE, {"decode": "tasks"}, True),
        (GPU_MACHINE, {"gpus_per_actor": 1}, False),
        (MIXED, {"gpus_per_actor": 1}, True),
        (MIXED, {"gpus_per_actor": 1, "decode": "threads"}, False),
        (MIXED, {}, False),  # actors on CPUs may be on any machine themselves
        (MIXED, {"decode_labels": {"pool": "cpu"}}, True),
        (ONE_MACHINE, {"decode_resources": {"decoder": 1}}, True),
        (SMALL_HEAD, {"gpus_per_actor": 1}, False),
        ([], {"gpus_per_actor": 1}, False),
    ],
)
def test_auto_takes_tasks_where_other_machines_have_cpus_that_count(
    nodes: list[Node], values: dict[str, Any], tasks: bool
) -> None:
    assert takes_tasks(settings(**values), nodes) == tasks


@pytest.mark.parametrize(
    ("nodes", "num_actors", "values", "threads"),
    [
        (ONE_MACHINE, 2, {}, 1),  # measured: two actors of one thread each are best on two cores
        (ONE_MACHINE, 1, {}, 2),
        (ONE_MACHINE, 8, {}, 1),
        (GPU_MACHINE, 8, {"gpus_per_actor": 1}, 4),
        (SMALL_HEAD, 16, {"gpus_per_actor": 1}, 12),  # no actor can be on the head
        ([Node({"CPU": 256, "GPU": 1})], 1, {"gpus_per_actor": 1}, 64),
        (
            [Node({"CPU": 16, "GPU": 1})],
            8,
            {"gpus_per_actor": 1},
            16,
        ),  # seven of the actors wait for more such machines
        (GPU_MACHINE, 8, {"gpus_per_actor": 1, "decode_threads": 7}, 7),
        ([Node({"CPU": 0}), Node({"CPU": 6})], 3, {}, 2),  # nor on a head without CPUs
        ([], 1, {}, 1),
    ],
)
def test_threads_in_an_actor_are_its_share_of_its_machine(
    nodes: list[Node], num_actors: int, values: dict[str, Any], threads: int
) -> None:
    assert place(nodes, num_actors, **values) == DecodePlace(threads, 2)


@pytest.mark.parametrize(
    ("nodes", "num_actors", "values", "threads", "in_flight"),
    [
        (MIXED, 8, {"gpus_per_actor": 1}, 2, 9),  # 160 CPUs, of which the actors take 8
        (MIXED, 1, {"gpus_per_actor": 1}, 8, 16),
        (MIXED, 8, {"gpus_per_actor": 1, "decode_labels": {"pool": "cpu"}}, 1, 16),
        (MIXED, 2, {"gpus_per_actor": 1, "decode_resources": {"decoder": 1}}, 2, 2),
        (MIXED, 2, {"gpus_per_actor": 1, "decode_resources": {"decoder": 0.1}, "decode_cpus": 0.5}, 2, 16),
        (ONE_MACHINE, 1, {"decode": "tasks"}, 1, 2),
        (MIXED, 8, {"gpus_per_actor": 1, "shards_in_flight": 3, "decode_threads": 5}, 5, 3),
        (MIXED, 8, {"gpus_per_actor": 1, "decode_cpus": 0}, 2, 16),
    ],
)
def test_as_many_tasks_for_each_actor_as_the_cpus_that_no_actor_holds_allow(
    nodes: list[Node], num_actors: int, values: dict[str, Any], threads: int, in_flight: int
) -> None:
    found = place(nodes, num_actors, **values)
    assert (found.threads, found.shards_in_flight, found.lack) == (threads, in_flight, "")
    assert found.tasks is not None
    assert found.tasks.cpus == values.get("decode_cpus", found.threads)


def test_cpus_of_actors_count_only_where_they_must_be_on_machines_that_decode() -> None:
    on_cpu_nodes = settings(decode_labels={"pool": "cpu"}, gpus_per_actor=1)
    assert spare_cpus(on_cpu_nodes, MIXED, 8) == 128
    assert spare_cpus(settings(decode="tasks", gpus_per_actor=1), MIXED, 8) == 152
    assert spare_cpus(settings(decode_labels={"pool": "cpu"}), MIXED, 40) == 128 - 8
    assert spare_cpus(settings(decode="tasks"), ONE_MACHINE, 5) == 0


@pytest.mark.parametrize(
    ("nodes", "num_actors", "values", "said"),
    [
        (ONE_MACHINE, 2, {"decode": "tasks"}, "takes 1 CPU, and the actors leave 0 CPU; lower ray.num_actors"),
        (
            MIXED,
            8,
            {"decode_labels": {"pool": "decode"}},
            "no node can hold a decode task of 1 CPU on a node with pool=",
        ),
        (MIXED, 8, {"decode_resources": {"disk": 2}}, "no node can hold a decode task of 1 CPU, 2 disk"),
        (ONE_MACHINE, 1, {"decode": "tasks", "decode_cpus": 3}, "no node can hold"),
        ([], 1, {"decode": "tasks"}, "no node can hold"),
    ],
)
def test_where_no_task_can_begin_it_is_said_and_a_cluster_that_cannot_grow_gets_threads(
    nodes: list[Node], num_actors: int, values: dict[str, Any], said: str
) -> None:
    growing, fixed = (place(nodes, num_actors, may_grow=may_grow, **values) for may_grow in (True, False))
    assert said in growing.lack and growing.lack == fixed.lack
    assert growing.tasks is not None and growing.shards_in_flight == 2
    assert fixed.tasks is None


@pytest.mark.parametrize(
    ("values", "actors"),
    [
        ({}, 8),
        ({"decode": "tasks"}, 4),
        ({"decode": "tasks", "decode_threads": 3}, 2),
        ({"decode": "tasks", "decode_cpus": 0}, 8),
        ({"decode": "tasks", "decode_cpus": 0, "cpus_per_actor": 0}, 1),
        ({"decode": "tasks", "decode_cpus": 9}, 1),
        ({"gpus_per_actor": 0.5}, 1),
    ],
)
def test_actors_leave_their_decode_tasks_as_many_cpus_as_these_take(values: dict[str, Any], actors: int) -> None:
    assert num_actors_on([Node({"CPU": 8})], settings(**values), 100) == actors
    assert num_actors_on([Node({"CPU": 3}), Node({"CPU": 5})], settings(**values), 100) == actors
    assert num_actors_on([Node({"CPU": 8})], settings(**values, num_actors=3), 1) == 3


@pytest.mark.parametrize("cpus", [1, 2, 8, 64])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"num_actors": 1},
        {"num_actors": 3, "shards_in_flight": 40},
        {"decode_cpus": 0},
        {"decode_cpus": 0.25},
        {"cpus_per_actor": 0},
        {"cpus_per_actor": 0, "num_actors": 1},
        {"gpus_per_actor": 1},
        {"gpus_per_actor": 1, "cpus_per_actor": 0, "decode_threads": 2},
    ],
)
def test_never_more_shards_are_in_flight_on_one_machine_than_its_object_store_is_made_for(
    values: dict[str, Any], cpus: int
) -> None:
    chosen = settings(decode="tasks", **values)
    nodes = [Node({"CPU": cpus, "GPU": min(2, cpus)})]
    for num_shards in (1, 5, 1000):
        num_actors = num_actors_on(nodes, chosen, num_shards)
        in_flight = decode_place(chosen, nodes, num_actors, may_grow=False).shards_in_flight
        assert num_actors * in_flight <= most_in_flight(chosen, cpus)


def test_what_was_chosen_is_said_in_a_line() -> None:
    assert str(place(ONE_MACHINE, 2)) == "1 decode threads in each actor, 2 shards in flight"
    labelled = place(MIXED, 8, gpus_per_actor=1, decode_labels={"pool": "cpu"}, decode_threads=4)
    assert str(labelled) == "decode tasks of 4 threads (4 CPU on a node with pool=cpu), 4 for each actor"


@pytest.mark.parametrize(
    ("wanted", "fulfilling"),
    [
        ("cpu", {"cpu"}),
        ("!cpu", {"gpu", "arm", None}),
        ("in(cpu, arm)", {"cpu", "arm"}),
        ("!in(cpu,arm)", {"gpu", None}),
    ],
)
def test_labels_are_understood_as_ray_does(wanted: str, fulfilling: set[str | None]) -> None:
    assert {label for label in ("cpu", "gpu", "arm", None) if fulfils(label, wanted)} == fulfilling


def test_a_node_is_read_from_rays_description() -> None:
    node = node_of({"Resources": {"CPU": 4.0, "GPU": 1.0}, "Labels": {"pool": "x"}, "Alive": True})
    assert (node.cpus, node.has_gpu, node.labels) == (4.0, True, {"pool": "x"})
    assert node_of({"Resources": {}}) == Node({})


@pytest.mark.parametrize(
    "values",
    [{"decode": "processes"}, {"decode_cpus": -1}, {"decode_resources": {"a": 0}}, {"decode_labels": {"a": 1}},
     {"decode_threads": 0}, {"shards_in_flight": 0}],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_ray_starts(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        settings(**values)
