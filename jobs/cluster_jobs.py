"""`dvae jobs`: what was submitted to a cluster, its logs, and how to stop it."""

from __future__ import annotations

import difflib
import json
import time
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.command_line import say
from jobs.job_log import INTERRUPTED, SAY_EVERY_S, LogView, follow, goes_on, waits_to_start
from jobs.job_server import PENDING, JobServer, SubmitError
from jobs.wording import duration
from pipeline.urls import public_text

POLL_S = 0.5
LAST_WORDS = 20  # lines


def run_list(address: str | None, *, as_json: bool) -> int:
    """All jobs of the cluster, the newest last. Raises SubmitError."""
    rows = [_row(job) for job in JobServer.connect(address).jobs()]
    console = Console(soft_wrap=True, highlight=False)
    if as_json:
        console.print_json(json.dumps(rows))
    elif rows:
        console.print(_table(rows))
    else:
        console.print("no job was submitted to this cluster since it was started")
    return 0


def run_logs(name: str, address: str | None, *, to_the_end: bool) -> int:
    """What the job has said; `to_the_end`: until it ends, and then its exit code. Raises SubmitError."""
    server = JobServer.connect(address)
    _known(server, name)
    if to_the_end:
        return follow(server, name, LogView())
    with LogView() as view:
        view.write(server.log_so_far(name))
    return 0


def run_stop(name: str, address: str | None) -> int:
    """Ask the job to stop, wait until it has ended, and show its last words. Raises SubmitError."""
    server = JobServer.connect(address)
    job = _known(server, name)
    if job.status.is_terminal() or not server.ask_to_stop(name):
        say(f"{name} has ended already: {_known(server, name).status.value}")
        return 0
    first = "it has not started" if job.status == PENDING else "a training saves a checkpoint first"
    say(f"{name} is asked to stop; {first} (Ctrl-C: do not wait for it)")
    try:
        job = _wait(server, name)
    except KeyboardInterrupt:
        say(f"{name} goes on stopping by itself")
        return INTERRUPTED
    with LogView() as view:
        view.write("\n".join(server.log_so_far(name).split("\n")[-LAST_WORDS - 1 :]))  # behind the last there is none
    say(f"{name}: {job.status.value}; {goes_on(server, job)}")
    return 0


def _wait(server: JobServer, name: str) -> Any:
    """Ray kills it when it takes longer than it was given at its start; one that has not started stops when it does, or
    when Ray gives it up."""
    asked = said = time.monotonic()
    while not (job := _known(server, name)).status.is_terminal():
        if time.monotonic() - said >= SAY_EVERY_S:
            said = time.monotonic()
            if job.status == PENDING:
                say(f"{waits_to_start(job)} It stops then, or when Ray gives it up")
            else:
                say(f"{name} has been stopping for {duration(said - asked)}")
        time.sleep(POLL_S)
    return job


def _known(server: JobServer, name: str) -> Any:
    job = server.job(name)
    if job is None:
        names = [each.submission_id for each in server.jobs()]
        close = difflib.get_close_matches(name, names, n=1)
        meant = f"did you mean {close[0]}?" if close else f"{server.command('dvae jobs list')} names them"
        raise SubmitError(f"the cluster knows no job {name}; {meant}")
    return job


def _row(job: Any) -> dict[str, Any]:
    return {
        "job": job.submission_id,
        "state": job.status.value,
        "started": None if job.start_time is None else job.start_time / 1000,
        "seconds": None if job.start_time is None else round(_end_s(job) - job.start_time / 1000, 1),
        "exit_code": job.driver_exit_code,
        "output": (job.metadata or {}).get("output"),
        "command": public_text(job.entrypoint),
    }


def _end_s(job: Any) -> float:
    return float(job.end_time) / 1000 if job.end_time else time.time()


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="none")
    for name in ("job", "state", "started", "took", "output, or command"):
        table.add_column(name, overflow="fold", no_wrap=name != "output, or command")
    for row in rows:
        started = "" if row["started"] is None else f"{datetime.fromtimestamp(row['started']):%Y-%m-%d %H:%M}"
        took = "" if row["seconds"] is None else duration(row["seconds"])
        table.add_row(row["job"], row["state"], started, took, row["output"] or row["command"])
    return table
