"""Every block of pipeline/README.md is run as it stands there; the tools under one question give the same answer."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shutil
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.compact import run_compact
from make_data import image_bytes
from pipeline import storage
from pipeline.delta_table import register
from small_run import tokenize_all, write_captioned

README = Path(__file__).parents[1] / "pipeline" / "README.md"
BLOCK = re.compile(r"```python\n# (?P<tool>[^\n]+)\n(?P<code>.*?)```", re.DOTALL)
CAPTIONS: list[list[str | None]] = [
    ["A cat on a sofa", "two dogs", None, "Cats asleep", "a street\nat night"],
    ["", "a catalogue", "<b>cat</b>\x07", "a lake", None, "dog & CAT", "fog"],
    ["nothing at all"],
    ["the same key again"],
]
FIRST = [0, 5, 12, 3]  # number of a shard's first key
Rows = list[tuple[Any, ...]]


def blocks() -> list[Any]:
    """(question, tool, code) of each block, with the marks that its tool asks for."""
    found = []
    for section in README.read_text().split("\n## ")[1:]:
        question = section.splitlines()[0]
        for block in BLOCK.finditer(section):
            tool = block["tool"].partition(":")[0]
            found.append(pytest.param(tool, block["code"], id=f"{question} {tool}", marks=marks_of(tool)))
    return found


def marks_of(tool: str) -> list[pytest.MarkDecorator]:
    if tool.startswith("Spark"):
        lacks = "PySpark" if importlib.util.find_spec("pyspark") is None else "" if shutil.which("java") else "Java"
        return [pytest.mark.spark, pytest.mark.slow, pytest.mark.skipif(bool(lacks), reason=f"{lacks} is not here")]
    if tool.startswith("Ray Data"):
        return [pytest.mark.ray, pytest.mark.slow]  # it takes its time
    return [pytest.mark.server] if "S3" in tool else []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """my-run and other-run, of two tokenizers over the same four shards, and scores.csv."""
    folder = tmp_path_factory.mktemp("recipes")
    for number, (first, captions) in enumerate(zip(FIRST, CAPTIONS, strict=True)):
        write_captioned(f"{folder}/shards/photos-{number}.tar", first, captions)
    tokenize_all(f"{folder}/shards", f"{folder}/my-run", side=2)
    tokenize_all(f"{folder}/shards", f"{folder}/other-run", side=4)
    register(f"{folder}/my-run")
    assert run_compact(f"{folder}/my-run", f"{folder}/compacted", target_bytes=1 << 30, as_json=True) == 0
    scores = "\n".join(f"img{n:05d},{n / 10}" for n in range(13))
    (folder / "scores.csv").write_text(f"key,score\n{scores}\nnot-mine,0.9\n")
    return folder


@pytest.fixture(scope="module")
def on_s3(folder: Path, s3: str) -> str:
    for path in (folder / "my-run").rglob("*.parquet"):
        storage.publish(f"{s3}/{path.relative_to(folder)}", path.read_bytes())
    return s3


@pytest.fixture
def rows(folder: Path) -> list[dict[str, Any]]:
    """Of my-run, in the order of shards, read one by one."""
    files = sorted((folder / "my-run" / "tokens").iterdir())
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def most_used(rows: list[dict[str, Any]]) -> Rows:
    uses = Counter(token for row in rows for token in row["tokens"])
    return sorted(uses.items(), key=lambda item: (-item[1], item[0]))[:5]


def found(rows: list[dict[str, Any]]) -> Rows:
    wanted = {"img00000", "img00003", "img00007", "img00010"}
    return [(row["key"], row["caption"]) for row in rows if row["key"] in wanted and "again" not in row["caption"]]


def nearest(rows: list[dict[str, Any]]) -> Rows:
    (this,) = (row for row in rows if row["key"] == "img00003" and row["shard"].endswith("photos-0.tar"))
    codes = set(this["tokens"])
    shared = [(row["key"], len(codes & set(row["tokens"]))) for row in rows if row is not this]
    return sorted(shared, key=lambda item: (-item[1], item[0]))[:5]


def drift(rows: list[dict[str, Any]]) -> Rows:
    def shares(shard: str | None) -> np.ndarray:
        tokens = [row["tokens"] for row in rows if shard in (None, row["shard"])]
        return np.bincount(np.ravel(tokens), minlength=16) / np.size(tokens)

    shards = {row["shard"] for row in rows}
    distances = [(shard, pytest.approx(np.abs(shares(shard) - shares(None)).sum() / 2)) for shard in shards]
    return sorted(distances, key=lambda item: -item[1].expected)


def joined(rows: list[dict[str, Any]]) -> Rows:
    scored = [(row["key"], int(row["key"][3:]) / 10, row["tokens"][0]) for row in rows]
    return sorted((row for row in scored if row[1] > 0.5), key=lambda row: -row[1])


def failed(rows: list[dict[str, Any]]) -> Rows:
    return [("img00002", "not_an_image"), ("img00009", "not_an_image")]


def both(rows: list[dict[str, Any]]) -> Rows:
    return [(row["key"], 4, 16) for row in rows]


def place(rows: list[dict[str, Any]]) -> Rows:
    sizes = [sum(caption is not None for caption in captions) for captions in CAPTIONS]
    shards = sorted({row["shard"] for row in rows})
    failed = [len(captions) - size for captions, size in zip(CAPTIONS, sizes, strict=True)]
    return list(zip(shards, accumulate([0, *sizes[:-1]]), sizes, failed, strict=True))


def in_shard(rows: list[dict[str, Any]]) -> Rows:
    return [(row["shard"], row["index"], row["key"]) for row in rows if "photos-1" in row["shard"]]


def trained_on(rows: list[dict[str, Any]]) -> Rows:
    return sorted(row["key"] for row in rows)


def dogs(rows: list[dict[str, Any]]) -> Rows:
    return [("img00001", "two dogs")]


ANSWERS = {
    answer.__name__: answer
    for answer in (most_used, found, nearest, drift, joined, failed, both, trained_on, place, in_shard, dogs)
}


def plain(answer: Any) -> Rows:
    """Rows as tuples of Python's own values, whatever tool they come from."""
    if hasattr(answer, "fetchall"):  # DuckDB
        return list(answer.fetchall())
    if hasattr(answer, "iter_rows"):  # Polars
        return list(answer.iter_rows())
    if hasattr(answer, "itertuples"):  # pandas
        return [tuple(row) for row in answer.itertuples(index=False)]
    if hasattr(answer, "collect"):  # Spark
        return [tuple(row) for row in answer.collect()]
    rows = answer.to_pylist() if hasattr(answer, "to_pylist") else answer
    return [tuple(row.values()) if isinstance(row, dict) else row for row in rows]


