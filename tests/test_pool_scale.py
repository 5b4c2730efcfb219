"""The pool at scale, in simulated time: it grows with its cluster, and a shard costs the same however many actors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jobs.actors import ActorPool
from jobs.dispatch import Dispatch, Work
from jobs.tokenize_config import RaySettings
from pipeline.plan import ShardTask
from pipeline.records import ObjectInfo, ShardResult
from simulated_actors import Actor, Call, SimulatedActors, settings


def tasks(number: int) -> list[ShardTask]:
    return [ShardTask(ObjectInfo(f"s{n}", 1 << 20, "e"), f"s{n}.parquet") for n in range(number)]


def run(actors: SimulatedActors, number: int, num_actors: int = 1, *, elastic: bool = True, limit: int = 2) -> None:
    dispatch = Dispatch(tasks(number), attempts=1, in_flight_limit=limit)
    with ActorPool(actors, replace(settings(num_actors, limit), elastic=elastic), actors.now) as pool:
        outcomes = list(pool.run(dispatch))
    assert Counter(one.shard for one in outcomes if isinstance(one, ShardResult)) == {f"s{n}": 1 for n in range(number)}
    assert not actors.living()


def room_from(when: float, room: int) -> tuple[float, Callable[[SimulatedActors], None]]:
    def happen(world: SimulatedActors) -> None:
        world.room = room

    return when, happen


def test_a_cluster_that_grows_in_mid_run_gets_more_actors() -> None:
    actors = SimulatedActors(seconds=lambda task, attempt: 4.0)
    actors.accidents = [room_from(20.0, 3), room_from(60.0, 5)]
    run(actors, 200)
    assert len(actors.actors) == 5
    assert len({actor for when, _, actor in actors.given if when < 22}) == 1
    assert len({actor for when, _, actor in actors.given if 40 < when < 60}) == 3
    assert actors.time < 120  # 400 with one actor


def test_the_pool_never_grows_beyond_the_shards_that_wait() -> None:
    actors = SimulatedActors(seconds=lambda task, attempt: 30.0)
    actors.accidents = [room_from(5.0, 1000)]
    run(actors, 7, limit=2)
    assert len(actors.actors) == 1 + 5


def test_a_number_of_actors_that_was_configured_stays() -> None:
    actors = SimulatedActors(seconds=lambda task, attempt: 4.0)
    actors.accidents = [room_from(5.0, 9)]
    run(actors, 30, elastic=False)
    assert len(actors.actors) == 1


def test_a_cluster_that_shrank_gets_no_actor_in_place_of_one_that_is_pending() -> None:
    """Its place stays, and takes an actor when there is room again."""
    actors = SimulatedActors(seconds=lambda task, attempt: 4.0)
    actors.accidents = [room_from(5.0, 2), room_from(30.0, 1), room_from(60.0, 2)]
    run(actors, 60)
    assert len(actors.actors) == 2


def each(when: float, number: int) -> tuple[float, Callable[[SimulatedActors], None]]:
    """So many shards for each actor befit the cluster from then on."""
    return when, lambda world: setattr(world, "each", number)


def most_open(actors: SimulatedActors, begin: float, end: float) -> int:
    """At once, each for four seconds."""
    times = [when for when, _, _ in actors.given]
    return max(sum(when - 4 < other <= when for other in times) for when in times if begin < when < end)


def run_following(actors: SimulatedActors, number: int, num_actors: int = 1, *, elastic: bool = False) -> None:
    chosen = replace(settings(num_actors), elastic=elastic, follows=RaySettings())
    with ActorPool(actors, chosen, actors.now) as pool:
        assert len(list(pool.run(Dispatch(tasks(number), attempts=1, in_flight_limit=2)))) == number


def test_machines_that_decode_come_and_each_actor_has_more_shards_in_flight_and_what_one_took_along_is_asked_for() -> (
    None
):
    actors = SimulatedActors(seconds=lambda task, attempt: 4.0)
    actors.accidents = [each(20.0, 6), each(60.0, 3)]
    run_following(actors, 150)
    assert [most_open(actors, *span) for span in ((8, 20), (35, 60), (75, 90))] == [2, 6, 6]


def test_actors_that_come_share_what_can_be_decoded_and_ask_for_no_more() -> None:
    """Twelve at once, for one actor or for four; then a place for half of them goes."""
    actors = SimulatedActors(seconds=lambda task, attempt: 4.0)
    actors.accidents = [each(5.0, 12), room_from(30.0, 4), each(30.0, 3), each(60.0, 1)]
    run_following(actors, 300, elastic=True)
    assert len(actors.actors) == 4
    assert [most_open(actors, *span) for span in ((20, 30), (50, 60), (75, 90))] == [12, 12, 12]


class Pending(SimulatedActors):
    """Of its actors only the first ever starts."""

    def load(self, actor: Actor) -> Call:
        return super().load(actor) if actor is self.actors[0] else self._call(actor, 1e9, None)  # type: ignore[arg-type]


def test_an_actor_that_is_never_placed_holds_up_neither_the_run_nor_its_end() -> None:
    actors = Pending()
    actors.accidents = [room_from(5.0, 3)]
    run(actors, 30)
    assert len(actors.actors) == 3 and actors.time < 25
    run(pending := Pending(), 8, num_actors=4)
    assert pending.time < 10


class Counting(Dispatch):
    """Counts what is asked of it."""

    def __init__(self, number: int, limit: int = 2) -> None:
        super().__init__(tasks(number), attempts=1, in_flight_limit=limit)
        self.asked: Counter[str] = Counter()

    def next_for(self, actor: str) -> Work | None:
        self.asked["next_for"] += 1
        return super().next_for(actor)

    def has_room(self, actor: str) -> bool:
        self.asked["has_room"] += 1
        return super().has_room(actor)

    def holds(self, actor: str, work: Work) -> bool:
        self.asked["holds"] += 1
        return super().holds(actor, work)


class OneByOne(SimulatedActors):
    """One answer at a time, as when shards end evenly; no two at the same moment."""

    def wait(self, calls: Any, timeout_s: float) -> list[Call]:
        first = min(calls, key=lambda call: call.ends, default=None)
        if first is None or first.ends > self.time + timeout_s:
            return super().wait(calls, timeout_s)
        self.time = max(self.time, first.ends)
        if first in first.actor.calls:
            first.effect()
            first.actor.calls.remove(first)
        return [first]


def test_what_is_asked_for_a_shard_does_not_grow_with_the_number_of_actors() -> None:
    def asked(num_actors: int, number: int) -> float:
        actors = OneByOne(seconds=lambda task, attempt: 1 + int(task.shard.url[1:]) % 97 / 97)
        dispatch = Counting(number)
        with ActorPool(actors, settings(num_actors), actors.now) as pool:
            assert len(list(pool.run(dispatch))) == number
        return dispatch.asked.total() / number

    assert asked(100, 2000) < 1.5 * asked(5, 2000)


def test_as_many_shards_as_actors_are_spread_over_all_of_them() -> None:
    actors = SimulatedActors()
    with ActorPool(actors, settings(8), actors.now) as pool:
        assert len(list(pool.run(Dispatch(tasks(8), attempts=1, in_flight_limit=4)))) == 8
    assert len({actor for _, _, actor in actors.given}) == 8
