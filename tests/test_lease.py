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

SOON = str(time.time() + 100).encode()  # alive, were it whole
DAMAGED = [
    b'{"renewed": null, "pid": 1}', b'{"renewed": "x", "pid": 1}', b'{"renewed": NaN, "pid": 1}',
    b'{"renewed": Infinity, "pid": 1}', b'{"renewed": 1%s, "pid": 1}' % (b"0" * 400),
    b'{"renewed": %s, "pid": null}' % SOON, b'{"renewed": %s, "pid": []}' % SOON, b'{"renewed": %s}' % SOON,
]  # fmt: skip


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


def test_a_driver_that_is_told_to_stop_as_it_takes_a_lease_leaves_none(
    output: OutputPrefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(url: str, data: bytes) -> bool:
        storage.publish(url, data)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("pipeline.lease.storage.create", interrupted)
        Lease(output).__enter__()
    assert not storage.exists(output.file("lease.json"))
    with Lease(output), pytest.raises(RunHeld):
        Lease(output).__enter__()


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
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, but its parent has not asked for its code yet
    with Lease(output):
        assert stored(output)["pid"] == os.getpid()
    holder.wait()


def test_a_live_driver_on_another_host_is_respected_though_its_process_cannot_be_seen(output: OutputPrefix) -> None:
    left_behind(output, host="another-host", pid=gone_process())
    with pytest.raises(RunHeld, match="another-host"), Lease(output):
        pass
    assert stored(output)["writer"] == "another"


@pytest.mark.parametrize("elsewhere", [{"boot": "another"}, {"pid_namespace": "pid:[1]"}, {"boot": None}])
def test_a_live_driver_in_another_container_of_the_same_host_name_is_respected(
    output: OutputPrefix, elsewhere: dict[str, Any]
) -> None:
    left_behind(output, pid=gone_process(), **elsewhere)
    with pytest.raises(RunHeld, match="holds this run"), Lease(output):
        pass
    assert stored(output)["writer"] == "another"


def test_without_linux_a_lease_ends_only_by_its_time(output: OutputPrefix, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "_boot", lambda: None)
    left_behind(output, pid=gone_process())
    with pytest.raises(RunHeld), Lease(output):
        pass


@pytest.mark.parametrize("behind_s", [EXPIRY_S + 10, -EXPIRY_S - 10])
def test_a_live_driver_whose_clock_is_minutes_apart_is_respected(
    output: OutputPrefix, monkeypatch: pytest.MonkeyPatch, behind_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    def renew(seconds: float) -> None:
        assert seconds > RENEW_S
        there = {**stored(output), "renewed": time.time() - behind_s}
        storage.publish(output.file("lease.json"), json.dumps(there).encode())

    caplog.set_level("INFO")
    left_behind(output, host="another-host", renewed=time.time() - behind_s)
    with monkeypatch.context() as patch, pytest.raises(RunHeld, match="another-host"):
        patch.setattr(lease_module.time, "sleep", renew)
        with Lease(output):
            pass
    assert stored(output)["writer"] == "another"
    assert "waiting 35 s to be sure" in caplog.text


def test_a_lease_from_elsewhere_that_is_given_back_at_the_second_look_is_taken(
    output: OutputPrefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_behind(output, host="another-host", renewed=time.time() - EXPIRY_S - 10)
    with monkeypatch.context() as patch:
        patch.setattr(lease_module.time, "sleep", lambda seconds: storage.remove(output.file("lease.json")))
        lease = Lease(output).__enter__()
    assert stored(output)["pid"] == os.getpid()
    lease.__exit__(None, None, None)


@pytest.mark.parametrize("age_s", [EXPIRY_S + 1, EXPIRY_S * 100, -EXPIRY_S - 1])
def test_a_lease_that_was_not_renewed_is_taken_over_from_any_host(
    output: OutputPrefix, age_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "SECOND_LOOK_S", 0.0)
    left_behind(output, host="another-host", renewed=time.time() - age_s)
    with Lease(output):
        assert stored(output)["host"] == socket.gethostname()


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[1]", b"{}", b"\xff", *DAMAGED], ids=range(6 + len(DAMAGED)))
def test_a_damaged_lease_is_taken_over(output: OutputPrefix, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "SECOND_LOOK_S", 0.0)
    storage.publish(output.file("lease.json"), content)
    with Lease(output):
        assert stored(output)["pid"] == os.getpid()


def test_a_lease_is_renewed_often_enough_to_live(output: OutputPrefix, monkeypatch: pytest.MonkeyPatch) -> None:
    assert RENEW_S * 3 <= EXPIRY_S
    monkeypatch.setattr(lease_module, "RENEW_S", 0.01)
    with Lease(output):
        first = stored(output)["renewed"]
        deadline = time.monotonic() + 60
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
        deadline = time.monotonic() + 60
        # The renewal whose answer is lost is seen before its failure is raised.
        while (failures or stored(output)["renewed"] == first) and time.monotonic() < deadline:
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


def other_takes(output: OutputPrefix) -> None:
    there = {**stored(output), "writer": "another", "host": "another-host", "pid": 7}
    storage.publish(output.file("lease.json"), json.dumps(there).encode())


def test_a_driver_whose_lease_another_took_learns_it_at_its_next_renewal(
    output: OutputPrefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "RENEW_S", 0.01)
    with Lease(output) as lease:
        lease.check()
        with lease._renewing:  # or a renewal that is under way may overwrite what this is about to write
            other_takes(output)
        deadline = time.monotonic() + 60
        while lease.lost is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(RunHeld, match=r"process 7 on another-host.*what was done is safe") as raised:
            lease.check()
    assert raised.value.exit_code == 3
    assert stored(output)["writer"] == "another"


@pytest.mark.parametrize("clock", ["time", "monotonic"])
def test_a_driver_that_was_stopped_for_longer_than_its_lease_asks_before_it_goes_on(
    output: OutputPrefix, monkeypatch: pytest.MonkeyPatch, clock: str
) -> None:
    """Its thread has not renewed yet. A machine that slept has only the wall clock to go by."""
    real = getattr(time, clock)
    with Lease(output) as lease, monkeypatch.context() as patch:
        first = stored(output)["renewed"]
        patch.setattr(lease_module.time, clock, lambda: real() + EXPIRY_S + 1)
        lease.check()  # nobody took it: it goes on
        assert stored(output)["renewed"] > first
        other_takes(output)
        lease.check()  # it was renewed a moment ago
        patch.setattr(lease_module.time, clock, lambda: real() + 2 * EXPIRY_S + 2)
        with pytest.raises(RunHeld, match="process 7 on another-host"):
            lease.check()


def test_a_driver_whose_successor_is_done_already_has_lost_its_lease_too(
    output: OutputPrefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Lease(output) as lease:
        storage.remove(output.file("lease.json"))
        monkeypatch.setattr(lease_module, "EXPIRY_S", -1.0)
        with pytest.raises(RunHeld, match="which is gone again"):
            lease.check()
    assert not storage.exists(output.file("lease.json"))
