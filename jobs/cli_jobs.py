"""Those commands of `dvae` that reach a cluster through its Jobs server; cli.py has the others, and puts these among
them."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.cli_models import AsJson

Config = Annotated[str, typer.Argument(help="a YAML file (any URL)", metavar="CONFIG")]
Overrides = Annotated[list[str] | None, typer.Argument(help="settings on top of it", metavar="[KEY=VALUE]...")]
Address = Annotated[
    str | None, typer.Option(help="the cluster's dashboard, http://HEAD:8265; $RAY_API_SERVER_ADDRESS without it")
]
Name = Annotated[str, typer.Argument(help="as dvae jobs list names it", metavar="JOB")]

jobs_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="What was submitted to a Ray cluster: list, logs, stop."
)


def submit(
    job: Annotated[str, typer.Argument(help="train or tokenize", metavar="train|tokenize")],
    config: Config,
    overrides: Overrides = None,
    address: Address = None,
    env: Annotated[
        list[str] | None,
        typer.Option(help="give the job this variable of yours, as AWS_ENDPOINT_URL (again for others); no secrets"),
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="do not follow the log")] = False,
) -> int:
    """Send a train or tokenize job to a Ray cluster and follow its log; again: follow it, or go on with it."""
    from jobs.submit import run_submit

    return run_submit(job, config, overrides or [], address=address, names=env or [], wait=not no_wait)


@jobs_app.command("list")
def list_jobs(address: Address = None, as_json: AsJson = False) -> int:
    """The jobs of the cluster, the newest last."""
    from jobs.cluster_jobs import run_list

    return run_list(address, as_json=as_json)


@jobs_app.command()
def logs(
    job: Name,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="until the job ends; then with its exit code")] = False,
) -> int:
    """What a job has said."""
    from jobs.cluster_jobs import run_logs

    return run_logs(job, address, to_the_end=follow)


@jobs_app.command()
def stop(job: Name, address: Address = None) -> int:
    """Stop a job and wait until it has; submitted again, it goes on from what is done."""
    from jobs.cluster_jobs import run_stop

    return run_stop(job, address)
