"""Python runs this at the start of every process below bench_startup.py: it notes when each first does what."""

from __future__ import annotations

import functools
import importlib.abc
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

# module -> what of it is noted at its first call; the module's own import is noted too
NOTED: dict[str, tuple[str, ...]] = {
    "jobs.cli": (),
    "jobs.config": ("load_config",),
    "jobs.tokenize_dataset": ("run_tokenize", "Session.run", "Session._tokenize"),
    "ray": (),
    "torch": (),
    "jobs.cluster": ("_connect",),
    "jobs.actors": ("ActorPool.__enter__",),
    "jobs.tokenize_actor": ("TokenizeActor.__init__", "TokenizeActor.load", "TokenizeActor.tokenize"),
    "jobs.checkpoints": ("TokenizerSource.load",),
    "model.tokenizer": ("DVAETokenizer.encode",),
}
_noted: set[str] = set()


def note(name: str, begin_or_end: str) -> None:
    """One line, by one write: several processes share the file."""
    line = f"{time.time()} {os.getpid()} {name} {begin_or_end}\n".encode()
    file = os.open(os.environ["STARTUP_MARKS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line)
    os.close(file)


def _with_notes(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def noted(*arguments: Any, **options: Any) -> Any:
        if name in _noted:
            return function(*arguments, **options)
        _noted.add(name)
        note(name, "begin")
        try:
            return function(*arguments, **options)
        finally:
            note(name, "end")

    return noted


class _Loader(importlib.abc.Loader):
    """The module's own, with notes around it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        name = module.__name__
        note(f"import {name}", "begin")
        self._loader.exec_module(module)
        note(f"import {name}", "end")
        module.__loader__ = module.__spec__.loader = self._loader
        for path in NOTED[name]:
            owner, attribute = module, path
            if "." in path:
                owner, attribute = getattr(module, path.split(".")[0]), path.split(".")[1]
            setattr(owner, attribute, _with_notes(path, getattr(owner, attribute)))


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if name not in NOTED:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


if "STARTUP_MARKS" in os.environ:
    note("python", "begin")
    sys.meta_path.insert(0, _Finder())
