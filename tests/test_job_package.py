"""What travels with a submitted job."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jobs.job_package import CODE, PackageError, collect


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def own_files(folder: Path, config: str = "t.yaml") -> set[str]:
    """Those of the folder, without this project's code."""
    return {name for name in collect(folder, config).files if name.partition("/")[0] not in CODE}


def test_junk_data_and_keys_stay_here(tmp_path: Path) -> None:
    write(tmp_path, "t.yaml", "src/a.py", "src/deep/b.json", "run.sh")
    write(
        tmp_path, ".git/config", ".venv/lib/x.py", "src/__pycache__/a.pyc", "x.egg-info/PKG", "data/a.tar", "p.parquet"
    )
    write(tmp_path, ".env", ".env.prod", "src/.netrc", ".aws/config", "key.pem", ".ssh/id_rsa", "aws-credentials.csv")
    write(tmp_path, "storage.env", ".ray/auth_token", ".azure/tokens.json", "kubeconfig.yaml", "x/store.p12", ".s3cfg")
    assert own_files(tmp_path) == {"t.yaml", "src/a.py", "src/deep/b.json", "run.sh"}


def test_ignore_files_hold_where_they_lie_as_git_reads_them(tmp_path: Path) -> None:
    write(
        tmp_path, "t.yaml", "logs/a.txt", "b.log", "keep.log", "sub/c.log", "sub/big.bin", "sub/in/big.bin", "big.bin"
    )
    (tmp_path / ".gitignore").write_text("logs/\n*.log\n!keep.log\n")
    (tmp_path / "sub" / ".rayignore").write_text("/big.bin\n")
    ignore = {".gitignore", "sub/.rayignore"}
    assert own_files(tmp_path) - ignore == {"t.yaml", "keep.log", "sub/in/big.bin", "big.bin"}


def test_the_configuration_travels_though_it_is_ignored(tmp_path: Path) -> None:
    write(tmp_path, "local/t.yaml")
    (tmp_path / ".gitignore").write_text("local/\n")
    assert own_files(tmp_path, "local/t.yaml") == {".gitignore", "local/t.yaml"}


def test_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    write(tmp_path, "job/t.yaml", "data/image.jpg", "one.txt")
    (tmp_path / "job" / "circle").symlink_to(tmp_path / "job")
    (tmp_path / "job" / "data").symlink_to(tmp_path / "data")
    (tmp_path / "job" / "one").symlink_to(tmp_path / "one.txt")
    (tmp_path / "job" / "nowhere").symlink_to(tmp_path / "gone")
    assert own_files(tmp_path / "job") == {"t.yaml", "one"}


def test_more_than_ray_takes_is_refused_before_it_is_packed_and_the_largest_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "t.yaml")
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(3 * 10**9)  # takes no room
    (tmp_path / "notes.txt").write_bytes(b"x" * 200_000)
    with pytest.raises(
        PackageError, match=r"3\.0 GB .* takes 100\.0 MB: .*rayignore.*: weights\.bin \(3\.0 GB\), note"
    ):
        collect(tmp_path, "t.yaml")
    (tmp_path / ".rayignore").write_text("*.bin\n")
    collect(tmp_path, "t.yaml")


@pytest.mark.parametrize("name", ["queue.py", "logging/__init__.py"])
def test_a_module_that_would_hide_one_of_pythons_own_is_refused_for_no_process_of_the_job_would_start(
    tmp_path: Path, name: str
) -> None:
    write(tmp_path, "t.yaml", "src/queue.py", "json/a.txt", "queue.txt", "io")
    collect(tmp_path, "t.yaml")
    write(tmp_path, name)
    with pytest.raises(PackageError, match=rf"{name} hides Python's own module of that name .* rename it"):
        collect(tmp_path, "t.yaml")
    (tmp_path / ".rayignore").write_text(f"/{name.partition('/')[0]}\n")
    collect(tmp_path, "t.yaml")


def test_the_same_files_are_the_same_archive_which_ray_then_has_already(tmp_path: Path) -> None:
    write(tmp_path / "job", "t.yaml", "run.sh")
    (tmp_path / "job" / "run.sh").chmod(0o700)
    collect(tmp_path / "job", "t.yaml").write(tmp_path / "one.zip")
    (tmp_path / "job" / "t.yaml").touch()
    collect(tmp_path / "job", "t.yaml").write(tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert archive.getinfo("run.sh").external_attr >> 16 == 0o755


def test_the_archive_holds_all_of_this_project_that_a_job_needs(tmp_path: Path) -> None:
    """The command runs from it, with no other copy to import."""
    write(tmp_path / "job", "t.yaml")
    collect(tmp_path / "job", "t.yaml").write(tmp_path / "job.zip")
    with zipfile.ZipFile(tmp_path / "job.zip") as archive:
        archive.extractall(tmp_path / "there")
    where = "import jobs.cli, model, pipeline; print(jobs.cli.__file__, model.__file__, pipeline.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path / "there", capture_output=True, text=True, check=True
    )
    assert all(Path(path).is_relative_to(tmp_path / "there") for path in done.stdout.split())


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path, "t.yaml", "gone.txt")
    package = collect(tmp_path, "t.yaml")
    (tmp_path / "gone.txt").unlink()
    with pytest.raises(PackageError, match=r"gone\.txt cannot be sent: No such file"):
        package.write(tmp_path / "job.zip")
