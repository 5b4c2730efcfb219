"""Joining or starting a Ray cluster, and what it has."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import ray
from ray.exceptions import RayError

from jobs.leaving import end_in_time, leave_for_good, no_signal_lost
from pipeline.errors import PipelineError

log = logging.getLogger(__name__)
# Ray says at every start that it guards its own cluster with a token, which asks nothing of anybody.
logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
SWITCH_INTERVAL_S = 5e-5  # beside a busy Python thread a decode thread fell to 8% of its rate at the default
OBJECT_STORE_BYTES = 200 << 20  # of a cluster of our own, where only small results pass through it
FAREWELL_S = 5.0  # after ten in vain Ray ends the process, before the lease is given back
GCS_TIMEOUT_S = 1.0  # meanwhile the driver hears nobody and hands nothing out
_SHARED_MEMORY = Path("/dev/shm")
_ADVICE = "Some common causes include:"


class ClusterError(PipelineError):
    """The cluster cannot be reached, or lacks what was asked for."""


class HeadGone(ClusterError):
    """The cluster's head is silent."""


@contextmanager
def connected(address: str | None, store_bytes: int = OBJECT_STORE_BYTES) -> Iterator[None]:
    """Inside, Ray is there: the cluster at `address` (or $RAY_ADDRESS), else one of our own on this machine, with an
    object store of so many bytes, which ends with the block. A Ray that was there before is used and left alone.
    Raises ClusterError."""
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    _connect(address, store_bytes)
    with ExitStack() as parting:
        parting.callback(_part_from, address)
        try:
            yield
        except HeadGone:  # nobody is there to hear a farewell
            parting.pop_all()
            leave_for_good()
            raise


def _part_from(address: str) -> None:
    if address == "local":
        ray.shutdown()
    else:  # a head that is frozen or cut off would be waited for, and the run's lease held, for ever
        end_in_time(ray.shutdown, FAREWELL_S)


def _connect(address: str, store_bytes: int) -> None:
    # `local` and not None: a killed head leaves a file that makes a plain ray.init join a dead cluster.
    own = {"include_dashboard": False, "object_store_memory": _there_is(store_bytes)} if address == "local" else {}
    on_sigterm = signal.getsignal(signal.SIGTERM)  # ray.init puts one in its place that exits with code 15
    try:
        with no_signal_lost():
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ClusterError(
            f"no Ray cluster at {address}: {error}; give another address (ray.address, --ray), or leave it out"
        ) from error
    except (SystemExit, KeyboardInterrupt) as error:  # after SIGTERM its C++ side would abort in three seconds
        signal.alarm(0)
        ray.shutdown()
        raise KeyboardInterrupt from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)


def cluster_resources() -> dict[str, float]:
    """What the cluster that is connected has, by name (CPU, GPU, …)."""
    return dict(ray.cluster_resources())


def _there_is(store_bytes: int) -> int:
    """No more than most of the shared memory: Ray refuses to start with more, and takes the disk when that is full."""
    if not _SHARED_MEMORY.is_dir():
        return store_bytes
    return max(OBJECT_STORE_BYTES, min(store_bytes, int(0.8 * shutil.disk_usage(_SHARED_MEMORY).free)))


def describe_resources() -> str:
    """What the cluster has and what of it is free, for messages."""
    total, free = ray.cluster_resources(), ray.available_resources()
    return ", ".join(f"{free.get(name, 0):g} of {total.get(name, 0):g} {name}s free" for name in ("CPU", "GPU"))


def in_few_words(error: BaseException) -> str:
    """Ray says what happened in the first line, and the cause of a failed start in the last; the advice that it adds
    to any death is left out."""
    lines = str(error).partition(_ADVICE)[0].strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines) < 2 else f"{lines[0]} … {lines[-1].strip()}"


def this_node() -> str:
    """The id of the node on which this actor is; empty outside of Ray."""
    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""


def draining_nodes() -> frozenset[str] | None:
    """Ids of the nodes that are about to go (a spot machine's notice, an autoscaler's wish); None where the cluster's
    head does not answer."""
    try:
        from ray._private.worker import global_worker  # as Ray Serve and Train do: there is no public name for it

        return frozenset(global_worker.gcs_client.get_draining_nodes(timeout=GCS_TIMEOUT_S))
    except (ImportError, AttributeError):  # another Ray: its nodes then go without notice
        return frozenset()
    except RayError as error:
        log.warning("the cluster's head does not answer: %s", error)
        return None
