"""Counting tokens in Ray tasks, on any CPU of a cluster: for outputs that one machine would read for hours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import ray
from ray.exceptions import RayError, RayTaskError

from jobs.cluster import ClusterError, cluster_resources, connected, in_few_words
from pipeline.token_run import Part, TokenRun
from pipeline.token_stats import TokenCounts, count_parts

MOST_TASKS = 256  # each gives back all its counters: up to 256 MB for places, and as much for parts
RESULT_BYTES = 4 << 30  # of results that may wait at once
TASKS_A_CPU = 2  # so that the last ones end about together
Counting = Callable[[TokenRun, TokenCounts], Iterator[tuple[int, str]]]
Counted = tuple[TokenCounts, list[str]]


def count_on_ray(address: str) -> Counting:
    """As token_stats.count_parts of all parts, on the cluster at `address` (`local`: one of our own on this machine).
    Raises ClusterError, StorageError."""

    def count(run: TokenRun, counts: TokenCounts) -> Iterator[tuple[int, str]]:
        with connected(address):
            yield from _counted_in_tasks(run, counts)

    return count


def _counted_in_tasks(run: TokenRun, counts: TokenCounts) -> Iterator[tuple[int, str]]:
    """Never more tasks at once than there are CPUs, nor than have room for their results."""
    num_cpus = max(1, int(cluster_resources().get("CPU", 1)))
    spans = _spans(len(run.parts), min(MOST_TASKS, TASKS_A_CPU * num_cpus))
    task, settings, num_groups = ray.remote(_count), ray.put(replace(run, parts=())), counts.groups_PG.shape[1]
    at_once = max(1, min(num_cpus, RESULT_BYTES // counts.num_bytes))
    open_calls: dict[ray.ObjectRef, int] = {}
    while spans or open_calls:
        while spans and len(open_calls) < at_once:
            first, end = spans.pop(0)
            open_calls[task.remote(settings, run.parts[first:end], num_groups)] = first
        (done,), _ = ray.wait(list(open_calls))
        first = open_calls.pop(done)
        part_counts, problems = _result(done)
        counts.put(first, part_counts)
        yield from ((first + number, problem) for number, problem in enumerate(problems))


def _count(run: TokenRun, parts: tuple[Part, ...], num_groups: int) -> Counted:
    counts = TokenCounts(run.table, len(parts), num_groups)
    return counts, [problem for _, problem in count_parts(run, parts, counts)]


def _spans(number: int, pieces: int) -> list[tuple[int, int]]:
    """(first, end) of neighbours, as even as can be; none is empty."""
    edges = [number * piece // pieces for piece in range(pieces + 1)]
    return [(first, end) for first, end in pairwise(edges) if first < end]


def _result(call: ray.ObjectRef) -> Counted:
    try:
        counted: Counted = ray.get(call)
        return counted
    except RayTaskError as error:  # it raised, and lives
        raise error.cause from error
    except RayError as error:
        raise ClusterError(f"counting on Ray failed: {in_few_words(error)}; the same command tries again") from error
