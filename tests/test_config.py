"""Configuration: every problem at once, each with field, value and rule, and never a traceback."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.config import ConfigError, Section, check, load_config
from jobs.tokenize_config import TokenizeConfig
from pipeline.errors import PipelineError

MINIMAL = "checkpoint: c\nshards: s.tar\noutput: o\n"
CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokenize.yaml"


def load(file: Path, text: str, *overrides: str) -> TokenizeConfig:
    file.write_text(text)
    return load_config(TokenizeConfig, str(file), overrides)


def said(file: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as raised:
        load(file, text, *overrides)
    assert raised.value.exit_code == 2
    return str(raised.value)


# What is read


def test_defaults_file_and_overrides_are_laid_over_each_other(file: Path) -> None:
    config = load(file, MINIMAL + "ray: {num_actors: 2, wait_s: 5}\n", "ray.num_actors=7", "batch_size=8")
    assert (config.ray.num_actors, config.ray.wait_s, config.ray.shards_in_flight, config.batch_size) == (7, 5, None, 8)
    assert config.shards == ["s.tar"]


def test_settings_may_come_from_the_command_line_alone() -> None:
    config = load_config(TokenizeConfig, None, ["checkpoint=c", "shards=[a.tar,b.tar]", "output=o"])
    assert config.shards == ["a.tar", "b.tar"]
    with pytest.raises(ConfigError, match="the command line"):
        load_config(TokenizeConfig, None, ["checkpoint=c"])


def test_values_with_equals_signs_and_colons_stay_whole(file: Path) -> None:
    url = "https://host:80/a.tar?sig=a=b&x=1"
    assert load(file, MINIMAL, f"shards={url}").shards == [url]


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "1.0e-4", ".0001", "0.0001", "1e-04"])
def test_numbers_are_numbers_however_they_are_spelled(file: Path, number: str) -> None:
    assert isinstance(yaml.safe_load("1e-4"), str)  # PyYAML's own reading
    assert load(file, f"{MINIMAL}max_failed_samples: {number}\n").max_failed_samples == 1e-4
    assert load(file, MINIMAL, f"max_failed_samples={number}").max_failed_samples == 1e-4


def test_braces_are_patterns_where_yaml_lets_them_stand_and_said_to_need_quotes_where_not(file: Path) -> None:
    head = "checkpoint: c\noutput: o\n"
    for text in (
        "shards: s-{000..999}.tar",
        "shards:\n  - s-{000..999}.tar",
        "shards: ['s-{000..999}.tar']",
        'shards: ["s-{000..999}.tar"]',
    ):
        assert load(file, head + text).shards == ["s-{000..999}.tar"]
    assert "a value with {…} inside […]" in said(file, head + "shards: [s-{0..9}.tar]")
    assert "that begins with {" in said(file, head + "shards: {a,b}.tar")
    assert load(file, MINIMAL, "shards=s-{0..9}.tar").shards == ["s-{0..9}.tar"]
    message = said(file, MINIMAL, "shards=[s-{0..9}.tar]")
    assert message.startswith("'shards=[s-{0..9}.tar]' is no valid YAML") and "needs quotes" in message
    assert load(file, MINIMAL, "shards=['s-{0..9}.tar','t.tar']").shards == ["s-{0..9}.tar", "t.tar"]


def test_the_environment_and_other_keys_can_be_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVAE_TEST_BUCKET", "s3://mine")
    text = "checkpoint: ${oc.env:DVAE_TEST_BUCKET}/dvae\nshards: ${checkpoint}/*.tar\n"
    config = load(file, text + "output: ${oc.env:NO_SUCH_NAME,fallback}\n")
    assert (config.checkpoint, config.shards, config.output) == ("s3://mine/dvae", ["s3://mine/dvae/*.tar"], "fallback")
    assert "NO_SUCH_NAME" in said(file, MINIMAL + "precision: ${oc.env:NO_SUCH_NAME}\n")
    assert "nowhere" in said(file, MINIMAL + "precision: ${nowhere}\n")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("tokenize*.yaml")), ids=lambda path: path.name)
def test_every_shipped_file_loads_and_names_every_key(path: Path) -> None:
    config = load_config(TokenizeConfig, str(path))
    text = path.read_text()
    for kind in (TokenizeConfig, type(config.ray)):
        for name in kind.model_fields:
            assert re.search(rf"^\s*(# )?{name}:", text, re.MULTILINE), f"{name} is missing in {path.name}"


def test_the_shipped_files_defaults_are_the_codes_own() -> None:
    config = load_config(TokenizeConfig, str(CONFIGS / "tokenize.yaml"))
    bare = TokenizeConfig(
        checkpoint=config.checkpoint, shards=config.shards, output=config.output, metadata=config.metadata
    )
    assert config == bare


# What is refused


def test_every_problem_is_reported_at_once_with_field_value_and_rule(file: Path) -> None:
    message = said(
        file,
        "shards: s\noutput: o\nbatchsize: 3\nprecision: int8\nmax_failed_samples: 2\nray: {num_actor: 3}\n",
        "attempts=0",
        "ray.wait_s=soon",
    )
    assert message.startswith(f"{file}: ")
    for problem in (
        "checkpoint: is missing",
        "batchsize: unknown key; did you mean batch_size?",
        "precision: Input should be 'fp32', 'tf32', 'bf16' or 'fp16' (got 'int8')",
        "max_failed_samples: Input should be less than or equal to 1 (got 2)",
        "ray.num_actor: unknown key; did you mean ray.num_actors?",
        "ray.wait_s: Input should be a valid number, unable to parse string as a number (got 'soon')",
        "attempts: Input should be greater than or equal to 1 (got 0)",
    ):
        assert f"\n  {problem}" in message
    assert len(message.splitlines()) == 8


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ("batchsize: 1", "batch_size"),
        ("ray: {shard_in_flight: 1}", "ray.shards_in_flight"),
        ("num_actors: 1", "ray.num_actors"),  # at the wrong depth
        ("ray: {attempts: 1}", "attempts"),
        ("metadata: {caption: {from: txt, decode_threads: 1}}", "ray.decode_threads"),
        ("wait: {for: 1}", "ray.wait_s"),
        ("metadata: {caption: {form: txt, from: txt}}", "metadata.caption.from"),
        ("metadata: {a: {from: txt}, b: {from: txt, typ: string}}", "metadata.b.type"),
    ],
)
def test_unknown_keys_are_refused_with_the_key_that_was_meant(file: Path, text: str, suggestion: str) -> None:
    assert f"unknown key; did you mean {suggestion}?" in said(file, MINIMAL + text)


def test_an_unknown_key_like_no_other_is_just_unknown(file: Path) -> None:
    assert "\n  zzzz: unknown key" in said(file, MINIMAL + "zzzz: 1") + "\n"
    assert "did you mean" not in said(file, MINIMAL + "zzzz: 1")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("batch_size=4.5", "batch_size: .*fractional part .got 4.5."),
        ("batch_size=many", "batch_size: .*got 'many'"),
        ("shards=[]", "shards: .*at least 1 item"),
        ("shards=null", "shards: .*valid list"),
        ("ray=3", "ray: .*got 3"),
        ("ray.num_actors.x=3", "ray.num_actors: "),
        ("metadata.caption=txt", "metadata.caption: .*got 'txt'"),
        ("metadata.caption.from=a..b", "column 'caption': from 'a..b' is not txt or json.field"),
        ("metadata.tokens.from=txt", "column 'tokens' is not a free name"),
        ("metadata.x.type=int8", "metadata.x.type: .*'string'"),
        ("batch_size=true", "batch_size: Input should be a number .got True."),
        ("ray.num_actors=true", "ray.num_actors: Input should be a number .got True."),
        ("ray.wait_s=false", "ray.wait_s: Input should be a number .got False."),
        ("require_end_marker=maybe", "require_end_marker: .*got 'maybe'"),
        ("output=2024", "output: .*valid string .got 2024."),
    ],
)
def test_a_wrong_type_names_the_field_and_the_value(file: Path, override: str, problem: str) -> None:
    assert re.search(problem, said(file, MINIMAL, override))


@pytest.mark.parametrize("override", ["batch_size", "=3", "", "batch_size: 4", "--batch_size"])
def test_what_is_no_override_is_said_to_be_none(file: Path, override: str) -> None:
    assert f"{override!r} is no override: write key=value" in said(file, MINIMAL, override)


@pytest.mark.parametrize(
    "text",
    ["[1, 2]", "- a", "42", "3.5", "true", "a: b: c", "a: [1", "a: 'x", "\tb: 1", "a: 1\na: 2", "? [a]\n: b", "a: ${",
     "a: ${x", "&a [*a]", "%bad", "a: !!python/object:os.system x", "---\na: 1\n---\nb: 2", "a: *nowhere"],
)  # fmt: skip
def test_a_file_that_is_no_settings_is_named_and_never_a_traceback(file: Path, text: str) -> None:
    assert str(file) in said(file, text)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "hello"])
def test_a_file_without_settings_lacks_what_must_be_there(file: Path, text: str) -> None:
    assert "checkpoint: is missing" in said(file, text)


def test_bytes_that_are_no_text_are_said_to_be_no_yaml(file: Path) -> None:
    file.write_bytes(b"checkpoint: \xe9\n")
    with pytest.raises(ConfigError, match="is no YAML file"):
        load_config(TokenizeConfig, str(file))


def test_a_missing_file_is_named_with_one_of_a_similar_name(file: Path) -> None:
    file.write_text(MINIMAL)
    with pytest.raises(
        ConfigError, match=r"tokenise\.yaml: no such configuration file; did you mean .*/tokenize\.yaml\?"
    ):
        load_config(TokenizeConfig, str(file.with_name("tokenise.yaml")))
    for nowhere in (file.with_name("zzz"), file.parent / "no" / "tokenize.yaml"):
        with pytest.raises(ConfigError) as raised:
            load_config(TokenizeConfig, str(nowhere))
        assert str(raised.value) == f"{nowhere}: no such configuration file"
    with pytest.raises(PipelineError, match="cannot read"):
        load_config(TokenizeConfig, str(file.parent))


# Sections and dataclasses


@dataclass(frozen=True)
class Inner:
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate {self.learning_rate} is not above 0")


class Outer(Section):
    inner: Inner = Inner()
    inners: tuple[Inner, ...] = ()
    maybe: Inner | None = None


def test_dataclasses_nest_with_their_own_rules_and_suggestions() -> None:
    def problems(values: dict[str, Any]) -> str:
        with pytest.raises(ConfigError) as raised:
            check(Outer, values, "here")
        return str(raised.value)

    assert check(Outer, {"inner": {"learning_rate": "1e-3"}}, "here").inner == Inner(1e-3)
    assert "inner.learning_rate: Input should be a number (got True)" in problems({"inner": {"learning_rate": True}})
    assert "inner: learning_rate -1.0 is not above 0" in problems({"inner": {"learning_rate": -1}})
    assert "inner.learning_rat: unknown key; did you mean inner.learning_rate?" in problems(
        {"inner": {"learning_rat": 1}}
    )
    assert "maybe.learn_rate: unknown key; did you mean maybe.learning_rate?" in problems({"maybe": {"learn_rate": 1}})


def test_settings_never_change_once_they_are_checked(file: Path) -> None:
    config = load(file, MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.batch_size = 3
