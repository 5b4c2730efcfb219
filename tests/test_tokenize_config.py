"""The settings of a run as they are kept beside it: whole, and without anybody's secrets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.config import ConfigError, check
from jobs.tokenize_config import TokenizeConfig

VALUES = {
    "checkpoint": "s3://models/dvae",
    "shards": ["s3://images/{000..009}.tar", "/local/*.tar"],
    "output": "s3://tokens/run",
    "metadata": {"caption": {"from": "txt"}, "score": {"from": "json.similarity", "type": "float32"}},
    "batch_size": 8,
    "ray": {"num_actors": 3},
}


def test_stored_settings_are_plain_json_and_read_as_the_same_settings() -> None:
    config = check(TokenizeConfig, VALUES, "test")
    stored = json.loads(json.dumps(config.public_settings()))
    assert check(TokenizeConfig, stored, "plan.json") == config
    assert check(TokenizeConfig, stored, "plan.json").public_settings() == config.public_settings()


def test_they_mean_the_same_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stored = check(TokenizeConfig, {**VALUES, "checkpoint": "runs/dvae", "output": "out"}, "test").public_settings()
    assert (stored["checkpoint"], stored["output"]) == (str(tmp_path / "runs/dvae"), str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("checkpoint", "s3://key:SECRET@models/dvae"),
        ("output", "ftp://me:SECRET@host/out"),
        ("shards", "https://me:SECRET@host/a-{0..3}.tar?sig=SECRET&x=1#SECRET"),
        ("shards", ["/local/a.tar", "s3://k:SECRET@images/*.tar"]),
        ("shards", "{s3://k:SECRET@one/a,https://m:SECRET@two/b}.tar"),
        ("shards", "{https://h/a.tar?sig=SECRET,https://h/b.tar?sig=SECRET}"),
        ("ray", {"address": "ray://me:SECRET@head:10001"}),
    ],
)
def test_no_credentials_and_no_query_strings_are_stored(field: str, value: object) -> None:
    stored = json.dumps(check(TokenizeConfig, {**VALUES, field: value}, "test").public_settings())
    assert "SECRET" not in stored
    assert "://" in json.dumps(json.loads(stored)[field])


def test_fp16_without_a_gpu_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="fp16 needs GPUs"):
        check(TokenizeConfig, {**VALUES, "precision": "fp16"}, "test")
    config = check(TokenizeConfig, {**VALUES, "precision": "fp16", "ray": {"gpus_per_actor": 1}}, "test")
    assert (config.precision, config.compile) == ("fp16", False)
