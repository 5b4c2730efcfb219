"""Which S3 server the clients of this process talk to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
from s3fs import S3FileSystem


@contextmanager
def s3_clients_of(environment: Mapping[str, str]) -> Iterator[None]:
    """Inside, clients of this process and of its children find the server with that environment. (fsspec keeps the
    clients that it made, whatever the environment says by then.)"""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        S3FileSystem.clear_instance_cache()
        yield
    S3FileSystem.clear_instance_cache()
