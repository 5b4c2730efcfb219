"""What travels with a submitted job: the files of the current folder, without junk and without keys, and this project's
own code, so that the cluster runs what the configuration was checked with. Knows nothing of Ray."""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from jobs.wording import counted, size
from pipeline.errors import PipelineError

MOST_BYTES = 100 * 10**6  # Ray's Jobs server takes 100 MiB in one request
NUM_NAMED = 5
CODE = ("jobs", "model", "pipeline")
IGNORE_FILES = (".gitignore", ".rayignore")
JUNK = (".git/", ".venv/", "venv/", "node_modules/", "__pycache__/", "*.py[co]", "*.egg-info/", ".mypy_cache/",
        ".ruff_cache/", ".pytest_cache/", "demo-output/", "demo-cluster/", "*.tar", "*.tar.gz", "*.tgz",
        "*.parquet")  # fmt: skip
KEYS = (".env", ".env.*", "*.env", ".netrc", ".aws/", ".azure/", ".docker/", ".ray/", ".ssh/", ".kube/", "kubeconfig*",
        ".config/gcloud/", ".boto", ".s3cfg", ".pypirc", "*.pem", "*.key", "*.p12", "*.pfx", "id_rsa*", "id_ed25519*",
        "*credentials*", "*service-account*.json")  # fmt: skip
_SAME_DATE = (1980, 1, 1, 0, 0, 0)  # the same files are the same archive, which Ray then has already


class PackageError(PipelineError):
    """The files of the folder cannot be sent."""


@dataclass(frozen=True)
class JobPackage:
    """Name on the cluster -> file here."""

    files: dict[str, Path]

    def describe(self) -> str:
        return f"{counted(len(self.files), 'file')}, {size(sum(map(_bytes, self.files.values())))}"

    def write(self, archive: Path) -> None:
        """As a zip; the same bytes for the same files. Raises PackageError."""
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
            for name, path in sorted(self.files.items()):
                info = zipfile.ZipInfo(name, _SAME_DATE)
                info.compress_type = zipfile.ZIP_DEFLATED
                info.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
                out.writestr(info, _read(path))


def collect(folder: Path, config: str) -> JobPackage:
    """All that a job of `folder` needs; `config`, its configuration file, also where it is ignored.
    Raises PackageError where it is more than Ray takes, naming the largest files."""
    files = {path.relative_to(folder).as_posix(): path for path in _wanted(folder, ())}
    if "://" not in config:
        files[config] = folder / config
    _refuse_modules_of_python(folder, files)
    files |= _code()
    _refuse_too_much(folder, files)
    return JobPackage(files)


@dataclass(frozen=True)
class _Rules:
    """Of one ignore file, or ours: for what lies below `folder`."""

    folder: Path
    spec: GitIgnoreSpec

    def ignore(self, path: Path, is_folder: bool) -> bool:
        return self.spec.match_file(path.relative_to(self.folder).as_posix() + "/" * is_folder)


def _wanted(folder: Path, rules: tuple[_Rules, ...]) -> Iterator[Path]:
    """Links to files are followed; links to folders are not: they lead to data, or in circles."""
    rules = (*rules, *_rules_of(folder, first=not rules))
    for entry in os.scandir(folder):
        path, is_folder = Path(entry.path), entry.is_dir(follow_symlinks=False)
        if any(each.ignore(path, is_folder) for each in rules):
            continue
        if is_folder:
            yield from _wanted(path, rules)
        elif entry.is_file():
            yield path


def _rules_of(folder: Path, *, first: bool) -> Iterator[_Rules]:
    if first:
        yield _Rules(folder, GitIgnoreSpec.from_lines([*JUNK, *KEYS]))
    for path in (folder / name for name in IGNORE_FILES):
        if path.is_file():
            yield _Rules(folder, GitIgnoreSpec.from_lines(path.read_text(errors="replace").splitlines()))


def _code() -> dict[str, Path]:
    root = Path(__file__).resolve().parents[1]
    rules = (_Rules(root, GitIgnoreSpec.from_lines(JUNK)),)
    found = (path for package in CODE for path in _wanted(root / package, rules))
    return {path.relative_to(root).as_posix(): path for path in found}


def _refuse_modules_of_python(folder: Path, files: dict[str, Path]) -> None:
    """The folder comes first on the path of every process of the job: Ray's own would import them, and never start."""
    for name in files:
        if name.endswith(".py") and name.removesuffix(".py").removesuffix("/__init__") in sys.stdlib_module_names:
            raise PackageError(
                f"{folder / name} hides Python's own module of that name from every process of the job, which would "
                f"not start: rename it, or name it in {folder / '.rayignore'}"
            )


def _refuse_too_much(folder: Path, files: dict[str, Path]) -> None:
    num_bytes = {name: _bytes(path) for name, path in files.items()}
    total = sum(num_bytes.values())
    if total <= MOST_BYTES:
        return
    largest = sorted(num_bytes, key=num_bytes.__getitem__, reverse=True)[:NUM_NAMED]
    raise PackageError(
        f"{folder} holds {size(total)} in {counted(len(files), 'file')}, and Ray takes {size(MOST_BYTES)}: name in "
        f"{folder / '.rayignore'} what the job does not need, or submit from another folder; the largest: "
        + ", ".join(f"{name} ({size(num_bytes[name])})" for name in largest)
    )


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # gone since it was listed; reading it will say so
        return 0


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PackageError(
            f"{path} cannot be sent: {error.strerror}; name it in .rayignore if the job does not need it"
        ) from error
