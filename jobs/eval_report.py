"""What `dvae eval` found, as a table, as JSON and as Markdown; and the model card made of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs.checkpoints import TRAINED_MODEL
from jobs.eval_checkpoint import EvalResult, EvalSettings, evaluate
from jobs.model_card import CARD, CardFacts, figure_rows, model_card
from jobs.train_evaluation import draw_codes
from jobs.train_health import standing
from jobs.train_output import TrainOutput
from model.perceptual import NOT_GIVEN
from pipeline import storage
from pipeline.output import read_json
from pipeline.pictures import encode_png

FEW_IMAGES = 10_000  # of an rFID
FEW_POSITIONS = 10  # for each code: with fewer, use and entropy come out too low


def run_eval(
    checkpoint: str,
    shards: Sequence[str],
    settings: EvalSettings,
    *,
    output: str | None = None,
    card: bool = False,
    as_json: bool = False,
) -> int:
    """Raises what `evaluate` does, and StorageError where the output cannot be written."""
    result = evaluate(checkpoint, shards, settings)
    written = _publish(result, output) if output else []
    if card:
        written.append(storage.join(result.folder, CARD))
        storage.publish(written[-1], card_of(result))
    console = Console(soft_wrap=True, highlight=False)
    if as_json:
        console.print_json(json.dumps(to_json(result)))
    else:
        _print(result, written, console)
    return 0


def to_json(result: EvalResult) -> dict[str, Any]:
    return {
        "checkpoint": storage.public_url(result.folder),
        "tokenizer_id": result.checkpoint.tokenizer_id,
        "step": result.checkpoint.step,
        "shards": list(result.shards),
        "num_shards": result.num_shards,
        "num_images": result.num_images,
        "num_bad_images": result.num_bad_images,
        "bad_by_reason": dict(result.bad_by_reason),
        "image_spec": dict(result.checkpoint.image_spec),
        "grid": list(result.grid),
        "codebook_size": result.checkpoint.dvae_config.codebook_size,
        "batch_size": result.batch_size,
        "device": result.device,
        "precision": result.precision,
        "temperature": result.temperature,
        "seconds": result.seconds,
        "figures": dict(result.figures),
        "notes": list(notes(result)),
    }


def to_markdown(result: EvalResult) -> str:
    lines = [
        f"# Evaluation of {result.checkpoint.tokenizer_id}, step {result.checkpoint.step:,}",
        "",
        f"`{storage.public_url(result.folder)}` on {source(result)}.",
        "",
        "| figure | value |",
        "|---|---|",
        *(f"| {what} | {value} |" for what, value in figure_rows(result.figures)),
        "",
        *(f"- {note}" for note in notes(result)),
    ]
    return "\n".join(lines) + "\n"


def source(result: EvalResult) -> str:
    """Of which images the figures are."""
    shards = ", ".join(f"`{pattern}`" for pattern in result.shards)
    size = result.checkpoint.image_spec["size"]
    return f"{result.num_images:,} images of {size} × {size} pixels from {shards}, in {result.precision}"


def notes(result: EvalResult) -> Iterator[str]:
    """What a reader must know to take the figures right."""
    if result.num_bad_images:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(result.bad_by_reason.items()))
        yield f"{result.num_bad_images:,} images could not be used and are in no figure: {reasons}"
    if result.temperature is None:
        yield "the checkpoint does not say its temperature: no figures of the relaxed reconstruction"
    codebook_size = result.checkpoint.dvae_config.codebook_size
    if result.figures["num_positions"] < FEW_POSITIONS * codebook_size:
        yield (
            f"{result.figures['num_positions']:,.0f} positions are few for {codebook_size:,} codes: use, perplexity "
            "and entropy come out too low"
        )
    if "rfid" in result.figures and result.num_images < FEW_IMAGES:
        yield f"an rFID of {result.num_images:,} images comes out too high: published ones are of 50,000"
    yield from (why for name, why in NOT_GIVEN.items() if name not in result.figures)


def card_of(result: EvalResult) -> bytes:
    checkpoint = result.checkpoint
    facts = CardFacts(
        tokenizer_id=checkpoint.tokenizer_id,
        model=checkpoint.dvae_config,
        image_spec=checkpoint.image_spec,
        step=checkpoint.step,
        training=checkpoint.extra.get("training_config"),
        figures=result.figures,
        source=f"On {source(result)} (`dvae eval`).",
        warnings=_warnings_of_training(result),
        extra=checkpoint.extra,
    )
    return model_card(facts)


def _warnings_of_training(result: EvalResult) -> list[str]:
    """As of the checkpoint's step, where the checkpoint lies in the output of its training."""
    above, _, name = result.folder.rpartition("/")
    output = TrainOutput(above if name == TRAINED_MODEL else above.rpartition("/")[0])
    if (read_json(output.file("run.json")) or {}).get("kind") != "train":
        return []
    lines = [line for line in output.read_metrics() if line["step"] <= result.checkpoint.step]
    return [finding["text"] for finding in standing(lines)]


def _publish(result: EvalResult, output: str) -> list[str]:
    """A `.json` or a `.md` file, or both and the pictures in a folder."""
    data, text = json.dumps(to_json(result), indent=2).encode() + b"\n", to_markdown(result).encode()
    files = {".json": {output: data}, ".md": {output: text}}.get(PurePosixPath(output).suffix)
    if files is None:
        title = f"Codes of {result.checkpoint.tokenizer_id[:12]}, step {result.checkpoint.step:,}"
        files = {
            storage.join(output, "eval.json"): data,
            storage.join(output, "eval.md"): text,
            storage.join(output, "codes.png"): encode_png(draw_codes(result.histogram_K, title)),
            storage.join(output, "reconstructions.png"): encode_png(result.picture_HWC),
        }
    for url, content in files.items():
        storage.publish(url, content)
    return list(files)


def _print(result: EvalResult, written: Sequence[str], console: Console) -> None:
    console.print(
        f"{'tokenizer':<12}{escape(result.checkpoint.tokenizer_id)} ({escape(storage.public_url(result.folder))})"
    )
    console.print(f"{'images':<12}{escape(source(result))}, {result.device}, {result.seconds:g} s")
    table = Table("figure", "value")
    for what, value in figure_rows(result.figures):
        table.add_row(what, value)
    console.print(table)
    for note in notes(result):
        console.print(f"note: {escape(note)}")
    for url in written:
        console.print(f"wrote {escape(storage.public_url(url))}")
