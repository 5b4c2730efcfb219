"""What the command says around its jobs: the log, messages without secrets, and the line to type again."""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import sys
from collections.abc import Collection

from pipeline.urls import public_text

_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # all controls but tab and line feed


class PublicFormatter(logging.Formatter):
    """URLs without credentials and query strings, whoever logs them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(public_text(super().format(record)))


def set_up_log() -> None:
    """Our own lines at $DVAE_LOG; of libraries only what is a warning, for they tell where they found credentials."""
    level = _log_level()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PublicFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level="WARNING", handlers=[handler])
    for package in ("pipeline", "model", "jobs"):
        logging.getLogger(package).setLevel(level)


def _log_level() -> str:
    level = os.environ.get("DVAE_LOG", "INFO").upper()
    if level not in logging.getLevelNamesMapping():
        say(f"dvae: DVAE_LOG is {level!r}, which is no level: set DEBUG, INFO, WARNING or ERROR")
        sys.exit(2)
    return level


def say(text: str) -> None:
    """Whatever the message quotes, no secret of a URL is in it, and nothing that steers a terminal."""
    sys.stderr.write(printable(public_text(text)) + "\n")


def printable(text: str) -> str:
    """Messages quote keys, names and records of strangers."""
    return _STEERING.sub("\N{REPLACEMENT CHARACTER}", text)


def typed_command(without: Collection[str] = ()) -> str:
    """The line that was typed, to be typed again, less these words of it. (What the shell found on PATH has a whole
    path here too.)"""
    program = sys.argv[0]
    typed_with_path = program.endswith("/dvae") and program != shutil.which("dvae")
    typed = [argument for argument in sys.argv[1:] if argument not in without]
    shown = [public_text(argument) for argument in typed]
    left_out = "" if shown == typed else "   # and the secrets of its URLs, which are not shown"
    return shlex.join([program if typed_with_path else "dvae", *shown]) + left_out
