"""Those commands of `dvae` that read a run's tokens; cli.py has the others, and puts these among them."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.cli_models import AsJson

Output = Annotated[str, typer.Argument(help="output of dvae tokenize", metavar="OUTPUT")]


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
