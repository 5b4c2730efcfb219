"""Shard patterns -> shards: braces, globs, folders and names, with as few listings as can be. storage.py lists."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

from pipeline import storage
from pipeline.errors import NoShardsMatched
from pipeline.records import ObjectInfo
from pipeline.urls import glob_folder, is_glob, is_local, is_web, normalize, public_text, public_url

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")


def expand(patterns: Iterable[str]) -> list[ObjectInfo]:
    """The shards that brace patterns, globs and folders name, in URL order, each once.

    Costs one listing a folder, not a request a shard. Raises NoShardsMatched naming the pattern that
    matched nothing.
    """
    found = {info.url: info for pattern in patterns for info in _expand_one(pattern)}
    return [found[url] for url in sorted(found)]


def _expand_one(pattern: str) -> list[ObjectInfo]:
    try:
        urls = [normalize(url) for url in braceexpand(pattern)]
    except UnbalancedBracesError as error:
        raise NoShardsMatched(f"shard pattern {public_text(pattern)!r} has unbalanced braces") from error
    globs = [info for url in urls if is_glob(url) for info in _glob(url)]
    return globs + _look_up([url for url in urls if not is_glob(url)])


def _hint(url: str) -> str:
    if is_local(url):
        folder = Path(glob_folder(url) if is_glob(url) else url.rpartition("/")[0] or "/")
        return f"the folder {folder} " + ("holds no such file" if folder.is_dir() else "does not exist")
    return "check the bucket, the prefix and the credentials"


def _glob(url: str) -> list[ObjectInfo]:
    infos = storage.list_matches(url)
    if not infos:
        raise NoShardsMatched(f"shard pattern {public_url(url)!r} matches nothing; {_hint(url)}")
    return infos


def _look_up(urls: list[str]) -> list[ObjectInfo]:
    """Named shards, by one listing per folder; a folder itself stands for the shards in it."""
    infos: list[ObjectInfo] = []
    listings: dict[str, dict[str, ObjectInfo]] = {}
    for url in urls:
        folder = url.rpartition("/")[0] or "/"
        if folder.endswith(":/"):  # a bucket is in no folder
            listings[folder] = {}
        if folder not in listings:
            listings[folder] = _list_folder(folder)
        if url in listings[folder]:
            infos.append(listings[folder][url])
        else:
            infos += _shards_of(url, _stat_or_list(url))
    return infos


def _shards_of(url: str, below: list[ObjectInfo]) -> list[ObjectInfo]:
    if not below:
        raise NoShardsMatched(f"shard {public_url(url)} does not exist; {_hint(url)}")
    shards = [info for info in below if info.url == url or info.url.lower().endswith(SHARD_SUFFIXES)]
    if not shards:
        suffixes = ", ".join(SHARD_SUFFIXES)
        raise NoShardsMatched(f"{public_url(url)} holds no shard: none of its files ends with {suffixes}")
    return shards


def _list_folder(folder: str) -> dict[str, ObjectInfo]:
    if is_web(folder):  # no listing there: each is asked for by itself
        return {}
    return {info.url: info for info in storage.list_folder(folder)}


def _stat_or_list(url: str) -> list[ObjectInfo]:
    if not is_web(url):
        return storage.list_files(url)
    found = storage.stat(url)
    return [found] if found else []
