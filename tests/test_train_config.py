"""The settings of `dvae train`: the shipped file is whole, and what cannot be is refused by field and rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.config import ConfigError, check, load_config
from jobs.train_config import TrainConfig
from jobs.train_output import identity
from make_training import settings
from model.config import Ramp

CONFIGS = Path(__file__).parent.parent / "configs"
SHIPPED = CONFIGS / "train_dalle.yaml"
RECIPES = sorted(CONFIGS.glob("*train*.yaml"))


def refused(folder: Path, **changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        check(TrainConfig, settings(folder, **changes), "train.yaml")
    return str(error.value)


def keys(values: dict[str, Any], prefix: str = "") -> set[str]:
    below = (keys(value, f"{prefix}{name}.") for name, value in values.items() if isinstance(value, dict))
    return {prefix + name for name in values}.union(*below)


def test_the_shipped_file_names_every_key_once() -> None:
    import yaml

    shown = yaml.safe_load(SHIPPED.read_text())
    assert keys(shown) == keys(load_config(TrainConfig, str(SHIPPED)).model_dump(mode="json"))


def test_the_shipped_file_is_dalles_recipe() -> None:
    shipped = load_config(TrainConfig, str(SHIPPED))
    for section in ("model", "image", "loss", "optim", "schedule"):
        assert getattr(shipped, section) == TrainConfig.model_fields[section].default
    assert (shipped.steps, shipped.batch_size, shipped.optim.lr) == (3_000_000, 512, 1e-4)


def test_there_is_a_recipe_for_each_kind_of_machine() -> None:
    assert {path.name for path in RECIPES} == {
        "demo_train.yaml", "train_dalle.yaml", "train_small.yaml", "train_tiny.yaml",
    }  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_its_schedules_end_within_its_steps(path: Path) -> None:
    """Reaching a temperature of 1/16 is what closes the gap to argmax: a recipe that stops before it is no use."""
    recipe = load_config(TrainConfig, str(path), ["output=o", "data.train_shards=t.tar", "data.val_shards=v.tar"])
    ramps = {name: getattr(recipe.schedule, name) for name in ("temperature", "kl_weight", "lr", "usage_weight")}
    assert all(ramp.warmup < ramp.steps <= recipe.steps for ramp in ramps.values())
    assert recipe.schedule.temperature.end == 1 / 16 and recipe.schedule.temperature.steps < recipe.steps
    assert (recipe.data.train_shards, recipe.data.val_shards) == (["t.tar"], ["v.tar"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipes_batch_and_streams_fit_its_workers(path: Path) -> None:
    recipe = load_config(TrainConfig, str(path))
    workers, streams = max(1, recipe.ray.num_workers), recipe.data.num_streams
    assert recipe.batch_size % streams == 0 == streams % workers
    assert recipe.eval.every_steps and recipe.steps % recipe.eval.every_steps == 0
    assert recipe.steps % recipe.checkpoint.every_steps == 0
    assert recipe.ray.use_gpu == (path.stem in ("train_dalle", "train_small"))


def test_a_ramp_given_in_part_keeps_dalles_other_numbers(tmp_path: Path) -> None:
    given = check(TrainConfig, settings(tmp_path, schedule={"temperature": {"steps": 10}}), "here")
    assert given.schedule.temperature == Ramp(1.0, 1 / 16, 10)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 6}, "batch_size 6 is not a multiple of data.num_streams 4"),
        ({"ray": {"num_workers": 5}}, "ray.num_workers 5 is more than data.num_streams 4: each needs one at least"),
        ({"ray": {"num_workers": [2, 5]}}, "ray.num_workers 5 is more than data.num_streams 4"),
        ({"ray": {"num_workers": [3, 2]}}, "ray.num_workers: must be a whole number of at least 0, or [fewest, most]"),
        ({"ray": {"num_workers": [0, 2]}}, "with 1 <= fewest <= most (got [0, 2])"),
        ({"ray": {"num_workers": "many"}}, "ray.num_workers: must be a whole number"),
        ({"data": {"val_shards": []}}, "data.val_shards is empty"),
        ({"image": {"size": 20}}, "image.size with model.downsample: image size 20 is not a multiple of"),
        ({"data": {"train_shards": []}}, "data.train_shards"),
        ({"optim": {"lr": -1}}, "lr -1.0 must be a finite number above 0.0"),
        ({"schedule": {"temperature": {"steps": 0}}}, "steps 0 must be a whole number of at least 1"),
        ({"model": {"widht": 8}}, "model.widht: unknown key; did you mean model.width?"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert said in refused(tmp_path, **changes)


def test_a_range_of_workers_comes_from_a_file_and_from_the_command_line(tmp_path: Path) -> None:
    ranged = load_config(TrainConfig, str(SHIPPED), ["ray.num_workers=[2,8]"])
    assert (ranged.ray.num_workers, ranged.ray.fewest_workers, ranged.ray.most_workers) == ((2, 8), 2, 8)
    again = check(TrainConfig, ranged.model_dump(mode="json"), "as it is submitted")
    assert again == ranged
    assert load_config(TrainConfig, str(SHIPPED), ["ray.num_workers=3"]).ray.fewest_workers == 3


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    message = refused(tmp_path, stepz=5, precision="fp8", log={"every_steps": "often"})
    assert all(field in message for field in ("stepz", "precision", "log.every_steps"))


def test_a_run_from_before_shrinking_came_is_the_same_run_still(tmp_path: Path) -> None:
    def image(**changes: Any) -> dict[str, Any]:
        found = identity(check(TrainConfig, settings(tmp_path, **changes), "here"), [], [])
        return {name: value for name, value in found.items() if name.startswith("image.")}

    assert sorted(image()) == ["image.resample", "image.size", "image.small", "image.version"]
    assert image(image={"shrink": "dct"})["image.shrink"] == "dct"
    assert "image.shrink: Input should be 'none' or 'dct'" in refused(tmp_path, image={"shrink": "draft"})
