"""A job's log as a person sees it, and what is made of a Jobs server that goes away."""

from __future__ import annotations

import io
import logging
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus
from rich.console import Console

from jobs import job_log
from jobs.command_line import PublicFormatter
from jobs.job_log import FollowLost, LogView, follow
from jobs.job_server import JobServer
from jobs.progress import PROGRESS_LINE, JobProgress

AGAIN = "dvae submit tokenize t.yaml"


def job(status: JobStatus, code: int | None = None, message: str = "") -> Any:
    return SimpleNamespace(
        status=status, submission_id="dvae-x", message=message, driver_exit_code=code, metadata={"submit": AGAIN}
    )


class Server:
    """A Ray client, asked for a job that has started. Its log connections break before the job ends, in each of the
    ways that Ray's can."""

    chunks = ("one\ntw", "o\n", "three")  # a log is sent from its beginning at each connection
    breaks = (RuntimeError("WebSocket connection closed unexpectedly"), None, ConnectionResetError("gone"), None)

    def __init__(self, *answers: Any) -> None:
        self.connections, self.answers = 0, [RUNNING, *answers]

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        broken = self.breaks[min(self.connections, 3)]
        self.connections += 1
        for chunk in self.chunks[: self.connections]:
            yield chunk
        if broken is not None:
            raise broken

    def get_job_info(self, name: str) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


RUNNING, ENDED = job(JobStatus.RUNNING), job(JobStatus.SUCCEEDED)
AWAY = ConnectionError("Connection refused\nTraceback")
GONE = RuntimeError("Request failed with status code 404: Job dvae-x does not exist.")


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_log, "RECONNECT_S", 0.0)


def test_a_broken_log_connection_is_taken_up_again_until_the_job_ends(capsys: pytest.CaptureFixture[str]) -> None:
    client = Server(RUNNING, RUNNING, RUNNING, job(JobStatus.FAILED, 3, "failed with exit code 3:\nthree"))
    assert follow(JobServer(client), "dvae-x", LogView()) == 3
    assert client.connections == 4
    said = capsys.readouterr()
    assert said.out == "one\ntwo\nthree\n"
    assert said.err == "dvae-x: FAILED: failed with exit code 3:\n", "its end is shown already"


def test_a_log_whose_connection_broke_as_the_job_ended_is_fetched_once_more(capsys: pytest.CaptureFixture[str]) -> None:
    client = Server(ENDED, ENDED)
    assert follow(JobServer(client), "dvae-x", LogView()) == 0
    assert client.connections == 2 and capsys.readouterr().out == "one\ntwo\n"


def test_a_server_that_is_away_for_a_while_is_asked_again(capsys: pytest.CaptureFixture[str]) -> None:
    bad_gateway = RuntimeError("Request failed with status code 502: <html>\n")
    assert follow(JobServer(Server(RUNNING, AWAY, bad_gateway, RUNNING, ENDED, ENDED)), "dvae-x", LogView()) == 0
    assert capsys.readouterr().err == "no Ray Jobs server answers: Connection refused; asking again for 60 s\n"


def test_a_server_that_stays_away_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_log, "AWAY_S", 0.0)
    with pytest.raises(FollowLost, match="Connection refused; dvae-x may go on: the same command finds it") as lost:
        follow(JobServer(Server(RUNNING, *[AWAY] * 100)), "dvae-x", LogView())
    assert lost.value.exit_code == 1


def test_a_head_that_was_started_anew_knows_nothing_of_the_job() -> None:
    with pytest.raises(FollowLost, match="submitted again, it goes on from what is done"):
        follow(JobServer(Server(RUNNING, AWAY, GONE)), "dvae-x", LogView())


