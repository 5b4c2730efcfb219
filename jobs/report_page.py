"""One self-contained HTML page from plain values: everything escaped, pictures inlined, nothing fetched."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipeline.errors import PipelineError

TEMPLATE = "report_page.html"


@dataclass(frozen=True)
class Check:
    """Something that must hold, and what was found. `passed` is None where neither is said: then `otherwise` is."""

    claim: str
    passed: bool | None
    found: str
    otherwise: str = "not told"

    @property
    def verdict(self) -> str:
        return self.otherwise if self.passed is None else "passed" if self.passed else "FAILED"

    @property
    def colour(self) -> str:
        """Class of its word on the page."""
        return "doubt" if self.passed is None else "good" if self.passed else "bad"


@dataclass(frozen=True)
class Figure:
    value: str
    label: str


@dataclass(frozen=True)
class TilePair:
    png: bytes  # original and reconstruction side by side
    caption: str
    note: str = ""


@dataclass(frozen=True)
class Chart:
    svg: Markup
    caption: str


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]  # none: each row is a name and what it stands for
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""
    sql: str = ""
    numbers: frozenset[int] = frozenset()  # columns set flush right


@dataclass(frozen=True)
class Snippet:
    name: str
    code: str


@dataclass(frozen=True)
class Report:
    """A page. A section that has nothing in it is left out, and so is the verdict where there are no checks."""

    title: str
    subtitle: str
    figures: tuple[Figure, ...]
    checks: tuple[Check, ...]
    tiles: tuple[TilePair, ...]
    tiles_note: str
    charts: tuple[Chart, ...]
    tables: tuple[Table, ...]
    snippets: tuple[Snippet, ...]
    reading_note: str = ""
    tiles_title: str = ""
    charts_title: str = ""

    @property
    def failed(self) -> int:
        return sum(check.passed is False for check in self.checks)

    @property
    def in_doubt(self) -> int:
        return sum(check.passed is None for check in self.checks)


def render(report: Report) -> str:
    """The page as HTML text."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise PipelineError("the report page needs jinja2: pip install 'dvae-ray[report]'") from error

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["b64"] = lambda data: base64.b64encode(data).decode("ascii")
    template = environment.from_string(Path(__file__).with_name(TEMPLATE).read_text(encoding="utf-8"))
    values = {name: getattr(report, name) for name in report.__dataclass_fields__}
    return template.render(values, failed=report.failed, in_doubt=report.in_doubt)
