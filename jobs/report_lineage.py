"""Where the tokens of a run come from: what made them, of what, and what is known of the model, as rows of a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from jobs.checkpoints import RECORD, read_head
from jobs.model_card import CardFacts, facts_of
from jobs.model_origin import source_lines, stated_licence
from model.config import ModelError
from pipeline import storage
from pipeline.errors import PipelineError
from pipeline.plan import PlanRecord

Row = tuple[str, str]


def lineage(run: Mapping[str, Any], plan: PlanRecord | None, checkpoint: str | None) -> Iterator[Row]:
    """`run`: run.json. `plan`: what the last driver set out to do. `checkpoint`: where the model may be read."""
    height, width = run["grid"]
    yield "Tokenizer", run["tokenizer_id"]
    yield "Tokens", f"{height} × {width} of {run['codebook_size']:,} codes, row by row"
    yield "Pixels", _pairs(run["image_spec"])
    yield (
        "Columns",
        ", ".join(f"{c['name']} from {c['from']} ({c['type']})" for c in run["columns"]) or "none beside ours",
    )
    for numerics in run.get("numerics") or ():
        yield "Computed", _pairs(numerics)
    yield "Samples", _pairs(run.get("options") or {})
    yield "Schema", f"version {run['schema_version']}"
    if plan is not None:
        yield "Shards", f"{_listed(plan.settings.get('shards', ()))} ({plan.num_shards:,} when the last driver began)"
    if checkpoint is not None:
        yield from _model(run["tokenizer_id"], checkpoint)


def _model(tokenizer_id: str, checkpoint: str) -> Iterator[Row]:
    yield "Checkpoint", storage.public_url(checkpoint)
    try:
        head = read_head(checkpoint)
        facts = facts_of(json.loads(storage.read_bytes(storage.join(head.url, RECORD))))
    except (PipelineError, ModelError, FileNotFoundError, KeyError, ValueError) as error:
        yield "", f"cannot be read from here: {error}"
        return
    if head.tokenizer_id != tokenizer_id:
        yield "", f"holds another model now, {head.tokenizer_id}: it did not make these tokens"
        return
    yield from _facts(facts)


def _facts(facts: CardFacts) -> Iterator[Row]:
    yield "Model", f"{facts.model.in_words()} Step {facts.step:,}.".replace("`", "")
    if facts.origin is not None:
        yield "Imported", facts.origin.what
        yield from (("", line.replace("`", "")) for line in source_lines(facts.extra))
    if facts.training is not None:
        yield "Trained on", _listed(storage.public_url(url) for url in facts.training["data"]["train_shards"])
    yield "Licence", stated_licence(facts.extra) or _first_line(facts.origin.licence if facts.origin else "not stated")


def _first_line(markdown: str) -> str:
    return markdown.partition("\n")[0].replace("**", "").rstrip(":")


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_listed(value) if isinstance(value, list) else value}" for name, value in values.items())


def _listed(values: Any) -> str:
    return ", ".join([values] if isinstance(values, str) else map(str, values)) or "none"
