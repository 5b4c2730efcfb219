"""A submitted job's log, followed to its end: lines as they come, and where a person looks, progress in one line that
stays below them."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from types import TracebackType
from typing import Any

import aiohttp
from rich.console import Console
from rich.live import Live
from rich.text import Text

from jobs.command_line import printable, say
from jobs.job_server import PENDING, STOPPED, SUCCEEDED, JobServer, ServerAway, SubmitError, in_one_line
from jobs.progress import PROGRESS_LINE
from pipeline.urls import public_text

log = logging.getLogger(__name__)
INTERRUPTED = 130
NO_SUCH_COMMAND = 127  # the shell's
LOG_FOLLOWS = ", last available logs"  # in Ray's message of a job that failed
RECONNECT_S = 2.0
SILENCE_S = 600.0  # then the connection is made anew, which sends the whole log again: it may be dead
SAY_EVERY_S = 30.0
MOST_LINES = 1000  # of what was said before, on a terminal: a long run's log would take minutes to draw
AWAY_S = 60.0  # a port-forward is soon there again, a head takes its time


class FollowLost(SubmitError):
    """What became of the job is not known."""

    exit_code = 1


def follow(server: JobServer, name: str, view: LogView) -> int:
    """Show the log until the job ends; the job's exit code, or 130 where it was stopped, or where Ctrl-C left it to
    itself. Raises FollowLost."""
    try:
        with view:
            job = _Follower(server, name, view).until_the_end()
    except KeyboardInterrupt:
        again, stop = server.command(f"dvae jobs logs {name} --follow"), server.command(f"dvae jobs stop {name}")
        say(f"detached; {name} goes on. To follow it again: the same command, or {again}; to stop it: {stop}")
        return INTERRUPTED
    return exit_code(server, job)


def exit_code(server: JobServer, job: Any) -> int:
    """Of a job that has ended, having said how where that was not well."""
    if job.status == SUCCEEDED:
        return 0
    if job.status == STOPPED:
        say(f"{job.submission_id} was stopped; {goes_on(server, job)}")
        return INTERRUPTED
    code, message = job.driver_exit_code, str(job.message or "").strip()
    if code is not None:  # the command has run: the rest of the message is the end of the log, which is shown already
        message = in_one_line(RuntimeError(message.partition(LOG_FOLLOWS)[0]))
    say(f"{job.submission_id}: {job.status.value}: {message}")
    if code == NO_SUCH_COMMAND:
        say("the cluster has no `dvae`: its image, or its machines, need this project installed")
    return code if code is not None and 0 < code < 256 else 1


def goes_on(server: JobServer, job: Any) -> str:
    """How, after it was stopped. (The job's own goodbye names the line that ran there.)"""
    line = (job.metadata or {}).get("submit")
    how = f"with\n  {server.command(line)}" if line else "when it is submitted again"
    return f"it goes on from what is done {how}"


def waits_to_start(job: Any) -> str:
    """Of a job whose files are not unpacked yet, or that has no place, as on a head without room."""
    return f"{job.submission_id} waits to start: {in_one_line(RuntimeError(job.message or 'the cluster says no more'))}"


class LogView:
    """Takes a log in pieces. `console`: where it is shown, in colours of its own and with one line of progress if it
    is a terminal; else line by line, as it is."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self.is_terminal = self._console.is_terminal
        self._rest = ""
        self._live: Live | None = None

    def __enter__(self) -> LogView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The newest progress is left where it is."""
        if self._rest:
            self._line(self._rest)
            self._rest = ""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def catch_up(self, text: str) -> None:
        """What was said before anybody looked: its end."""
        lines = text.split("\n")
        if (too_many := len(lines) - MOST_LINES) > 0:
            self.note(f"({too_many:,} lines before these: dvae jobs logs shows them)")
        self.write("\n".join(lines[-MOST_LINES:]))

    def write(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(line)

    def note(self, text: str) -> None:
        """A word of ours between the lines."""
        if self.is_terminal:
            self._console.print(Text(printable(public_text(text))))
        else:
            say(text)

    def _line(self, line: str) -> None:
        shown = printable(public_text(line.rstrip("\r")))
        if not self.is_terminal:
            sys.stdout.write(shown + "\n")
            sys.stdout.flush()
        elif found := PROGRESS_LINE.fullmatch(shown):
            self._progress(Text(found[1], style="bold", no_wrap=True, overflow="ellipsis"))
        else:
            self._console.print(Text(shown))

    def _progress(self, text: Text) -> None:
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        self._live.update(text, refresh=True)


class _Follower:
    def __init__(self, server: JobServer, name: str, view: LogView) -> None:
        self._server, self._name, self._view = server, name, view
        self._shown = 0  # characters: each connection sends the log from its beginning

    def until_the_end(self) -> Any:
        """The job, which has ended. What was still in a connection that broke just before is fetched once more."""
        had_ended = False
        self._until_it_starts()
        if self._view.is_terminal:
            self._catch_up()
        while True:
            whole = asyncio.run(self._take())
            job = self._ask()
            if job.status.is_terminal() and (whole or had_ended):
                return job
            had_ended = job.status.is_terminal()
            time.sleep(RECONNECT_S)

    def _until_it_starts(self) -> None:
        said = time.monotonic()
        while (job := self._ask()).status == PENDING:
            if time.monotonic() - said >= SAY_EVERY_S:
                said = time.monotonic()
                self._view.note(waits_to_start(job))
            time.sleep(RECONNECT_S)

    def _catch_up(self) -> None:
        try:
            log_so_far = self._server.log_so_far(self._name)
        except SubmitError as error:
            log.debug("the connection will bring it: %s", error)
            return
        self._view.catch_up(log_so_far)
        self._shown = len(log_so_far)

    async def _take(self) -> bool:
        """Show what is new until the connection ends; whether it ended as it should."""
        seen, chunks = 0, self._server.tail(self._name)
        try:
            while True:
                chunk = await asyncio.wait_for(anext(chunks), SILENCE_S)
                self._view.write(chunk[max(0, self._shown - seen) :])
                seen += len(chunk)
                self._shown = max(self._shown, seen)
        except StopAsyncIteration:
            return True
        except (RuntimeError, OSError, aiohttp.ClientError) as error:  # also of a timeout
            log.debug("the log connection broke: %s", in_one_line(error))
            return False

    def _ask(self) -> Any:
        give_up_at, told = time.monotonic() + AWAY_S, False
        while True:
            try:
                job = self._server.job(self._name)
                break
            except ServerAway as error:
                if time.monotonic() > give_up_at:
                    raise FollowLost(f"{error}; {self._name} may go on: the same command finds it again") from error
                if not told:
                    self._view.note(f"{error}; asking again for {AWAY_S:.0f} s")
                told = True
            time.sleep(RECONNECT_S)
        if job is None:
            raise FollowLost(
                f"the cluster knows nothing of {self._name} any more, as one whose head was started anew; "
                "submitted again, it goes on from what is done"
            )
        return job
