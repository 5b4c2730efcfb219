"""`dvae report`: the page says what is so, shows what is asked for, and can be opened anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from browser import browser, find_chromium
from jobs import report_lineage, run_report, show
from jobs.checkpoints import CheckpointHead, TokenizerSource
from jobs.report_pace import pace
from make_data import fake_table
from make_tokens_run import TokensRun, damage_tokens, zipf_tokens
from pipeline import storage
from pipeline.errors import NoRun, PipelineError, RunMismatch
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.metadata import MetadataColumn
from pipeline.output import OutputPrefix, RunDescription, claim
from pipeline.pack import pack
from pipeline.pictures import decode_png, encode_png
from pipeline.plan import PlanRecord, make_plan, record_plan
from pipeline.records import FailureReason, SampleFailure, Stage
from pipeline.shard_patterns import expand
from pipeline.token_run import TokenRun
from pipeline.token_table import TableSpec
from pipeline.tokenize_shard import TokenizeJob, TokenizeWorker
from test_report_page import Parsed
from test_show import SPEC, QuarterColours

HOSTILE = (
    "\"'><script>alert(1)</script><img src=https://evil.example/x onerror=alert(2)>{{ 7*7 }}\x1b[2J\u202e" + "w" * 5000
)
BUDGET = {"max_failed_samples": 0.05}
TABLE = TableSpec("fake-1", (2, 2), 32, SPEC.to_json(), (MetadataColumn("caption", "txt", "string"),))


@pytest.fixture
def output(tmp_path: Path) -> str:
    """A run over thirty plain squares in shards of five, one file that is no image, and captions that mean harm."""
    (tmp_path / "in").mkdir()
    for n in range(30):
        (tmp_path / "in" / f"{n:02d}.png").write_bytes(encode_png(np.full((16, 16, 3), (8 * n, 90, 90), np.uint8)))
        (tmp_path / "in" / f"{n:02d}.txt").write_text(HOSTILE if n % 2 else f"square {n}")
    (tmp_path / "in" / "99 <script>.png").write_text("no image")
    summary = pack(tmp_path / "in", str(tmp_path / "shards"), shard_samples=5)
    out = OutputPrefix(str(tmp_path / "out"))
    claim(out, RunDescription(TABLE, {}, {"device": "cpu"}), accept_numerics=False)
    plan = make_plan(expand(summary.shard_urls), out, Ledger(out), TABLE)
    record_plan(out, plan, {"shards": list(summary.shard_urls), "checkpoint": "/models/<b>dvae</b>", **BUDGET})
    worker = TokenizeWorker(QuarterColours(), TokenizeJob(out, TABLE, batch_size=2, decode_threads=1))
    Ledger(out).append([worker.tokenize(task) for task in plan.todo])
    worker.close()
    storage.publish(out.file("manifest.json"), b"{}")
    return out.url


@pytest.fixture(autouse=True)
def checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    def head(url: str) -> CheckpointHead:
        return CheckpointHead(url, url.rpartition(":")[2], (2, 2), 32, SPEC.to_json(), 1)

    monkeypatch.setattr(show, "read_head", head)
    monkeypatch.setattr(TokenizerSource, "load", lambda self: QuarterColours())


def page_of(
    output: str, tmp_path: Path, checkpoint: str | None = "checkpoint:fake-1", code: int = 0, **more: Any
) -> str:
    page = tmp_path / "page.html"
    assert run_report.run_report(output, checkpoint, str(page), **more) == code
    return page.read_text()


def test_the_page_says_what_there_is_and_harmful_text_stays_text(output: str, tmp_path: Path) -> None:
    page = page_of(output, tmp_path)
    parsed = Parsed(page)
    assert "4 of 5 checks passed, none failed" in parsed.text
    assert "1 failed, 3.23% of all; max_failed_samples allows 5.00%" in parsed.text
    assert "too few images to tell in 6 of 7 shards" in parsed.text
    for said in (
        "images tokenised, in 7 parts",
        "7 of 7",
        "not_an_image",
        "tokenizer fake-1",
        "device cpu",
        "square 2",
    ):
        assert said in parsed.text, said
    assert "<script>alert(1)</script>" in parsed.text and "99 <script>" in parsed.text
    assert not {"script", "link", "iframe", "object", "form", "base"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    targets = [value for name, value in parsed.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in targets)
    assert "\x1b" not in page and "\u202e" not in page and "w" * 400 not in page


def test_pictures_come_from_all_over_the_run_beside_what_their_tokens_say(output: str, tmp_path: Path) -> None:
    opened, decoder = TokenRun.open(output), QuarterColours()
    both = run_report.look_at(opened, decoder, 6)
    assert [tile.caption for tile in both.tiles[::2]] == ["square 2", "square 12", "square 22"]
    assert all(tile.caption.startswith(HOSTILE[:20]) and len(tile.caption) == 80 for tile in both.tiles[1::2])
    assert len(both.tiles) == 6 and all(tile.note.endswith(" dB") for tile in both.tiles) and both.problems == ()
    alone = run_report.look_at(opened, None, 100)
    assert len(alone.tiles) == 30 and {tile.note for tile in alone.tiles} == {""}
    assert run_report.look_at(opened, decoder, 0).tiles == ()


def test_originals_that_are_gone_are_said_so_and_tokens_are_shown_alone(output: str, tmp_path: Path) -> None:
    for shard in (tmp_path / "shards").glob("*.tar"):
        shard.unlink()
    assert "from tokens alone" in page_of(output, tmp_path) and "Not shown: " in page_of(output, tmp_path)
    page = page_of(output, tmp_path, None)
    assert "<img" not in page and "Not shown: " in page


def test_large_pictures_are_shrunk_to_what_a_page_can_hold(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_report, "TILE_SIDE", 8)
    both = run_report.look_at(TokenRun.open(output), QuarterColours(), 2)
    alone = run_report.look_at(TokenRun.open(output), None, 2)
    assert {decode_png(tile.png).shape for tile in both.tiles} == {(8, 18, 3)}
    assert {decode_png(tile.png).shape for tile in alone.tiles} == {(8, 8, 3)}


def test_a_place_where_no_page_can_be_is_told_before_anything_is_read(output: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place, why in ((tmp_path, "is a folder"), (tmp_path / "file" / "page.html", "file is a file")):
        with pytest.raises(PipelineError, match=why):
            run_report.run_report(str(tmp_path / "no run"), None, str(place))
    assert page_of(output, tmp_path / "folders" / "yet to be")


def test_another_model_is_refused_and_nothing_is_written(output: str, tmp_path: Path) -> None:
    with pytest.raises(RunMismatch, match="fake-1, but checkpoint:fake-2 is fake-2"):
        run_report.run_report(output, "checkpoint:fake-2", str(tmp_path / "page.html"))
    assert not (tmp_path / "page.html").exists()
    with pytest.raises(NoRun):
        run_report.run_report(str(tmp_path / "nothing"), None, str(tmp_path / "page.html"))


def test_a_damaged_part_fails_a_check_and_the_rest_is_shown(output: str, tmp_path: Path) -> None:
    damage_tokens(TokenRun.open(output).parts[0].url)
    page = page_of(output, tmp_path, code=1)
    assert "1 of 5 checks failed" in page and page.count("<img") > 5


def test_of_a_damaged_column_that_is_not_counted_no_more_is_claimed_than_was_read(output: str, tmp_path: Path) -> None:
    damage_tokens(TokenRun.open(output).parts[0].url, "key")
    page = page_of(output, tmp_path)
    assert "every page of tokens was read; dvae verify reads the rest" in page
    assert "Not shown: " in page and "is damaged" in page


@pytest.mark.parametrize("what", ["budget", "errors"])
def test_a_run_over_its_budget_or_without_its_errors_files_fails_a_check(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "budget":
        monkeypatch.setattr(run_report, "_allowed", lambda plan: 0.03)
    else:
        for errors in storage.list_files(OutputPrefix(output).errors_folder()):
            Path(errors.url).unlink()
    page = page_of(output, tmp_path, code=int(what == "errors"))
    assert page.count("FAILED") == 1 and "1 of 5 checks failed" in page
    assert "1 failed, 3.23% of all" in page


def test_where_nobody_knows_the_budget_or_there_is_one_shard_nothing_is_claimed(tmp_path: Path) -> None:
    made = TokensRun(str(tmp_path / "out"), fake_table(grid=(2, 2), codebook_size=32))
    bad = [SampleFailure("k", 1, 0, 9, Stage.DECODE, FailureReason.TOO_SMALL, "8x8")]
    made.add("/in/0.tar", zipf_tokens(200, made.table, 0), bad)
    storage.publish(made.output.file("manifest.json"), b"{}")
    page = page_of(made.output.url, tmp_path, None)
    assert "3 of 5 checks passed, none failed" in page and page.count(">not told<") == 2
    made.add("/in/1.tar", zipf_tokens(200, made.table, 1, shuffled=4))
    page = page_of(made.output.url, tmp_path, None)
    assert page.count(">not told<") == 2 and "which of them is odd cannot be told" in page


def test_a_run_that_has_just_begun_and_one_that_stopped_are_told_apart(tmp_path: Path) -> None:
    made = TokensRun(str(tmp_path / "out"), fake_table(grid=(2, 2), codebook_size=32))
    with Lease(made.output):
        assert "A driver is at work" in page_of(made.output.url, tmp_path, None)
    made.add("/in/0.tar", zipf_tokens(3, made.table, 0))
    page = page_of(made.output.url, tmp_path, None)
    assert "Not complete, and nobody at work" in page and "1 of 5 checks failed" in page


def test_shards_that_stand_out_are_in_the_table(tmp_path: Path) -> None:
    made = TokensRun(str(tmp_path / "out"), fake_table(grid=(8, 8), codebook_size=300))
    for number in range(6):
        made.add(f"/in/{number}.tar", zipf_tokens(100, made.table, number, shuffled=9 if number == 4 else None))
    page = page_of(made.output.url, tmp_path, None)
    assert "Shards that stand out in their use of the codes" in page and ">/in/4.tar</td>" in page
    assert ">look at<" in page and "FAILED</td><td>No shard stands out" not in page
    assert page.count('class="bar odd"') == 1 and page.count('class="limit"') >= 1


def test_what_is_known_of_the_model_is_told_or_why_it_is_not(output: str) -> None:
    run = dict(TokenRun.open(output).description)
    plan = PlanRecord(7, 0, 0, 0, 0.0, settings={"shards": ["/in/*.tar"]})
    rows = list(report_lineage.lineage(run, plan, "/nowhere"))
    assert ("Tokens", "2 × 2 of 32 codes, row by row") in rows and ("Columns", "caption from txt (string)") in rows
    assert ("Shards", "/in/*.tar (7 when the last driver began)") in rows
    assert rows[-1][1].startswith("cannot be read from here: no checkpoint at /nowhere")
    assert dict(report_lineage.lineage(run, None, None))["Tokenizer"] == "fake-1"


def test_no_credentials_stand_on_the_page(output: str, tmp_path: Path) -> None:
    page = page_of(output, tmp_path, "memory://key:SECRET@models:fake-1")
    assert "memory://models:fake-1" in page and "SECRET" not in page


def test_pace_is_images_over_the_time_in_which_parts_were_written() -> None:
    times = {f"{n}": 1000.0 + 10 * n for n in range(100)}
    found = pace(dict.fromkeys(times, 50), times)
    assert found is not None and found.unit == "minutes" and found.length == pytest.approx(990 / 60)
    assert sum(found.images_per_s) * 990 / len(found.images_per_s) == pytest.approx(99 * 50)
    assert np.median(found.images_per_s) == pytest.approx(5.0, rel=0.15)
    assert pace(dict.fromkeys(times, 50), dict.fromkeys(times, 1.0)) is None
    assert pace(dict.fromkeys(times, 50), {}) is None


@pytest.mark.parametrize("num_parts", [1, 2, 5, 11, 12, 13])
def test_of_few_parts_there_is_no_pace_and_then_never_far_from_the_truth(num_parts: int) -> None:
    times = {f"{n}": 100.0 * n for n in range(num_parts)}
    found = pace(dict.fromkeys(times, 50), times)
    if num_parts < 12:
        assert found is None
    else:
        assert found is not None and all(0.35 < per_s < 0.65 for per_s in found.images_per_s)


needs_browser = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium is installed: the page is not looked at in a browser"
)


@needs_browser
def test_a_browser_tells_of_what_a_page_must_not_do(tmp_path: Path) -> None:
    """So that the next test can fail."""
    page = tmp_path / "bad.html"
    page.write_text(
        '<meta name="viewport" content="width=device-width"><div style="width:900px">wide</div>'
        '<script>console.error("no"); nothing()</script><img src="http://127.0.0.1:9/x.png">'
    )
    with browser(tmp_path / "profile") as one:
        look = one.look(page.as_uri(), width=360, dark=False)
    assert look.requests == ["http://127.0.0.1:9/x.png"]
    assert len(look.console) >= 2
    assert look.page_px > 360


@needs_browser
def test_in_a_real_browser_nothing_is_asked_for_or_complained_of_and_a_phone_need_not_scroll_sideways(
    output: str, tmp_path: Path
) -> None:
    page_of(output, tmp_path)
    with browser(tmp_path / "profile") as one:
        url = (tmp_path / "page.html").as_uri()
        looks = {(width, dark): one.look(url, width=width, dark=dark) for width in (360, 1100) for dark in (0, 1)}
        paper = one.evaluate("getComputedStyle(document.body).backgroundColor")
        one.look(url, width=360, dark=False)
        assert one.evaluate("getComputedStyle(document.body).backgroundColor") != paper
        assert (
            one.evaluate("[...document.images].every(image => image.naturalWidth > 0) && document.images.length") == 12
        )
    for (width, _), look in looks.items():
        assert (look.console, look.requests, look.page_px, look.window_px) == ([], [], width, width)
    assert looks[360, 0].png != looks[360, 1].png


@pytest.mark.server
def test_a_run_in_a_bucket_has_its_page_there_too(s3: str) -> None:
    made = TokensRun(f"{s3}/report-out", fake_table(grid=(2, 2), codebook_size=32))
    for number in range(3):
        bad = [SampleFailure("k", 1, 0, 9, Stage.DECODE, FailureReason.TOO_SMALL, "8x8")] if number else []
        made.add(f"{s3}/in/{number}.tar", zipf_tokens(20, made.table, number), bad)
    assert len(storage.written_at(made.output.tokens_folder())) == 3
    assert run_report.run_report(made.output.url, None, f"{s3}/pages/report.html") == 0
    page = storage.read_bytes(f"{s3}/pages/report.html").decode()
    assert "too_small" in page and "60" in page
