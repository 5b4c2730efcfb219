"""How the command begins, and the line with which it says that it can be run again."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.command_line import PublicFormatter, say
from jobs.command_line import typed_command as _command


def test_what_is_quoted_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say("dvae: tokenizer \x1b[2J\x9b\u202e of\n\tyours")
    assert capsys.readouterr().err == "dvae: tokenizer \N{REPLACEMENT CHARACTER}[2J\ufffd\ufffd of\n\tyours\n"
    record = logging.LogRecord("jobs", logging.INFO, "", 0, "key \x1b]0;x\x07", None, None)
    assert PublicFormatter("%(message)s").format(record) == "key \ufffd]0;x\ufffd"


def test_a_log_level_that_is_none_is_said() -> None:
    environment = {**os.environ, "DVAE_LOG": "foo"}
    command = [sys.executable, "-m", "jobs.cli", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2
    assert done.stderr == "dvae: DVAE_LOG is 'FOO', which is no level: set DEBUG, INFO, WARNING or ERROR\n"


def test_the_line_to_go_on_with_names_the_program_as_it_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "bin" / "dvae"
    installed.parent.mkdir()
    installed.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(installed.parent))
    for program, typed in [
        (".venv/bin/dvae", ".venv/bin/dvae"),
        ("/other/bin/dvae", "/other/bin/dvae"),
        (str(installed), "dvae"),  # the shell found it on PATH
        ("/src/jobs/cli.py", "dvae"),  # python -m jobs.cli
    ]:
        monkeypatch.setattr(sys, "argv", [program, "train", "my train.yaml"])
        assert _command() == f"{typed} train 'my train.yaml'"


@pytest.mark.parametrize(
    "argument",
    [
        "shards=https://h.example/x.tar?X-Amz-Signature=S3CR3T",
        "shards=https://user:S3CR3T@h.example/x.tar",
        "shard=https://h.example/x.tar?sig=S3CR3T",
        "checkpoint=https://user:S3CR3T@127.0.0.1:9/x?sig=S3CR3T",
    ],
)
def test_no_secret_of_a_typed_url_is_said_again(argument: str, tmp_path: Path) -> None:
    config = tmp_path / "t.yaml"
    config.write_text("checkpoint: /nowhere\nshards: /nowhere/*.tar\noutput: /nowhere/out\n")
    hasty = "from pipeline import store_requests; store_requests.PATIENCE_S = 1.0; from jobs.cli import main; main()"
    command = [sys.executable, "-c", hasty, "tokenize", str(config), argument]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2 and done.stderr
    assert "S3CR3T" not in done.stdout + done.stderr


def test_the_line_to_go_on_leaves_secrets_out_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["dvae", "tokenize", "t.yaml", "shards=https://h.example/x.tar?sig=S3CR3T"])
    line = _command()
    assert line.startswith("dvae tokenize t.yaml shards=https://h.example/x.tar ") and "S3CR3T" not in line
    assert "secrets of its URLs, which are not shown" in line


def test_what_any_library_logs_has_no_secret() -> None:
    record = logging.LogRecord(
        "s3fs", logging.WARNING, "", 0, "GET %s failed", ("https://k:S3CR3T@h.example/x?sig=S3CR3T",), None
    )
    assert PublicFormatter("%(message)s").format(record) == "GET https://h.example/x failed"
