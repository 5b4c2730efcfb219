"""What several test files share: one local Ray, and the `quick` mark. Helpers that make data: make_data.py."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

LONG_MARKS = {"ray", "server", "training", "slow"}


def pytest_configure() -> None:
    """A shell ignores Ctrl-C for what it runs with `&`, and children inherit that: tests of Ctrl-C need it back."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever needs neither Ray nor a server nor a training run nor much time is `quick`."""
    for item in items:
        if not LONG_MARKS & {mark.name for mark in item.iter_markers()}:
            item.add_marker("quick")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads that wait for each other on a busy machine make tiny models a hundred times slower."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray of our own for the session, with more logical CPUs than cores and two GPUs that aren't there."""
    import ray

    # `local`: a head that was killed leaves a file that makes a plain ray.init join a dead cluster.
    ray.init(
        address="local", num_cpus=8, num_gpus=2, object_store_memory=150 << 20, include_dashboard=False,
        log_to_driver=False, logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}},  # actors import fakes.py
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an empty bucket on a real S3 server; clients of this process and its children find it by environment."""
    from jobs.local_servers import S3Server
    from s3_clients import s3_clients_of

    server = S3Server(tmp_path_factory.mktemp("s3"), "test-bucket")
    server.start()
    with s3_clients_of(server.environment):
        yield "s3://test-bucket"
    server.stop()
