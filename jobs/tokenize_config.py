"""The settings of `dvae tokenize`; configs/tokenize.yaml says what each is for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from jobs.config import Patterns, Section
from pipeline.metadata import ColumnType, MetadataColumn
from pipeline.shards import IMAGE_EXTENSIONS
from pipeline.urls import normalize, public_url

_URLS = re.compile(r"(?=\b\w[\w+.-]*://)")  # a brace pattern may hold several
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]


class ColumnSettings(Section):
    """`from: txt` or `from: json.field`."""

    source: str = Field(alias="from")
    type: ColumnType = "string"


class RaySettings(Section):
    address: str | None = None
    num_actors: Count | None = None
    gpus_per_actor: float = Field(default=0.0, ge=0.0)
    cpus_per_actor: float = Field(default=1.0, ge=0.0)
    shards_in_flight: Count | None = None
    decode: Literal["auto", "threads", "tasks"] = "auto"
    decode_threads: Count | None = None
    decode_cpus: Annotated[float, Field(ge=0.0)] | None = None
    decode_labels: dict[str, str] = Field(default={})
    decode_resources: dict[str, Annotated[float, Field(gt=0.0)]] = Field(default={})
    wait_s: float = Field(default=300.0, gt=0.0)


class TokenizeConfig(Section):
    checkpoint: str
    shards: Annotated[Patterns, Field(min_length=1)]
    output: str
    metadata: dict[str, ColumnSettings] = Field(default={})
    image_extensions: tuple[str, ...] = IMAGE_EXTENSIONS
    require_end_marker: bool = True
    batch_size: Count = 64
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    threads: Count = 1
    accept_numerics: bool = False
    max_failed_samples: Share = 0.05
    max_failed_shards: int = Field(default=0, ge=0)
    attempts: Count = 3
    retry_pause_s: float = Field(default=5.0, ge=0.0)
    shard_deadline_s: float | None = Field(default=None, gt=0.0)
    ray: RaySettings = RaySettings()

    @field_validator("output")
    @classmethod
    def _is_shared(cls, url: str) -> str:
        if url.startswith("memory://"):
            raise ValueError("memory:// is a store of one process: parts of other actors would be lost, take a folder")
        return url

    @model_validator(mode="after")
    def _precision_has_gpus(self) -> TokenizeConfig:
        if self.precision in ("tf32", "fp16") and self.device == "cpu":
            raise ValueError(f"precision {self.precision} needs GPUs: set ray.gpus_per_actor=1, or take bf16 or fp32")
        return self

    @model_validator(mode="after")
    def _columns_are_good(self) -> TokenizeConfig:
        self.columns()
        return self

    def columns(self) -> tuple[MetadataColumn, ...]:
        """Raises ValueError naming a column that cannot be."""
        settings: Mapping[str, ColumnSettings] = self.metadata
        return tuple(MetadataColumn(name, one.source, one.type) for name, one in settings.items())

    def options(self) -> dict[str, Any]:
        """What, beside the tokenizer and the columns, decides which rows there are: recorded in run.json."""
        return {
            "image_extensions": sorted(e.lower() for e in self.image_extensions),
            "require_end_marker": self.require_end_marker,
        }

    def public_settings(self) -> dict[str, Any]:
        """As plain JSON, URLs without credentials and query strings: what may be stored. `check` reads it again,
        in any working directory."""
        settings = self.model_dump(mode="json", by_alias=True)
        absolute = {"checkpoint": normalize(self.checkpoint), "output": normalize(self.output)}
        return {name: _public(value) for name, value in {**settings, **absolute}.items()}

    @property
    def device(self) -> str:
        return "cuda" if self.ray.gpus_per_actor > 0 else "cpu"


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _public(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_public(one) for one in value]
    return "".join(map(public_url, _URLS.split(value))) if isinstance(value, str) else value
