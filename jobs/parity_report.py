"""What `dvae parity` found, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs.parity import ParityReport, ParitySettings, Variant, measure
from jobs.wording import rate

WORST_SHOWN = 3  # images of the variant that differs most


def run_parity(checkpoint: str, shards: Sequence[str], settings: ParitySettings, *, as_json: bool) -> int:
    """Raises what `measure` does."""
    report = measure(checkpoint, shards, settings)
    console = Console(soft_wrap=True, highlight=False)
    if as_json:
        console.print_json(json.dumps(to_json(report)))
    else:
        _print(report, console)
    return 0


def to_json(report: ParityReport) -> dict[str, Any]:
    return {
        "checkpoint": report.head.url,
        "tokenizer_id": report.head.tokenizer_id,
        "against": None if report.against is None else report.against.url,
        "against_tokenizer_id": None if report.against is None else report.against.tokenizer_id,
        "device": report.device,
        "batch_size": report.settings.batch_size,
        "threads": report.settings.threads,
        "num_images": report.num_images,
        "variants": [_variant_json(variant) for variant in report.variants],
    }


def _variant_json(variant: Variant) -> dict[str, Any]:
    fields = asdict(variant)
    if variant.agreement is not None:
        fields["agreement"]["share"] = variant.agreement.share
    return fields


def _print(report: ParityReport, console: Console) -> None:
    console.print(f"{'tokenizer':<12}{escape(report.head.tokenizer_id)} ({escape(report.head.url)}), fp32")
    if report.against is not None:
        console.print(f"{'against':<12}{escape(report.against.tokenizer_id)} ({escape(report.against.url)})")
    batch_size, threads = report.settings.batch_size, report.settings.threads
    console.print(f"{'device':<12}{escape(report.device)}, batch size {batch_size}, {threads} threads")
    rows, columns = report.head.grid
    console.print(f"{'sample':<12}{report.num_images:,} images, {report.num_images * rows * columns:,} tokens")
    table = Table("variant", "images/s", "× fp32", "same tokens", "same images", "margin, largest")
    base = next((v.images_per_s for v in report.variants if v.images_per_s), None)
    for variant in report.variants:
        table.add_row(*_cells(variant, base, report.num_images))
    console.print(table)
    for variant in report.variants:
        if variant.problem is not None:
            console.print(f"{variant.name}: {escape(variant.problem)}")
    _print_worst(report, console)


def _cells(variant: Variant, base: float | None, num_images: int) -> list[str]:
    found, speed = variant.agreement, variant.images_per_s
    if found is None or speed is None or base is None:
        return [variant.name, "not here", *[""] * 4]
    same = [f"{found.share:.4%}", f"{found.num_same_images:,} of {num_images:,}"]
    margins = f"{found.margins[0]:.2g}, {found.margins[1]:.2g}" if found.margins else "-"
    return [variant.name, rate(speed), f"{speed / base:.2f}", *same, margins]


def _print_worst(report: ParityReport, console: Console) -> None:
    found = [variant for variant in report.variants if variant.agreement is not None and variant.agreement.images]
    worst = max(found, key=lambda variant: variant.agreement.num_differing if variant.agreement else 0, default=None)
    if worst is None or worst.agreement is None:
        return
    positions = worst.agreement.num_tokens // report.num_images
    for image in worst.agreement.images[:WORST_SHOWN]:
        console.print(
            f"{worst.name}: {escape(image.key)} in {escape(image.shard)} has {image.num_differing} of {positions} "
            f"tokens otherwise, by margins of up to {image.largest_margin:.2g}"
        )