def test_a_silent_connection_is_made_anew(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Silent(Server):
        async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
            self.connections += 1
            yield "one\n"
            if self.connections == 1:
                await job_log.asyncio.Event().wait()

    monkeypatch.setattr(job_log, "SILENCE_S", 0.01)
    client = Silent(RUNNING, ENDED)
    assert follow(JobServer(client), "dvae-x", LogView()) == 0
    assert client.connections == 2 and capsys.readouterr().out == "one\n"


@pytest.mark.parametrize(
    ("ended", "code", "said"),
    [
        (job(JobStatus.STOPPED), 130, f"it goes on from what is done with\n  {AGAIN}\n"),
        (job(JobStatus.FAILED, 2, "failed with exit code 2, last available logs (truncated):\nx"), 2, "code 2\n"),
        (job(JobStatus.FAILED, 127, "failed with exit code 127"), 127, "has no `dvae`"),
        (job(JobStatus.FAILED, -9, "failed with exit code -9"), 1, "exit code -9"),
        (job(JobStatus.FAILED, None, "runtime_env setup failed:\nno space left"), 1, "no space left"),
    ],
)
def test_exit_codes(ended: Any, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert job_log.exit_code(JobServer(Server()), ended) == code
    assert said in capsys.readouterr().err


def test_ctrl_c_leaves_the_job_to_itself_and_says_how_to_come_back(capsys: pytest.CaptureFixture[str]) -> None:
    server = JobServer(Server(KeyboardInterrupt()), "http://user:secret@head:8265")
    assert follow(server, "dvae-x", LogView()) == 130
    said = capsys.readouterr().err
    assert "dvae jobs logs dvae-x --follow --address http://head:8265;" in said
    assert "dvae jobs stop dvae-x --address http://head:8265\n" in said


def test_a_job_that_does_not_start_is_no_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job_log, "SAY_EVERY_S", 0.0)
    client = Server(ENDED, ENDED)
    client.answers = [job(JobStatus.PENDING, None, "Job has not started yet.")] * 2 + client.answers
    assert follow(JobServer(client), "dvae-x", LogView()) == 0
    assert capsys.readouterr().err == "dvae-x waits to start: Job has not started yet.\n" * 2


@pytest.mark.parametrize("num_said", [10, 5000])
def test_who_comes_to_a_long_log_on_a_terminal_sees_its_end_and_then_all_that_is_new(num_said: int) -> None:
    """It would be drawn for minutes."""
    said = "".join(f"line {number}\n" for number in range(num_said)) + "hal"

    class Long(Server):
        def get_job_logs(self, name: str) -> str:
            return said

        async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
            yield said[:7]
            yield said[7:] + "f\nnew\n"

    screen = io.StringIO()
    view = LogView(Console(file=screen, force_terminal=True, width=100, highlight=False))
    assert follow(JobServer(Long(ENDED)), "dvae-x", view) == 0
    first, *shown = screen.getvalue().splitlines()
    if num_said == 10:
        assert [first, *shown] == [f"line {number}" for number in range(10)] + ["half", "new"]
    else:
        assert first == "(4,001 lines before these: dvae jobs logs shows them)"
        assert shown == [f"line {number}" for number in range(4001, 5000)] + ["half", "new"]


def progress_lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a job's own progress leaves in its log."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(PublicFormatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("jobs.progress")
    monkeypatch.setattr("jobs.progress.LINE_EVERY_S", 0.0)
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    with JobProgress("shards", total=2000) as progress:
        progress.note("made-1.tar: 3 rows, 0 failed, 0.1 s")
        for _ in range(2):
            progress.advance(1000, "9 images, 3 images/s, 0 failed, encoder busy 41%: it waits for pixels")
    return written.getvalue().splitlines()


def test_on_a_terminal_progress_is_one_line_below_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    note, half, whole = progress_lines(monkeypatch)
    assert [bool(PROGRESS_LINE.fullmatch(line)) for line in (note, half, whole)] == [False, True, True]
    screen = io.StringIO()
    with LogView(Console(file=screen, force_terminal=True, width=200, highlight=False)) as view:
        view.write(f"{note}\n{half}\nsecond note\n{whole}\n[red]third[/] \x1b]0;title\x07 note")
    shown = screen.getvalue()
    clear = "\r\x1b[2K"
    half, whole = (PROGRESS_LINE.fullmatch(line)[1] for line in (half, whole))  # type: ignore[index]
    assert f"{clear}second note\n" in shown, "it takes the place of the progress, which is drawn again below it"
    assert shown.index(half) < shown.index("second note") < shown.rindex(whole)
    assert "[red]third[/] \N{REPLACEMENT CHARACTER}]0;title\N{REPLACEMENT CHARACTER} note" in shown


def test_the_time_left_is_seen_on_a_terminal_of_usual_width() -> None:
    line = (
        "2026-11-23 13:05:08,123 INFO shards 8123 of 10000, 8,123,456 images, 1,234 images/s, 12 failed, "
        "encoder busy 41%: it waits for pixels, 6 min left"
    )
    screen = io.StringIO()
    with LogView(Console(file=screen, force_terminal=True, width=120, highlight=False)) as view:
        view.write(line + "\n")
    assert "it waits for pixels, 6 min left" in screen.getvalue()


def test_where_nobody_looks_the_log_is_left_as_it_is_but_for_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = progress_lines(monkeypatch)
    with LogView() as view:
        view.write("\n".join([*lines, "", "get https://me:pw@host/x.tar?sig=s3cret failed"]))
    assert capsys.readouterr().out.splitlines() == [*lines, "", "get https://host/x.tar failed"]
