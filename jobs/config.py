"""YAML files, environment and `key.sub=value` overrides -> checked settings. Knows no job's fields.

Every problem is reported at once, each with the field, the value and the rule, before Ray starts.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, ConfigDict, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from pipeline import storage
from pipeline.errors import PipelineError

Settings = TypeVar("Settings", bound=BaseModel)
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_ANY = "*"  # in a known key: whatever the file calls it there
_QUOTES = "a value with {…} inside […], or that begins with {, needs quotes"


class ConfigError(PipelineError):
    """A configuration file or override is wrong; the message lists every problem."""


class Section(BaseModel):
    """Base of every settings section: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Patterns = Annotated[list[str], BeforeValidator(_as_list)]
"""Of shards: one or a list."""


@dataclass(frozen=True)
class KindOf:
    """Of a section that is of one of several kinds: which one, by its values, the first of them `key`. `choose` raises
    ValueError where it is none."""

    choose: Callable[[dict[str, Any]], Any]
    key: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return handler(Annotated[source, BeforeValidator(self._validated)])

    def _validated(self, value: Any) -> Any:
        if is_dataclass(value) or value is None:
            return value
        kind = self.choose(value if isinstance(value, dict) else {})
        # A dataclass alone would take unknown keys: an adapter gives it no rules, but in a union it does.
        return TypeAdapter(kind | None, config=Section.model_config).validate_python(value)


def load_config(kind: type[Settings], path: str | None, overrides: Sequence[str] = ()) -> Settings:
    """The settings of `path` with `key.sub=value` overrides on top. Raises ConfigError."""
    values = OmegaConf.create({}) if path is None else _read(path)
    return _merged(kind, values, overrides, path or "the command line")


def with_overrides(kind: type[Settings], values: dict[str, Any], overrides: Sequence[str], source: str) -> Settings:
    """As `load_config`, of values that `source` holds. Raises ConfigError."""
    return _merged(kind, OmegaConf.create(values), overrides, source)


def _merged(kind: type[Settings], values: DictConfig, overrides: Sequence[str], source: str) -> Settings:
    try:
        merged = OmegaConf.merge(values, *(_parsed(override) for override in overrides))
        plain = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from error
    return check(kind, plain, source)


def check(kind: type[Settings], values: Any, source: str) -> Settings:
    """`values` as `kind`. Raises ConfigError listing every problem."""
    problems = list(_truths_for_numbers(kind, values))
    try:
        checked = kind.model_validate(values)
    except ValidationError as error:
        known = sorted(_known_keys(kind, values))
        problems += [_problem(dict(one), known) for one in error.errors()]
    if problems:
        raise ConfigError(f"{source}: " + "\n  ".join(["", *problems]).lstrip(" "))
    return checked


def _truths_for_numbers(kind: Any, values: Any, prefix: str = "") -> Iterator[str]:
    """Pydantic would take `true` for 1, in sections and in the dataclasses in them."""
    for name, annotation in _annotations(kind, values) if isinstance(values, dict) else ():
        value, types = values.get(name), list(_parts(annotation))
        if isinstance(value, bool) and bool not in types and (int in types or float in types):
            yield f"{prefix}{name}: Input should be a number (got {value!r})"
        for part in types:
            yield from _truths_for_numbers(part, value, f"{prefix}{name}.")


def _parts(annotation: Any) -> Iterator[Any]:
    """The annotation and all that is in it: `int` in `Annotated[int, …] | None`."""
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


def _read(path: str) -> DictConfig:
    try:
        values = OmegaConf.create(storage.read_bytes(path).decode())
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such configuration file{_similar_files(path)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no YAML file: {error}") from error
    except (yaml.YAMLError, OmegaConfBaseException, AssertionError) as error:  # the last: a number and nothing else
        quoted = f"; {_QUOTES}" if "{" in storage.read_bytes(path).decode() else ""
        raise ConfigError(f"{path} is no valid YAML of settings{quoted}: {error}") from error
    if not isinstance(values, DictConfig):
        raise ConfigError(f"{path} holds a list, not settings: write `key: value` lines")
    return values


def _similar_files(path: str) -> str:
    if not storage.is_local(path) or not Path(path).parent.is_dir():
        return ""
    names = [p.name for p in Path(path).parent.iterdir()]
    close = difflib.get_close_matches(Path(path).name, names, n=1)
    return f"; did you mean {Path(path).with_name(close[0])}?" if close else ""


def _parsed(override: str) -> DictConfig:
    key, equals, _ = override.partition("=")
    if not key or not equals:
        raise ConfigError(f"{override!r} is no override: write key=value or key.sub=value")
    try:
        return OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{override!r} is no valid YAML; {_QUOTES}: {error}") from error


def _problem(error: dict[str, Any], known: Sequence[str]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] in _UNKNOWN:
        others = [name for name in known if not key.startswith(f"{name}.")]  # no section of it is meant
        meant = _meant(key, [_filled(name, error["loc"]) for name in others])
        return f"{key}: unknown key" + (f"; did you mean {meant[0]}?" if meant else "")
    if error["type"] in ("missing", "missing_argument"):
        return f"{key}: is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    shown = error["input"]
    return f"{key or 'settings'}: {message}" + ("" if isinstance(shown, dict) else f" (got {shown!r})")


def _filled(known: str, loc: Sequence[Any]) -> str:
    names = known.split(".")
    return ".".join(str(loc[n]) if name == _ANY and n < len(loc) else name for n, name in enumerate(names))


def _meant(key: str, known: Sequence[str]) -> list[str]:
    """The right name in the wrong place, or a name much like it, here or anywhere."""
    last_names = {name.rpartition(".")[2]: name for name in reversed(known)}
    last_name = key.rpartition(".")[2]
    if last_name in last_names:
        return [last_names[last_name]]
    close = difflib.get_close_matches(last_name, last_names, n=1)
    return difflib.get_close_matches(key, known, n=1) or [last_names[name] for name in close]


def _known_keys(kind: Any, values: Any, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a model and of the sections and dataclasses in it."""
    yield from (prefix + key for key in _choosing_keys(kind))
    for name, annotation in _annotations(kind, values):
        yield prefix + name
        below = f"{prefix}{name}.{_ANY}." if get_origin(annotation) is dict else f"{prefix}{name}."
        for part in (annotation, *get_args(annotation)):
            yield from _known_keys(part, values.get(name) if isinstance(values, dict) else None, below)


def _choosing_keys(kind: Any) -> Iterator[str]:
    """Those by which a section is of one kind or another: not every kind has them as a field."""
    for name, field in kind.model_fields.items() if isinstance(kind, type) and issubclass(kind, BaseModel) else ():
        yield from (f"{name}.{each.key}" for each in field.metadata if isinstance(each, KindOf))


def _annotations(kind: Any, values: Any) -> list[tuple[str, Any]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [(field.alias or name, _chosen(name, field, values)) for name, field in kind.model_fields.items()]
    if isinstance(kind, type) and is_dataclass(kind):
        types = get_type_hints(kind)  # a dataclass keeps its annotations as text
        return [(field.name, types[field.name]) for field in fields(kind)]
    return []


def _chosen(name: str, field: FieldInfo, values: Any) -> Any:
    """The field's annotation, or the kind which the values ask for."""
    value = values.get(name) if isinstance(values, dict) else None
    for each in field.metadata:
        if isinstance(each, KindOf):
            with suppress(ValueError):  # is reported as the field's own problem
                return each.choose(value if isinstance(value, dict) else {})
    return field.annotation
