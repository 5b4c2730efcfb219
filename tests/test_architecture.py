"""The import table of the house, read from the source: two wings that never meet, one door per library."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipeline", "model", "jobs")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# library -> the only files (or whole packages) that may import it
DOORS = {
    "fsspec": {"pipeline/storage.py"},
    "braceexpand": {"pipeline/shard_patterns.py"},
    "tenacity": {"pipeline/store_requests.py"},
    "PIL": {
        "pipeline/images.py", "pipeline/pillow_ways.py", "pipeline/pictures.py", "pipeline/turbo_jpeg.py",
        "pipeline/fast_resize.py", "pipeline/rank_chart.py", "pipeline/stats_pictures.py",
    },
    "simplejpeg": {"pipeline/turbo_jpeg.py"},
    "numba": {"pipeline/resize_kernels.py"},
    "pyarrow": {
        "pipeline/token_table.py", "pipeline/parquet_access.py", "pipeline/part_check.py", "pipeline/ledger.py",
        "pipeline/token_run.py", "pipeline/token_reader.py", "pipeline/compact_file.py", "pipeline/failures.py",
    },
    "webdataset": {"pipeline/pack.py"},
    "torch": {"model", "jobs/train_ranks.py", "jobs/token_dataset.py"},
    "safetensors": {"model"},
    "wandb": {"jobs/train_wandb.py"},
    "mlflow": {"jobs/train_mlflow.py"},
    "torchmetrics": {"model/perceptual.py"},
    "onnxruntime": {"jobs/export_onnx.py"},
    "tensorboardX": {"jobs/train_tensorboard.py"},
    "ray": {
        "jobs/cluster.py", "jobs/ray_actors.py", "jobs/decode_tasks.py", "jobs/pool_settings.py", "jobs/job_server.py",
        "jobs/train_ray.py", "jobs/train_callbacks.py", "jobs/stats_ray.py", "jobs/metrics.py",
    },
    "omegaconf": {"jobs/config.py"},
    "yaml": {"jobs/config.py"},
    "pydantic": {"jobs"},
    "typer": {"jobs/cli.py", "jobs/cli_jobs.py", "jobs/cli_models.py", "jobs/cli_tokens.py"},
    "rich": {"jobs"},
    "pathspec": {"jobs/job_package.py"},
    "aiohttp": {"pipeline/storage.py", "jobs/job_log.py"},  # its timeouts; Ray's Jobs client raises its errors
    "duckdb": {"jobs/demo_queries.py"},
    "skimage": {"jobs/demo_images.py"},
    "deltalake": {"pipeline/delta_table.py"},
    "jinja2": {"jobs/report_page.py"},
    "markupsafe": {"jobs/report_page.py", "jobs/report_charts.py"},
}  # fmt: skip
COMMON = {"numpy", *sys.stdlib_module_names}
WINGS = {"pipeline": {"pipeline"}, "model": {"model"}, "jobs": {"pipeline", "model", "jobs"}}


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_import_comes_through_its_door(path: Path) -> None:
    wing = name(path).partition("/")[0]
    for module in imports(path):
        top = module.partition(".")[0]
        if top in PACKAGES:
            assert top in WINGS[wing], f"{name(path)} imports {module}: the wings never meet"
        elif top not in COMMON:
            assert top in DOORS, f"{name(path)} imports {top}, which has no door in this table"
            assert {name(path), wing} & DOORS[top], f"{name(path)} imports {top}; its door is {sorted(DOORS[top])}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_room_grows_past_its_walls(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300, f"{name(path)}: would two rooms read better?"


def test_no_module_is_named_after_one_of_the_standard_library() -> None:
    assert not {path.stem for path in FILES} & sys.stdlib_module_names - {"__init__"}


def test_the_doors_in_the_table_exist() -> None:
    assert all((ROOT / door).exists() for doors in DOORS.values() for door in doors)
