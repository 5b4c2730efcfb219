"""One driver at a time: who is told to wait, and whose lease may be taken over."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import lease as lease_module
from pipeline import storage
from pipeline.errors import RunHeld, StorageError
from pipeline.lease import EXPIRY_S, RENEW_S, Lease
from pipeline.output import OutputPrefix


@pytest.fixture
def output(tmp_path: Path) -> OutputPrefix:
    return OutputPrefix(str(tmp_path))


def stored(output: OutputPrefix) -> dict[str, Any]:
    return dict(json.loads(storage.read_bytes(output.file("lease.json"))))


def left_behind(output: OutputPrefix, **changes: Any) -> None:
    """A lease that somebody holds, or held."""
    with Lease(output):
        content = stored(output)
    storage.publish(output.file("lease.json"), json.dumps({**content, "writer": "another", **changes}).encode())


def gone_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_second_driver_is_told_who_holds_the_run_and_exits_with_3(output: OutputPrefix) -> None:
    with Lease(output):
        with pytest.raises(RunHeld) as raised, Lease(output):
            pass
        assert stored(output)["pid"] == os.getpid()  # the first one's is untouched
    assert raised.value.exit_code == 3
    said = str(raised.value)
    assert f"process {os.getpid()} on {socket.gethostname()}" in said and "wait for it, or stop it" in said


def test_a_lease_ends_with_its_driver(output: OutputPrefix) -> None:
    for _ in range(2):
        with Lease(output):
            assert storage.exists(output.file("lease.json"))
        assert not storage.exists(output.file("lease.json"))
    with pytest.raises(KeyError), Lease(output):
        raise KeyError("the run failed")
    assert not storage.exists(output.file("lease.json"))
    assert not [t for t in threading.enumerate() if t.name == "lease"]


def test_a_lease_whose_process_is_gone_is_taken_over(output: OutputPrefix) -> None:
    left_behind(output, pid=gone_process())
    with Lease(output):
        assert stored(output)["pid"] == os.getpid()


def test_a_process_number_that_was_given_to_another_process_is_no_holder(output: OutputPrefix) -> None:
    left_behind(output, started="1")  # this very number, begun at another time
    with Lease(output):
        assert stored(output)["writer"] != "another"


def test_a_driver_killed_with_sigkill_leaves_a_lease_that_the_next_takes_over(output: OutputPrefix) -> None:
    program = (
        "import sys, time; from pipeline.lease import Lease; from pipeline.output import OutputPrefix\n"
        "with Lease(OutputPrefix(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", program, output.url], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(RunHeld, match=f"process {holder.pid}"), Lease(output):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with Lease(output):
        assert stored(output)["pid"] == os.getpid()


def test_a_live_driver_on_another_host_is_respected_though_its_process_cannot_be_seen(output: OutputPrefix) -> None:
    left_behind(output, host="another-host", pid=gone_process())
    with pytest.raises(RunHeld, match="another-host"), Lease(output):
        pass
    assert stored(output)["writer"] == "another"


@pytest.mark.parametrize("age_s", [EXPIRY_S + 1, EXPIRY_S * 100])
def test_a_lease_that_was_not_renewed_is_taken_over_from_any_host(output: OutputPrefix, age_s: float) -> None:
    left_behind(output, host="another-host", renewed=time.time() - age_s)
    with Lease(output):
        assert stored(output)["host"] == socket.gethostname()


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[1]", b"{}", b"\xff"])
def test_a_damaged_lease_is_taken_over(output: OutputPrefix, content: bytes) -> None:
    storage.publish(output.file("lease.json"), content)
    with Lease(output):
        assert stored(output)["pid"] == os.getpid()


def test_a_lease_is_renewed_often_enough_to_live(output: OutputPrefix, monkeypatch: pytest.MonkeyPatch) -> None:
    assert RENEW_S * 3 <= EXPIRY_S
    monkeypatch.setattr(lease_module, "RENEW_S", 0.01)
    with Lease(output):
        first = stored(output)["renewed"]
        deadline = time.monotonic() + 10
        while stored(output)["renewed"] == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stored(output)["renewed"] > first


def test_a_store_that_fails_for_a_while_does_not_end_the_renewals(
    output: OutputPrefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = storage.swap, [StorageError("503"), FileNotFoundError("no bucket"), OSError("reset")]

    def swap(url: str, data: bytes, old: bytes) -> bool:
        if len(failures) == 1:
            real(url, data, old)  # it succeeded, but its answer is lost
        if failures:
            raise failures.pop()
        return real(url, data, old)

    monkeypatch.setattr(lease_module, "RENEW_S", 0.01)
    with Lease(output):
        first = stored(output)["renewed"]
        monkeypatch.setattr(storage, "swap", swap)
        deadline = time.monotonic() + 10
        while stored(output)["renewed"] == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stored(output)["renewed"] > first and not failures


def test_a_lease_that_another_took_meanwhile_is_not_removed(output: OutputPrefix) -> None:
    with Lease(output):
        storage.publish(output.file("lease.json"), b'{"writer": "another"}')
    assert stored(output) == {"writer": "another"}


@pytest.mark.parametrize("found", ["a dead lease", "one that is given back at that moment"])
def test_of_two_that_take_over_at_once_one_is_told(
    output: OutputPrefix, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    left_behind(output, pid=gone_process())
    other = b'{"writer": "the other one"}'
    real = storage.read_bytes

    def read_bytes(url: str) -> bytes:
        if found == "a dead lease":
            data = real(url)
            storage.publish(url, other)  # just after we looked
            return data
        storage.publish(url, other)
        raise FileNotFoundError(url)

    with pytest.raises(RunHeld, match="at the same moment"), monkeypatch.context() as patch:
        patch.setattr(storage, "read_bytes", read_bytes)
        with Lease(output):
            pass
    assert stored(output) == {"writer": "the other one"}


@pytest.mark.parametrize("round", range(5))
def test_of_many_that_take_over_a_dead_lease_at_once_exactly_one_holds_it(output: OutputPrefix, round: int) -> None:
    left_behind(output, pid=gone_process())
    start, end = threading.Barrier(6), threading.Barrier(6)
    held: list[bool] = []

    def drive() -> None:
        start.wait()
        try:
            with Lease(output):
                held.append(True)
                end.wait()
        except RunHeld:
            held.append(False)
            end.wait()

    threads = [threading.Thread(target=drive) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(held) == [False] * 5 + [True]