@pytest.mark.parametrize(("tool", "code"), blocks())
def test_each_tool_gives_the_right_answer(
    tool: str, code: str, folder: Path, rows: list[dict[str, Any]], request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HOME", str(folder / "huggingface"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for word, fixture in (("Ray", "ray_cluster"), ("S3", "on_s3")):
        if word in tool:
            request.getfixturevalue(fixture)
    said: dict[str, Any] = {}
    with contextlib.chdir(folder):
        exec(code.replace("s3://tokens", "s3://test-bucket"), said)
        if "image" in said:
            assert np.array_equal(np.asarray(said["image"]), np.asarray(Image.open(io.BytesIO(image_bytes(3)))))
        else:
            (name,) = ANSWERS.keys() & said.keys()
            answer = sorted(said[name]) if name == "trained_on" else plain(said[name])  # shuffled
            assert answer == ANSWERS[name](rows)


def test_every_block_names_its_tool_and_every_tool_answers_the_first_two_questions() -> None:
    text = README.read_text()
    assert len(blocks()) == text.count("```") / 2
    tools = {"DuckDB", "Polars", "pandas", "PyArrow", "Hugging Face datasets", "Ray Data", "Spark"}
    first, second = (
        {block["tool"].split(":")[0] for block in BLOCK.finditer(section)} for section in text.split("\n## ")[1:3]
    )
    assert (first, second) == (tools | {"DuckDB on S3", "PyArrow on S3"}, tools)
