"""What the README tells people to type must be there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_file_that_the_readme_names_is_there() -> None:
    named = set(re.findall(r"\b(?:configs|tests|infra)/[\w/.-]+\.\w+", (ROOT / "README.md").read_text()))
    assert {"configs/train_dalle.yaml", "configs/tokenize.yaml"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
