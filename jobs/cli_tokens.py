"""Those commands of `dvae` that read a run's tokens; cli.py has the others, and puts these among them."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.cli_models import AsJson

Output = Annotated[str, typer.Argument(help="output of dvae tokenize", metavar="OUTPUT")]


def stats(
    output: Output,
    plots: Annotated[str | None, typer.Option(help="a folder or URL for pictures of what is counted")] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="count in Ray tasks: auto, an address, or local", metavar="ADDRESS"),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """How the codes are used, which shards are unlike the others, and what failed."""
    from jobs.stats import run_stats

    return run_stats(output, as_json=as_json, plots=plots, ray_address=ray)


def report(
    output: Output,
    checkpoint: Annotated[
        str | None, typer.Option(help="the checkpoint that made the tokens, to show what they say")
    ] = None,
    html: Annotated[str, typer.Option(help="the page to write: a path or URL")] = "report.html",
    images: Annotated[int, typer.Option(help="most images to show", min=0, max=200)] = 12,
    ray: Annotated[
        str | None, typer.Option(help="count in Ray tasks: auto, an address, or local", metavar="ADDRESS")
    ] = None,
) -> int:
    """One HTML page about a run: totals, pace, failures, use of the codes, pictures, and where it comes from."""
    from jobs.run_report import run_report

    return run_report(output, checkpoint, html, num_images=images, ray_address=ray)


def compact(
    output: Output,
    dest: Annotated[str, typer.Argument(help="an empty place for the larger files", metavar="DEST")],
    target_bytes: Annotated[
        int, typer.Option(help="most bytes of a file, but for a larger part; three times that in memory", min=1)
    ] = 256 << 20,
    as_json: AsJson = False,
) -> int:
    """The same rows in fewer, larger files elsewhere, read back before it says done. OUTPUT is never written to."""
    from jobs.compact import run_compact

    return run_compact(output, dest, target_bytes=target_bytes, as_json=as_json)


def register(
    output: Annotated[str, typer.Argument(help="output of dvae tokenize or dvae compact", metavar="OUTPUT")],
    as_json: AsJson = False,
) -> int:
    """Make OUTPUT a Delta Lake table, or a new version of it: of what is committed now, without copying a part."""
    from jobs.register import run_register

    return run_register(output, as_json=as_json)
