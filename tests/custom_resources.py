"""Custom resources of Kubernetes against the definitions (CRDs) in a folder, without a cluster and strictly: a field
that no definition knows is an error, where a cluster would drop it without a word."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PLAIN = ("type", "enum", "required", "pattern", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems")
_EVERY_KIND = {"apiVersion": {}, "kind": {}, "metadata": {"type": "object"}, "status": {}}


def validators(folder: Path) -> dict[tuple[str, str], Draft202012Validator]:
    """By apiVersion and kind."""
    definitions = [yaml.load(path.read_text(), LOADER) for path in sorted(folder.glob("*.yaml"))]
    return {
        (f"{definition['spec']['group']}/{version['name']}", definition["spec"]["names"]["kind"]): Draft202012Validator(
            _strict(version["schema"]["openAPIV3Schema"], _EVERY_KIND)
        )
        for definition in definitions
        for version in definition["spec"]["versions"]
    }


def problems(validator: Draft202012Validator, resource: dict[str, Any]) -> Iterator[str]:
    for error in validator.iter_errors(resource):
        yield f"{'.'.join(map(str, error.path))}: {error.message[:200]}"


def _strict(schema: dict[str, Any], also: dict[str, Any] | None = None) -> dict[str, Any]:
    """As JSON Schema, with Kubernetes' own words translated and unknown fields refused."""
    plain = {name: schema[name] for name in _PLAIN if name in schema}
    if schema.get("x-kubernetes-int-or-string"):
        plain["type"] = ["integer", "string"]
    if schema.get("nullable") and "type" in plain:
        plain["type"] = [plain["type"], "null"]
    if "properties" in schema:
        plain["properties"] = {name: _strict(each) for name, each in schema["properties"].items()} | (also or {})
        plain["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    if isinstance(schema.get("additionalProperties"), dict):
        plain["additionalProperties"] = _strict(schema["additionalProperties"])
    if "items" in schema:
        plain["items"] = _strict(schema["items"])
    return plain
