"""The pool in simulated time: deaths, hangs, stragglers, cut-off actors and nodes that go; every shard ends once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from jobs.actors import _REASONS, ActorPool
from jobs.cluster import ClusterError, HeadGone
from jobs.decode_place import DecodeTasks
from jobs.dispatch import Dispatch, GivenUp
from jobs.pace import LEAST_DEADLINE_S
from jobs.waiting import RAY_ENDS_AFTER_S
from pipeline.errors import PublishFailed, RunHeld, ShardError
from pipeline.plan import ShardTask
from pipeline.records import ObjectInfo, ShardResult
from simulated_actors import SimulatedActors, settings

Outcomes = dict[str, ShardResult | GivenUp]
MB = 1 << 20


def tasks(names: str | list[str]) -> list[ShardTask]:
    return [ShardTask(ObjectInfo(name, MB, "e"), f"{name}.parquet") for name in names]


def run(
    actors: SimulatedActors,
    names: str | list[str],
    num_actors: int = 2,
    in_flight: int = 2,
    attempts: int = 3,
    deadline_s: float | None = None,
) -> Outcomes:
    """What became of each shard; none may be reported twice."""
    outcomes: Outcomes = {}
    dispatch = Dispatch(tasks(names), attempts=attempts, in_flight_limit=in_flight)
    with ActorPool(actors, settings(num_actors, in_flight, deadline_s), actors.now) as pool:
        for outcome in pool.run(dispatch):
            url = outcome.shard if isinstance(outcome, ShardResult) else outcome.work.task.shard.url
            assert url not in outcomes, f"{url} was reported twice"
            outcomes[url] = outcome
    assert set(outcomes) == set(names)
    assert not actors.living(), "an actor outlived the pool"
    return outcomes


def quarantined(outcomes: Outcomes) -> dict[str, tuple[str, int]]:
    return {
        url: (outcome.reason.value, outcome.work.charged)
        for url, outcome in outcomes.items()
        if isinstance(outcome, GivenUp)
    }


def attempts_of(outcomes: Outcomes) -> dict[str, int]:
    return {url: outcome.attempts for url, outcome in outcomes.items() if isinstance(outcome, ShardResult)}


def slow_at_first(shard: str, seconds: float) -> Callable[[ShardTask, int], float]:
    """One shard that takes so long in its first attempt; all others take one second."""
    return lambda task, attempt: seconds if (task.shard.url, attempt) == (shard, 0) else 1.0


def test_a_straggler_at_the_end_is_tried_by_an_idle_actor_and_the_first_to_finish_wins() -> None:
    actors = SimulatedActors(seconds=slow_at_first("f", 60.0))
    outcomes = run(actors, "abcdef")
    assert attempts_of(outcomes) == dict.fromkeys("abcdef", 1)
    assert Counter(shard for _, shard, _ in actors.given) == {**dict.fromkeys("abcde", 1), "f": 2}
    assert len({actor for _, shard, actor in actors.given if shard == "f"}) == 2
    assert actors.time < 15  # 60 without


def test_an_output_that_cannot_be_written_stops_the_run_and_no_shard_is_quarantined_for_it() -> None:
    actors = SimulatedActors(nature=lambda task: "cannot publish" if task.shard.url == "b" else "good")
    with pytest.raises(PublishFailed, match="no space is left"):
        run(actors, "abc", attempts=2)
    assert [shard for _, shard, _ in actors.given].count("b") == 2  # it may have passed
    assert not actors.living()


def test_who_waits_in_vain_for_an_actor_is_told_what_the_last_one_was_lost_to() -> None:
    actors = SimulatedActors()
    actors.accidents.append((1.0, lambda them: [them.die(actor, "no such checkpoint") for actor in them.living()]))
    actors.load = lambda actor: actors._call(actor, 1e9, None)  # type: ignore[method-assign, assignment, arg-type]
    with pytest.raises(ClusterError, match=r"add nodes.*the last actor: no such checkpoint"):
        run(actors, "a", num_actors=1)


def headless(seconds: float) -> Callable[[SimulatedActors], None]:
    def happen(world: SimulatedActors) -> None:
        world.headless_until = world.time + seconds

    return happen


def test_a_head_that_is_gone_for_good_ends_the_run_in_time_and_says_how_to_go_on() -> None:
    actors = SimulatedActors(seconds=lambda task, attempt: 1e6)
    actors.accidents = [
        (20.0, headless(1e9)),
        (21.0, lambda them: [them.die(actor, "gone") for actor in them.living()]),
    ]
    with pytest.raises(HeadGone, match=r"head has not answered for 3\d s; .*same command goes on"):
        run(actors, "abc")
    assert actors.time < 20 + RAY_ENDS_AFTER_S - 10


def test_a_head_that_was_away_for_a_moment_is_no_reason_to_stop() -> None:
    actors = SimulatedActors(seconds=lambda task, attempt: 15.0)
    actors.accidents = [(10.0, headless(20.0)), (50.0, headless(20.0))]
    assert attempts_of(run(actors, "abcdefgh")) == dict.fromkeys("abcdefgh", 1)


def test_one_lost_answer_after_a_driver_was_held_up_is_no_reason_to_stop() -> None:
    actors = SimulatedActors(seconds=lambda task, attempt: 15.0)

    def held_up_once() -> None:
        if 20 < actors.time < 45:
            actors.time += 45
            actors.headless_until = actors.time + 3

    with ActorPool(actors, settings(2), actors.now) as pool:
        done = list(pool.run(Dispatch(tasks("abcdefgh"), attempts=1, in_flight_limit=2), held_up_once))
    assert len(done) == 8 and actors.headless_until > 65


def test_actors_are_given_work_while_the_head_is_silent() -> None:
    """A shard a second, for the 20 seconds in which nothing is heard of it."""
    actors = SimulatedActors()
    actors.accidents = [(10.0, headless(20.0))]
    run(actors, [f"s{n}" for n in range(60)], num_actors=1, in_flight=1)
    assert sum(10 <= when < 30 for when, _, _ in actors.given) >= 10


def test_a_straggler_is_left_alone_as_long_as_there_is_other_work() -> None:
    actors = SimulatedActors(seconds=slow_at_first("a", 60.0))
    run(actors, [*"abcdefgh", *(f"more-{n}" for n in range(30))], num_actors=2, in_flight=1)
    second = [when for when, shard, _ in actors.given if shard == "a"][1]
    assert second >= max(when for when, shard, _ in actors.given if shard.startswith("more"))


def test_a_shard_is_not_late_in_comparison_with_nothing_nor_when_it_is_just_large() -> None:
    actors = SimulatedActors(seconds=lambda task, attempt: 100.0)
    run(actors, "a")
    assert len(actors.given) == 1
    actors = SimulatedActors(seconds=lambda task, attempt: task.shard.size_bytes / MB)
    big = [*tasks("abcdef"), ShardTask(ObjectInfo("big", 40 * MB, "e"), "big.parquet")]
    with ActorPool(actors, settings(2), actors.now) as pool:
        assert len(list(pool.run(Dispatch(big, attempts=3, in_flight_limit=2)))) == 7
    assert len(actors.given) == 7


def test_a_straggler_whose_second_try_dies_is_finished_by_the_first() -> None:
    def second_dies(world: SimulatedActors) -> None:
        second = [actor for _, shard, actor in world.given if shard == "f"][1]
        world.die(next(actor for actor in world.actors if actor.name == second), "segfault")

    actors = SimulatedActors(seconds=lambda task, attempt: 30.0 if task.shard.url == "f" else 1.0)
    actors.accidents = [(20.0, second_dies)]
    outcomes = run(actors, "abcdef")
    assert attempts_of(outcomes)["f"] == 1
    assert sum(shard == "f" for _, shard, _ in actors.given) == 2  # no third one


def test_a_straggler_whose_first_actor_dies_is_finished_by_the_second_and_not_charged() -> None:
    def first_dies(world: SimulatedActors) -> None:
        first = next(actor for _, shard, actor in world.given if shard == "f")
        world.die(next(actor for actor in world.actors if actor.name == first), "segfault")

    actors = SimulatedActors(seconds=lambda task, attempt: 30.0 if task.shard.url == "f" else 1.0)
    actors.accidents = [(20.0, first_dies)]
    outcomes = run(actors, "abcdef")
    assert attempts_of(outcomes)["f"] == 1
    assert sum(shard == "f" for _, shard, _ in actors.given) == 2


@pytest.mark.parametrize("nature", ["raises", "poison", "breaks"])
def test_a_slow_shard_that_fails_everywhere_is_quarantined_after_its_attempts_all_the_same(nature: str) -> None:
    actors = SimulatedActors(
        nature=lambda task: nature if task.shard.url == "f" else "good",
        seconds=lambda task, attempt: 30.0 if task.shard.url == "f" else 1.0,
    )
    outcomes = run(actors, "abcdef")
    assert quarantined(outcomes) == {"f": ("shard_truncated" if nature == "raises" else "shard_crashed", 3)}
    assert sum(shard == "f" for _, shard, _ in actors.given) == 4


@pytest.mark.parametrize(("in_tasks", "attempts"), [(True, 1), (False, 2)])
def test_the_wait_for_a_decode_task_is_not_charged_to_the_shard(in_tasks: bool, attempts: int) -> None:
    actors = SimulatedActors(seconds=slow_at_first("f", LEAST_DEADLINE_S + 250.0))
    decode = DecodeTasks(cpus=1, resources={}, labels={}, wait_s=300) if in_tasks else None
    dispatch = Dispatch(tasks("abcdef"), attempts=3, in_flight_limit=2)
    with ActorPool(actors, replace(settings(1), decode=decode), actors.now) as pool:
        done = {one.shard: one.attempts for one in pool.run(dispatch) if isinstance(one, ShardResult)}
    assert done == {**dict.fromkeys("abcde", 1), "f": attempts}


def test_an_actor_that_hangs_on_what_another_has_finished_gets_nothing_more() -> None:
    """It hangs in `f`, a second actor finishes `f`, and `g` fails again and again before and after that."""
    failures = iter(range(5))

    def nature(task: ShardTask) -> str:
        return "raises" if task.shard.url == "g" and next(failures, None) is not None else "good"

    actors = SimulatedActors(nature, slow_at_first("f", 10_000.0))
    assert attempts_of(run(actors, "abcfdeg", num_actors=3, in_flight=1, attempts=9))["g"] == 6
    tries = [when for when, shard, _ in actors.given if shard == "f"]
    assert [when for when, shard, _ in actors.given if shard == "g" and when > tries[1]]
    hanging = next(actor for _, shard, actor in actors.given if shard == "f")
    assert [shard for _, shard, actor in actors.given if actor == hanging][-1] == "f"
    assert actors.time < 60


def test_hung_shards_are_charged_and_their_neighbours_are_not() -> None:
    actors = SimulatedActors(nature=lambda task: "hangs" if task.shard.url == "c" else "good")
    outcomes = run(actors, "abcdef", deadline_s=20.0)
    assert quarantined(outcomes) == {"c": ("shard_timed_out", 3)}
    assert attempts_of(outcomes) == dict.fromkeys("abdef", 1)


def test_without_a_deadline_in_the_configuration_one_is_derived_from_what_was_seen() -> None:
    actors = SimulatedActors(nature=lambda task: "hangs" if task.shard.url == "c" else "good")
    outcomes = run(actors, "abcdef", attempts=1)
    assert quarantined(outcomes) == {"c": ("shard_timed_out", 1)}
    assert 300 < actors.time < 400


def test_an_actor_that_cannot_be_reached_is_used_again_and_nothing_is_counted_twice() -> None:
    actors = SimulatedActors(seconds=lambda task, attempt: 4.0)
    actors.accidents = [(4.0, lambda world: world.cut_off(world.actors[0], 30.0))]
    outcomes = run(actors, [f"s{n}" for n in range(60)], num_actors=2)
    assert set(attempts_of(outcomes).values()) == {1}
    assert not actors.killed[:-2], "it was idle again, so there was no reason to replace it"
    assert max(when for when, _, actor in actors.given if actor == "process-0") > 34


def test_an_actor_that_answers_again_but_is_busy_with_what_went_to_others_is_replaced() -> None:
    actors = SimulatedActors(seconds=lambda task, attempt: 20.0)
    actors.accidents = [(4.0, lambda world: world.cut_off(world.actors[0], 2.0))]
    outcomes = run(actors, [f"s{n}" for n in range(12)], num_actors=2)
    assert set(attempts_of(outcomes).values()) == {1}
    assert actors.killed[0] == "process-0"
    assert actors.most_open <= 2


def test_an_actor_that_was_cut_off_while_it_loaded_is_not_given_work_before_it_has_loaded() -> None:
    actors = SimulatedActors()
    actors.accidents = [(1.0, lambda world: world.cut_off(world.actors[0], 0.1))]
    assert set(attempts_of(run(actors, "abcd", num_actors=1)).values()) == {1}
    assert {actor for _, _, actor in actors.given} == {"process-1"}


def test_an_actor_on_a_node_that_is_about_to_go_finishes_what_it_holds_and_starts_elsewhere() -> None:
    actors = SimulatedActors(seconds=lambda task, attempt: 4.0 + int(task.shard.url[1:]) % 3)
    actors.accidents = [(4.0, lambda world: world.draining.add("n0"))]
    outcomes = run(actors, [f"s{n}" for n in range(20)], num_actors=2)
    assert attempts_of(outcomes) == dict.fromkeys([f"s{n}" for n in range(20)], 1)
    assert len(actors.given) == 20, "something was done twice"
    assert max(when for when, _, actor in actors.given if actor == "process-0") < 6.5
    assert {actor for when, _, actor in actors.given if when > 15} == {"process-1", "process-2"}


def test_what_a_node_takes_along_is_not_charged_even_when_it_was_alone() -> None:
    actors = SimulatedActors(seconds=lambda task, attempt: 5.0)
    gone: list[str] = []

    def node_dies(world: SimulatedActors) -> None:
        gone.append("once")
        for actor in world.living():
            world.die(actor, "its node has died", with_node=True)

    actors.accidents = [(when, node_dies) for when in (4.0, 12.0, 20.0, 28.0)]
    outcomes = run(actors, "a", num_actors=1, attempts=1)
    assert attempts_of(outcomes) == {"a": 1} and len(gone) == 4


def test_two_poison_shards_in_one_actor_are_both_quarantined_and_nobody_else_is_charged() -> None:
    actors = SimulatedActors(nature=lambda task: "poison" if task.shard.url in "ab" else "good")
    outcomes = run(actors, "abcdef", num_actors=1)
    assert quarantined(outcomes) == {"a": ("shard_crashed", 3), "b": ("shard_crashed", 3)}
    assert set(attempts_of(outcomes).values()) == {1}


def test_a_poison_shard_in_the_last_place_is_quarantined() -> None:
    actors = SimulatedActors(nature=lambda task: "poison" if task.shard.url == "f" else "good")
    assert quarantined(run(actors, "abcdef")) == {"f": ("shard_crashed", 3)}


def test_a_driver_that_may_go_on_no_more_hands_nothing_out_and_its_actors_are_stopped() -> None:
    """It is asked all the time, not only when a shard is done."""
    actors = SimulatedActors(seconds=lambda task, attempt: 100.0)

    def check() -> None:
        if actors.time > 20:
            raise RunHeld("another driver has it")

    with pytest.raises(RunHeld), ActorPool(actors, settings(2), actors.now) as pool:
        list(pool.run(Dispatch(tasks("abcdef"), attempts=3, in_flight_limit=2), check))
    assert actors.time < 30 and not actors.living()


def test_all_actors_dead_at_once_cost_nothing_but_time() -> None:
    def all_die(world: SimulatedActors) -> None:
        for actor in world.living():
            world.die(actor, "killed by somebody")

    actors = SimulatedActors(seconds=lambda task, attempt: 4.0)
    actors.accidents = [(5.0, all_die)]
    outcomes = run(actors, [f"s{n}" for n in range(12)], num_actors=3)
    assert set(attempts_of(outcomes).values()) == {1}


def test_a_pool_whose_only_actor_can_never_be_reached_says_so_after_the_stated_wait() -> None:
    actors = SimulatedActors()
    actors.accidents = [(3.5, lambda world: world.cut_off(world.actors[0], 1e9))]
    with pytest.raises(ClusterError, match=r"no actor could start within 300 s .* the cluster has 8 CPUs"):
        run(actors, "abcdefgh", num_actors=1)
    assert 300 < actors.time < 310


def test_an_actor_that_dies_while_it_has_nothing_to_do_costs_the_next_shard_nothing() -> None:
    failures = iter(range(1))
    actors = SimulatedActors(
        nature=lambda task: "raises" if task.shard.url == "b" and next(failures, None) is not None else "good",
        seconds=lambda task, attempt: {"a": 10.0, "b": 20.0}[task.shard.url],
    )
    actors.accidents = [(15.0, lambda world: world.die(world.actors[0], "killed for memory"))]
    assert attempts_of(run(actors, "ab", in_flight=1, attempts=2)) == {"a": 1, "b": 2}


def test_what_an_actor_has_begun_since_is_not_charged_when_it_is_stopped_for_a_hang_that_nobody_waits_for() -> None:
    def seconds(task: ShardTask, attempt: int) -> float:
        return {"f": 10_000.0 if attempt == 0 else 1.0, "b": 3.0, "x": 15.0}.get(task.shard.url, 4.0)

    actors = SimulatedActors(seconds=seconds)
    assert attempts_of(run(actors, "fabcdegx", attempts=1, deadline_s=20.0))["x"] == 1
    assert len({actor for _, shard, actor in actors.given if shard == "x"}) == 2, "its first actor was stopped"


def test_a_slot_that_had_an_actor_once_is_not_given_up_when_its_next_ones_die_at_the_start() -> None:
    actors = SimulatedActors()
    for when in (3.5, 4.0, 6.0, 10.0):
        actors.accidents.append((when, lambda world: [world.die(one, "killed") for one in world.living()]))
    assert attempts_of(run(actors, "abcdef", num_actors=1))["f"] == 1
    assert len(actors.actors) == 5


NATURES = ["good"] * 12 + ["raises", "poison", "breaks", "hangs"]


def random_world(seed: int, *, accidents: bool) -> tuple[SimulatedActors, dict[str, str]]:
    rng = random.Random(seed)
    natures = {f"s{n}": rng.choice(NATURES) for n in range(rng.randint(1, 25))}
    pace = {shard: rng.choice([0.5, 1.0, 2.0, 2.0, 5.0]) for shard in natures}

    def seconds(task: ShardTask, attempt: int) -> float:
        return pace[task.shard.url] * rng.choice([1.0, 1.0, 1.0, 1.0, 4.0])

    actors = SimulatedActors(lambda task: natures[task.shard.url], seconds, seed)
    if accidents:
        actors.accidents = [(when, accident(rng)) for when in sorted(rng.uniform(0, 120) for _ in range(8))]
    return actors, natures


def accident(rng: random.Random) -> Callable[[SimulatedActors], None]:
    kind, pick, seconds = rng.choice(["dies", "goes away", "node dies", "drains"]), rng.random(), rng.uniform(0.1, 40)

    def happen(world: SimulatedActors) -> None:
        living = world.living()
        if not living:
            return
        actor = living[int(pick * len(living))]
        if kind == "dies":
            world.die(actor, "killed by somebody")
        elif kind == "goes away":
            world.cut_off(actor, seconds)
        elif kind == "drains" and len(world.draining) < 2:
            world.draining.add(actor.node)
        else:
            for other in [other for other in living if other.node == actor.node]:
                world.die(other, "its node has died", with_node=True)

    return happen


@pytest.mark.parametrize("seeds", [range(n, n + 25) for n in range(0, 100, 25)], ids=str)
def test_whatever_befalls_the_actors_every_shard_ends_once_and_good_ones_are_done(seeds: range) -> None:
    for seed in seeds:
        actors, natures = random_world(seed, accidents=True)
        shape = random.Random(seed)
        num_actors, in_flight = shape.randint(1, 4), shape.randint(1, 3)
        outcomes = run(actors, list(natures), num_actors, in_flight, attempts=12, deadline_s=30.0)
        lost = set(quarantined(outcomes))
        assert lost == {shard for shard, nature in natures.items() if nature != "good"}, f"seed {seed}"
        assert actors.most_open <= in_flight, f"seed {seed}"


@pytest.mark.parametrize("seeds", [range(n, n + 25) for n in range(0, 100, 25)], ids=str)
def test_without_accidents_a_good_shard_is_never_charged_and_a_bad_one_is_after_its_attempts(seeds: range) -> None:
    for seed in seeds:
        actors, natures = random_world(seed, accidents=False)
        shape = random.Random(seed)
        num_actors, in_flight = shape.randint(1, 4), shape.randint(1, 3)
        outcomes = run(actors, list(natures), num_actors, in_flight, attempts=2, deadline_s=30.0)
        assert {shard: charged for shard, (_, charged) in quarantined(outcomes).items()} == {
            shard: 2 for shard, nature in natures.items() if nature != "good"
        }, f"seed {seed}"
        assert set(attempts_of(outcomes).values()) <= {1}, f"seed {seed}"


def test_every_way_in_which_a_shard_fails_has_its_reason() -> None:
    assert {kind.reason for kind in ShardError.__subclasses__()} == set(_REASONS)
