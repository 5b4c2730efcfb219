"""Who gets which shard: poison is contained, the innocent are not charged, and every shard ends exactly once."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from jobs.dispatch import MAX_UNCHARGED, Dispatch, GivenUp, Work
from pipeline.plan import ShardTask
from pipeline.records import FailureReason, ObjectInfo

CRASHED, TIMED_OUT, TRUNCATED = (
    FailureReason.SHARD_CRASHED,
    FailureReason.SHARD_TIMED_OUT,
    FailureReason.SHARD_TRUNCATED,
)


def tasks(*names: str) -> list[ShardTask]:
    return [ShardTask(ObjectInfo(name, 1, "e"), f"{name}.parquet") for name in names]


def dispatch(names: str, attempts: int = 3, limit: int = 2) -> Dispatch:
    """One shard for each letter."""
    return Dispatch(tasks(*names), attempts=attempts, in_flight_limit=limit)


def name(work: Work | None) -> str | None:
    return None if work is None else work.task.shard.url


def take(pool: Dispatch, actor: str) -> str:
    """All that the actor can get now."""
    taken = ""
    while (work := pool.next_for(actor)) is not None:
        taken += work.task.shard.url
    return taken


def held(pool: Dispatch, actor: str, shard: str) -> Work:
    return next(work for work in pool.held_by(actor) if work.task.shard.url == shard)


def finish(pool: Dispatch, actor: str, *shards: str) -> None:
    for shard in shards:
        pool.done(actor, held(pool, actor, shard))


def lose(pool: Dispatch, actor: str, *culprits: str) -> list[GivenUp]:
    named = [held(pool, actor, shard) for shard in culprits]
    return pool.actor_lost(actor, TIMED_OUT if culprits else CRASHED, "gone", named)


def test_shards_go_out_in_order_and_never_more_than_the_limit_to_one_actor() -> None:
    pool = dispatch("abcdef", limit=2)
    assert (take(pool, "x"), take(pool, "y")) == ("ab", "cd")
    finish(pool, "x", "b")
    assert take(pool, "x") == "e"
    assert [w.task.shard.url for w in pool.held_by("x")] == ["a", "e"]
    finish(pool, "x", "a", "e")
    finish(pool, "y", "c", "d")
    assert take(pool, "y") == "f" and not pool.finished
    finish(pool, "y", "f")
    assert pool.finished and take(pool, "x") == ""


def test_nothing_to_do_is_finished_at_once() -> None:
    assert dispatch("").finished


def test_a_shard_that_raises_is_charged_and_tried_again_behind_the_others() -> None:
    pool = dispatch("abc", attempts=2, limit=1)
    take(pool, "x")
    assert pool.failed("x", held(pool, "x", "a"), TRUNCATED, "cut") is None
    assert take(pool, "x") == "b"
    finish(pool, "x", "b")
    assert take(pool, "x") == "c"
    finish(pool, "x", "c")
    assert take(pool, "x") == "a"
    given_up = pool.failed("x", held(pool, "x", "a"), TRUNCATED, "cut again")
    assert given_up is not None and name(given_up.work) == "a" and given_up.work.charged == 2
    assert (given_up.reason, given_up.message) == (TRUNCATED, "cut again")
    assert pool.finished


def test_the_shards_of_an_actor_that_died_become_suspects_and_run_alone() -> None:
    pool = dispatch("abcd")
    take(pool, "x")
    assert lose(pool, "x") == []
    assert take(pool, "x") == "a"  # suspects first, and one only
    assert take(pool, "y") == "b"
    assert take(pool, "z") == "cd"  # the others go on beside them
    finish(pool, "x", "a")
    finish(pool, "y", "b")
    finish(pool, "z", "c", "d")
    assert pool.finished


def test_a_poison_shard_is_given_up_after_its_attempts_and_its_neighbour_was_never_charged() -> None:
    pool = dispatch("pi", attempts=3)
    take(pool, "x")
    assert lose(pool, "x") == []  # who of the two it was, nobody knows: neither is charged
    assert take(pool, "x") == "p"
    assert lose(pool, "x") == []  # alone: it was this one
    assert take(pool, "x") == "i"
    assert held(pool, "x", "i").charged == 0
    finish(pool, "x", "i")
    for charged in (1, 2):
        assert take(pool, "x") == "p" and held(pool, "x", "p").charged == charged
        given_up = lose(pool, "x")
    assert [(name(one.work), one.work.charged, one.reason) for one in given_up] == [("p", 3, CRASHED)]
    assert pool.finished


def test_a_shard_that_was_alone_when_its_actor_died_is_charged_at_once() -> None:
    pool = dispatch("p", attempts=1)
    take(pool, "x")
    assert [name(one.work) for one in lose(pool, "x")] == ["p"]


def test_of_a_hung_actor_only_the_hung_shard_is_charged_and_suspected() -> None:
    pool = dispatch("hi", attempts=2)
    take(pool, "x")
    assert lose(pool, "x", "h") == []
    assert take(pool, "x") == "h" and held(pool, "x", "h").alone
    assert take(pool, "y") == "i" and not held(pool, "y", "i").alone
    assert held(pool, "y", "i").charged == 0 and held(pool, "x", "h").charged == 1
    finish(pool, "y", "i")
    assert [(name(one.work), one.reason) for one in lose(pool, "x", "h")] == [("h", TIMED_OUT)]
    assert pool.finished


def test_two_hung_shards_of_one_actor_are_both_charged() -> None:
    pool = dispatch("gh", attempts=1)
    take(pool, "x")
    assert [name(one.work) for one in lose(pool, "x", "g", "h")] == ["g", "h"]


def test_an_actor_that_cannot_be_reached_costs_its_shards_nothing() -> None:
    pool = dispatch("abcd")
    take(pool, "x")
    assert pool.actor_away("x") == [] and pool.held_by("x") == []
    works = [pool.next_for("y") for _ in range(2)]
    assert sorted(str(name(work)) for work in works) == ["a", "b"]  # at the front again
    assert all(work is not None and work.charged == 0 and not work.alone for work in works)


def test_a_shard_whose_actors_go_away_for_ever_is_given_up_in_the_end() -> None:
    pool, losses = dispatch("a", attempts=2), 0
    given_up: list[GivenUp] = []
    while not given_up:
        assert take(pool, "x") == "a"
        given_up = pool.actor_away("x")
        losses += 1
    assert losses == MAX_UNCHARGED + 2
    assert given_up[0].message == "its actors went away again and again"


def test_losing_an_actor_that_holds_nothing_is_nothing() -> None:
    pool = dispatch("a")
    assert lose(pool, "x") == [] == pool.actor_away("x")
    assert take(pool, "x") == "a"


def test_a_suspect_waits_for_an_actor_to_be_idle_and_one_actor_is_kept_free_for_it() -> None:
    pool = dispatch("abcdefgh")
    take(pool, "x")
    take(pool, "y")
    lose(pool, "x")  # a and b are suspects; nobody is idle but y
    finish(pool, "y", "c")
    assert take(pool, "y") == ""  # it drains, to take a suspect alone
    finish(pool, "y", "d")
    assert take(pool, "y") == "a" and take(pool, "y") == ""


def test_an_actor_that_drained_for_a_suspect_that_another_took_gets_work_again() -> None:
    pool = dispatch("abcdefgh")
    take(pool, "x")
    take(pool, "y")
    lose(pool, "x")
    finish(pool, "y", "c")
    assert take(pool, "y") == ""  # drains
    assert take(pool, "x") == "a" and take(pool, "z") == "b"  # others took all suspects
    assert take(pool, "y") == "e"
    finish(pool, "y", "d")
    assert take(pool, "y") == "f"


def test_only_one_actor_drains_at_a_time() -> None:
    pool = dispatch("abcdefghij")
    for actor in "xyz":
        take(pool, actor)
    lose(pool, "x")
    finish(pool, "y", "c")
    finish(pool, "z", "e")
    assert take(pool, "y") == "" and take(pool, "z") == "g"


def test_an_actor_that_is_lost_while_it_drains_holds_nobody_up() -> None:
    pool = dispatch("abcdef")
    take(pool, "x")
    take(pool, "y")
    lose(pool, "x")
    finish(pool, "y", "c")
    assert take(pool, "y") == ""
    pool.actor_away("y")  # d returns to the queue
    assert sorted(take(pool, "y") + take(pool, "z") + take(pool, "w")) == ["a", "b", "d", "e"]


def second(pool: Dispatch, actor: str, *late: Work) -> str | None:
    return name(pool.second_for(actor, late))


def held_twice(names: str = "a", attempts: int = 2, limit: int = 2) -> tuple[Dispatch, Work, Work]:
    """`x` holds all shards, `y` the first of them too."""
    pool = dispatch(names, attempts=attempts, limit=limit)
    take(pool, "x")
    first = held(pool, "x", names[0])
    assert second(pool, "y", first) == names[0]
    return pool, first, held(pool, "y", names[0])


def test_a_straggler_goes_to_a_second_actor_only_when_nothing_waits_and_that_one_is_idle() -> None:
    pool = dispatch("abcd", limit=1)
    take(pool, "x")
    take(pool, "y")
    straggler = held(pool, "x", "a")
    assert second(pool, "z", straggler) is None, "c and d wait"
    assert take(pool, "z") == "c" and take(pool, "w") == "d"
    assert second(pool, "z", straggler) is None, "z is busy"
    finish(pool, "z", "c")
    assert second(pool, "z", straggler) == "a"
    assert second(pool, "v", straggler) is None, "twice is enough"


def test_whoever_finishes_first_ends_the_shard_for_both() -> None:
    for winner, loser in ("xy", "yx"):
        pool, _, _ = held_twice()
        finish(pool, winner, "a")
        assert pool.finished and not pool.held_by(loser)


def test_of_two_holders_the_first_to_fail_is_not_charged_and_the_second_is() -> None:
    for first, last in ("xy", "yx"):
        pool, _, _ = held_twice(attempts=1)
        assert pool.failed(first, held(pool, first, "a"), TRUNCATED, "cut") is None
        assert not pool.finished and not pool.held_by(first)
        given_up = pool.failed(last, held(pool, last, "a"), TRUNCATED, "cut")
        assert given_up is not None and given_up.work.charged == 1
        assert pool.finished


def test_of_two_holders_the_first_to_die_or_hang_or_go_away_is_not_charged() -> None:
    for first, last in ("xy", "yx"):
        for lost in (lambda p, a: lose(p, a), lambda p, a: lose(p, a, "a"), lambda p, a: p.actor_away(a)):
            pool, _, _ = held_twice(attempts=1)
            assert lost(pool, first) == [] and not pool.finished
            assert [name(one.work) for one in lose(pool, last)] == ["a"]


def test_the_neighbour_of_a_shard_that_is_held_twice_is_a_suspect_when_their_actor_dies() -> None:
    pool, _, _ = held_twice("ab")
    assert lose(pool, "x") == []
    assert take(pool, "z") == "b" and held(pool, "z", "b").alone and held(pool, "z", "b").charged == 0
    finish(pool, "y", "a")
    finish(pool, "z", "b")
    assert pool.finished


def test_a_suspect_is_never_given_to_a_second_actor() -> None:
    pool = dispatch("ab")
    take(pool, "x")
    lose(pool, "x")
    take(pool, "x"), take(pool, "y")
    assert second(pool, "z", held(pool, "x", "a"), held(pool, "y", "b")) is None


def test_a_shard_that_was_given_out_twice_once_is_not_so_again() -> None:
    """Else one that kills its actor slowly would go round for ever, charged to nobody."""
    pool, _, _ = held_twice(attempts=3)
    lose(pool, "x")
    assert second(pool, "x", held(pool, "y", "a")) is None


def test_each_time_that_a_shard_is_handed_out_it_has_another_ticket() -> None:
    pool, first, other = held_twice(attempts=3)
    assert first.ticket != other.ticket
    assert pool.holds("x", first) and not pool.holds("y", first)
    pool.actor_away("y")
    pool.actor_away("x")
    assert take(pool, "x") == "a" and not pool.holds("x", first)


class World:
    """Actors that run shards under a Dispatch, each event drawn by chance; keeps its own books to compare."""

    def __init__(self, seed: int, *, accidents: bool) -> None:
        self.rng = rng = random.Random(seed)
        self.names = [f"s{n}" for n in range(rng.randint(0, 25))]
        self.limit, self.attempts = rng.randint(1, 4), rng.randint(1, 4)
        self.actors = [f"a{n}" for n in range(rng.randint(1, 4))]
        self.nature = {n: rng.choice(["good"] * 6 + ["poison", "hangs", "raises"]) for n in self.names}
        self.accidents = accidents
        self.pool = Dispatch(tasks(*self.names), attempts=self.attempts, in_flight_limit=self.limit)
        self.done: list[str] = []
        self.twice: set[str] = set()
        self.given_up: dict[str, GivenUp] = {}

    def run(self) -> None:
        for _ in range(20_000):
            if self.pool.finished:
                return
            actor = self.rng.choice(self.actors)
            if self.rng.random() < 0.5:
                self._give(actor)
            elif self.accidents and self.rng.random() < 0.1:
                self._ended(self.pool.actor_away(actor) if self.rng.random() < 0.5 else lose(self.pool, actor))
            elif works := self.pool.held_by(actor):
                self._happen(actor, self.rng.choice(works))
            self._check()
        raise AssertionError("never finished")

    def _give(self, actor: str) -> None:
        if self.pool.next_for(actor) is None and self.rng.random() < 0.3:
            works = [work for other in self.actors for work in self.pool.held_by(other)]
            twice = self.pool.second_for(actor, self.rng.sample(works, len(works)))
            if twice is not None:
                assert twice.task.part not in self.twice, "given out twice two times"
                self.twice.add(twice.task.part)

    def _happen(self, actor: str, work: Work) -> None:
        nature = self.nature[work.task.shard.url]
        if nature == "good":
            self.pool.done(actor, work)
            self.done.append(work.task.shard.url)
        elif nature == "raises":
            self._ended([self.pool.failed(actor, work, TRUNCATED, "cut")])
        else:
            self._ended(lose(self.pool, actor, *([work.task.shard.url] if nature == "hangs" else [])))

    def _ended(self, given_up: list[GivenUp] | list[GivenUp | None]) -> None:
        for one in given_up:
            if one is not None:
                assert one.work.task.shard.url not in self.given_up
                self.given_up[one.work.task.shard.url] = one

    def _check(self) -> None:
        holders = Counter(w.task.shard.url for actor in self.actors for w in self.pool.held_by(actor))
        assert all(count <= 1 + (f"{shard}.parquet" in self.twice) for shard, count in holders.items()), "two holders"
        assert not set(holders) & {*self.done, *self.given_up}, "held after its end"
        for actor in self.actors:
            works = self.pool.held_by(actor)
            assert len(works) <= self.limit
            assert len(works) <= 1 or not any(work.alone for work in works), "a suspect has company"


@pytest.mark.parametrize("seed", range(60))
def test_on_a_random_walk_every_shard_ends_exactly_once(seed: int) -> None:
    world = World(seed, accidents=True)
    world.run()
    assert Counter([*world.done, *world.given_up]) == Counter(world.names)
    assert all(one.work.charged >= world.attempts for one in world.given_up.values())


@pytest.mark.parametrize("seed", range(60))
def test_without_accidents_just_the_bad_shards_are_given_up_each_after_its_attempts(seed: int) -> None:
    world = World(seed, accidents=False)
    world.run()
    bad = {shard for shard, nature in world.nature.items() if nature != "good"}
    if bad and sum(nature == "poison" for nature in world.nature.values()) < MAX_UNCHARGED / world.attempts:
        assert set(world.given_up) == bad
        assert {one.work.charged for one in world.given_up.values()} == {world.attempts}
    assert Counter([*world.done, *world.given_up]) == Counter(world.names)


@pytest.mark.parametrize("seed", range(20))
def test_as_long_as_there_is_work_an_idle_pool_is_given_some(seed: int) -> None:
    """No state in which every actor waits for another."""
    world = World(seed, accidents=True)
    for _ in range(3000):
        if world.pool.finished:
            break
        if not any(world.pool.held_by(actor) for actor in world.actors):
            assert any([world.pool.next_for(actor) is not None for actor in world.actors])
        actor = world.rng.choice(world.actors)
        if works := world.pool.held_by(actor):
            world._happen(actor, world.rng.choice(works))
        world._give(world.rng.choice(world.actors))
