"""The one place where tokenising meets Ray's handles and errors: calls go in, plain outcomes come out."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from jobs.cluster import cluster_resources, describe_resources, draining_nodes, in_few_words
from jobs.decode_place import fitting_actors
from jobs.decode_tasks import RETRIES
from jobs.pool_settings import PoolSettings, shards_in_flight
from jobs.tokenize_actor import SignOfLife, Source, TokenizeActor, Tokenized
from pipeline.plan import ShardTask
from pipeline.records import ShardResult
from pipeline.stage_times import StageTimes
from pipeline.tokenize_shard import TokenizeJob

WATCH_S = 30.0
# To look at all calls takes a microsecond for each. Thousands are open where actors have more than one shard anyway, so
# that none is idle for the pause; of a few calls, none is kept waiting.
MANY_CALLS = 500
PAUSE_A_CALL_S = 1e-5


@dataclass(frozen=True)
class Answer:
    value: ShardResult | SignOfLife
    times: StageTimes = field(default_factory=StageTimes)  # that the actor spent since its last answer
    note: str = ""  # for the driver's log
    failed_images: Mapping[str, int] = field(default_factory=dict, hash=False)  # of the shard, by reason


@dataclass(frozen=True)
class Raised:
    """The call raised in the actor, which lives."""

    error: Exception


@dataclass(frozen=True)
class Unreachable:
    """The actor may live and the call may go on, but nobody knows."""

    message: str


@dataclass(frozen=True)
class Died:
    """`with_node`: and all its node, so that no shard is to blame."""

    message: str
    with_node: bool = False


Outcome = Answer | Raised | Unreachable | Died


class RayActors:
    """Makes, calls, hears and kills actors. An actor and a call are handles that only this class looks into."""

    def __init__(self, source: Source, job: TokenizeJob, settings: PoolSettings) -> None:
        self._arguments, self._settings = (source, job, settings.decode), settings
        # Of tasks that an actor starts. By itself Ray tries one that was killed for memory for ever.
        oom_retries = {"env_vars": {"RAY_task_oom_retries": str(RETRIES)}}
        self._class = ray.remote(
            runtime_env=oom_retries if settings.decode else None,
            num_gpus=settings.gpus_per_actor,
            num_cpus=settings.cpus_per_actor,
            max_concurrency=settings.most_in_flight + 2,  # a watch and a ping beside the shards
        )(TokenizeActor)

    def start(self) -> Any:
        return self._class.remote(*self._arguments)

    def load(self, actor: Any) -> Any:
        return actor.load.remote()

    def ping(self, actor: Any) -> Any:
        return actor.ping.remote()

    def watch(self, actor: Any) -> Any:
        return actor.watch.remote(WATCH_S)

    def tokenize(self, actor: Any, task: ShardTask, delay_s: float) -> Any:
        return actor.tokenize.remote(task, delay_s)

    def kill(self, actor: Any) -> None:
        ray.kill(actor)

    def wait(self, calls: Collection[Any], timeout_s: float) -> list[Any]:
        """All that have an outcome, as soon as there is one, or when the time is up."""
        if not calls:  # every slot pauses before its next start
            time.sleep(timeout_s)
            return []
        done, open_calls = ray.wait(list(calls), timeout=timeout_s)
        if done and open_calls:  # each wait looks at all of them: rather one more than one for each that is done
            if len(open_calls) >= MANY_CALLS:  # and rather a moment later, with more that are done
                time.sleep(PAUSE_A_CALL_S * len(open_calls))
            done += ray.wait(open_calls, num_returns=len(open_calls), timeout=0)[0]
        return list(done)

    def outcome(self, call: Any) -> Outcome:
        try:
            value = ray.get(call)
            if isinstance(value, Tokenized):
                return Answer(value.result, value.times, value.note, value.failed_images)
            return Answer(value)
        except ActorUnavailableError as error:
            return Unreachable(in_few_words(error))
        except RayTaskError as error:
            return Raised(_plain(error.cause))
        except RayError as error:
            return Died(in_few_words(error), with_node=_took_its_node_along(error))

    def draining_nodes(self) -> Collection[str] | None:
        return draining_nodes()

    def fitting(self) -> int:
        settings = self._settings
        cpus_beside = settings.decode.cpus if settings.decode else 0.0
        return fitting_actors(cluster_resources(), settings.gpus_per_actor, settings.cpus_per_actor, cpus_beside)

    def shards_in_flight(self, num_actors: int) -> int | None:
        return shards_in_flight(self._settings, num_actors)

    def resources(self) -> str:
        return describe_resources()


def _plain(cause: Exception) -> Exception:
    """Of an error that could not travel Ray makes one of its own, with all the traceback in it."""
    return RuntimeError(in_few_words(cause)) if isinstance(cause, RayError) else cause


def _took_its_node_along(error: RayError) -> bool:
    """Ray has a flag for a node that it was told would go, and only words for one that went."""
    preempted = isinstance(error, RayActorError) and error.preempted
    return preempted or "its node has died" in str(error)
