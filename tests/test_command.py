"""How the command begins, and the line with which it says that it can be run again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli import _command


def test_a_log_level_that_is_none_is_said() -> None:
    environment = {**os.environ, "DVAE_LOG": "foo"}
    command = [sys.executable, "-m", "jobs.cli", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
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
