"""`dvae register`: what is committed of a run, as a version of a Delta Lake table."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape

from jobs.wording import counted
from pipeline.delta_table import Registered, register

MAX_SHOWN = 5


def run_register(output_url: str, *, as_json: bool) -> int:
    """0, or 1 where parts are missing that the ledger knows: the table has the others. Raises PipelineError."""
    registered = register(output_url)
    console = Console(soft_wrap=True, highlight=False)
    if as_json:
        console.print_json(json.dumps(asdict(registered)))
    else:
        _print(registered, console)
    return 1 if registered.missing else 0


def _print(registered: Registered, console: Console) -> None:
    changes = f"{counted(registered.num_added, 'part')} new, {registered.num_removed:,} gone"
    is_new = registered.num_added or registered.num_removed
    for name, value in (
        ("table", registered.url),
        ("version", f"{registered.version} ({changes if is_new else 'nothing has changed since'})"),
        ("parts", f"{registered.num_parts:,}"),
        ("rows", f"{registered.num_rows:,}"),
    ):
        console.print(f"{name:<12}{escape(value)}")
    if registered.missing:
        named = ", ".join(registered.missing[:MAX_SHOWN])
        how_many = counted(len(registered.missing), "part")
        console.print(f"missing     {how_many} ({escape(named)}): dvae verify says more")
