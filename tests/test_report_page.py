"""The page: hostile text stays text, nothing is fetched, charts survive odd numbers."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from markupsafe import Markup

from jobs.report_charts import Series, bar_chart, grid_map, line_chart
from jobs.report_page import Chart, Check, Figure, Report, Snippet, Table, TilePair, render
from jobs.report_pieces import code_use_chart
from pipeline.pictures import encode_png

HOSTILE = "\"'><script>alert(1)</script><img src=https://evil.example/x onerror=alert(2)> & {{ 7*7 }} é 猫"


def page_of(text: str) -> Report:
    """Every piece of text on the page is `text`."""
    png = encode_png(np.zeros((4, 8, 3), np.uint8))
    chart = line_chart([Series(text, ((0, 1), (1, 2)))], x_label=text, y_label=text)
    bars = bar_chart([1.0, 2.0], [text, text], x_label=text, y_label=text)
    return Report(
        title=text,
        subtitle=text,
        figures=(Figure(text, text),),
        checks=(Check(text, True, text), Check(text, False, text)),
        tiles=(TilePair(png, text, text),),
        tiles_note=text,
        charts=(Chart(chart, text), Chart(bars, text)),
        tables=(Table(text, (text,), ((text,),), note=text, sql=text, numbers=frozenset({0})),),
        snippets=(Snippet(text, text),),
        reading_note=text,
    )


class Parsed(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_hostile_text_stays_text() -> None:
    parsed = Parsed(render(page_of(HOSTILE)))
    assert "script" not in parsed.tags
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert parsed.tags.count("img") == 1  # the tile
    assert parsed.text.count(HOSTILE) >= 15
    assert "49" not in parsed.text


def test_nothing_is_fetched_from_anywhere() -> None:
    page = render(page_of("plain"))
    parsed = Parsed(page)
    targets = [value for name, value in parsed.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert targets and all(value.startswith(("data:image/png;base64,", "#")) for value in targets)
    assert not {"script", "link", "iframe", "object", "form", "base"} & set(parsed.tags)
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None and "url(" not in style[1] and "@import" not in style[1]
    assert "http://" not in page and "https://" not in page


def test_light_and_dark_and_small_screens_are_provided_for() -> None:
    page = render(page_of("plain"))
    assert "prefers-color-scheme: dark" in page
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page


def test_the_verdict_counts_failed_checks() -> None:
    assert "1 of 2 checks failed" in render(page_of("plain"))


@pytest.mark.parametrize(
    "points",
    [(), ((0, 1),), ((0, float("nan")), (1, 3)), ((0, 5), (1, 5)), ((0, -3), (1000, 1e9)), ((1, 1e-9), (2, 2e-9))],
)
def test_a_line_chart_of_odd_numbers_is_whole_and_stays_inside(points: Any) -> None:
    svg = line_chart([Series("s", points)], x_label="x", y_label="y")
    root = ElementTree.fromstring(svg)
    if not points:
        assert root.text == "Nothing was measured."
        return
    line = next(one for one in root if one.tag == "polyline")
    places = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert all(0 <= x <= 440 and 0 <= y <= 240 for x, y in places)


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [5.0], list(range(256))])
def test_a_bar_chart_has_a_bar_for_each_value(values: list[float]) -> None:
    root = ElementTree.fromstring(bar_chart(values, ["t"] * len(values), x_label="x", y_label="y"))
    bars = [one for one in root if one.tag == "rect"]
    assert len(bars) == len(values)
    assert all(0 <= float(bar.attrib["height"]) <= 240 for bar in bars)


def test_chart_markup_is_not_escaped_twice() -> None:
    assert isinstance(bar_chart([1.0], ["<b>"], x_label="x", y_label="y"), Markup)
    assert "<svg" in render(page_of("plain"))


@pytest.mark.parametrize("values", [[[3.0]], [[0.0, 1.0], [2.0, 3.0]], [[5.0] * 7] * 3])
def test_a_map_has_a_square_for_each_place_of_the_grid(values: list[list[float]]) -> None:
    root = ElementTree.fromstring(grid_map(values, label="<b>"))
    squares = [one for one in root if one.tag == "rect" and len(one)]
    assert len(squares) == len(values) * len(values[0])
    assert squares[-1][0].text == f"row {len(values) - 1}, column {len(values[0]) - 1}: {values[-1][-1]:g}"
    for square in squares:
        x, y, side = (float(square.attrib[name]) for name in ("x", "y", "width"))
        assert x >= 0 and x + side <= 440 and y >= 0 and y + side <= 240


def test_many_codes_share_bars_and_none_is_left_out() -> None:
    uses_K = np.arange(8192) % 1000
    chart = code_use_chart(uses_K, "here")
    root = ElementTree.fromstring(chart.svg)
    titles = [one[0].text or "" for one in root if one.tag == "rect"]
    assert len(titles) == 256 and titles[0].startswith("32 codes, as token 999: ")
    assert "8,192 codes is used here; 8,183 are used" in chart.caption
    assert "Each bar is the mean of 32 codes. Code 999 is used most: 999 times." in chart.caption
    assert "mean" not in code_use_chart(np.array([1, 7, 2]), "here").caption


def test_each_bar_has_its_own_limit_and_is_told_from_those_below_theirs() -> None:
    chart = bar_chart([3.0, 2.0, 1.0], ["a", "b", "c"], x_label="x", y_label="y", limits=[2.5, 4.0, 50.0])
    root = ElementTree.fromstring(chart)
    bars = [one for one in root if one.tag == "rect"]
    limits = [one for one in root if one.attrib.get("class") == "limit"]
    assert [bar.attrib["class"] for bar in bars] == ["bar odd", "bar", "bar"]
    assert len(limits) == 2  # the last is far above all
    assert float(limits[0].attrib["y1"]) > float(bars[0].attrib["y"])
    assert float(limits[1].attrib["y1"]) < float(bars[1].attrib["y"])


def test_a_check_in_doubt_is_neither_passed_nor_failed() -> None:
    checks = (Check("a", True, ""), Check("b", None, ""), Check("c", None, "", otherwise="look at"))
    page = render(Report("title", "subtitle", (), checks, (), "", (), (), ()))
    assert "1 of 3 checks passed, none failed" in page and ">not told<" in page and ">look at<" in page


def test_sections_without_anything_in_them_are_left_out() -> None:
    page = render(Report("title", "subtitle", (), (), (), "", (), (), ()))
    assert "<section" not in page and "checks passed" not in page
