"""The settings of `dvae tokenize`; configs/tokenize.yaml says what each is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from jobs.config import Patterns, Section
from pipeline.metadata import ColumnType, MetadataColumn
from pipeline.shards import IMAGE_EXTENSIONS

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
    shards_in_flight: Count = 2
    decode_threads: Count | None = None
    wait_s: float = Field(default=300.0, gt=0.0)


class TokenizeConfig(Section):
    checkpoint: str
    shards: Annotated[Patterns, Field(min_length=1)]
    output: str
    metadata: dict[str, ColumnSettings] = Field(default={})
    image_extensions: tuple[str, ...] = IMAGE_EXTENSIONS
    require_end_marker: bool = True
    batch_size: Count = 64
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: Count = 1
    accept_numerics: bool = False
    max_failed_samples: Share = 0.05
    max_failed_shards: int = Field(default=0, ge=0)
    attempts: Count = 3
    retry_pause_s: float = Field(default=5.0, ge=0.0)
    shard_deadline_s: float = Field(default=1800.0, gt=0.0)
    ray: RaySettings = RaySettings()

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

    @property
    def device(self) -> str:
        return "cuda" if self.ray.gpus_per_actor > 0 else "cpu"
